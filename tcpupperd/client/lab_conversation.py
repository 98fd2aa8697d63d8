"""A conversation on a terminal with a listener named `lab`."""

from tcpupperd.client.conversation import Conversation
from tcpupperd.client.lab import LabOrder


class LabConversation(LabOrder, Conversation):
    """Each order, even an invalid one, is carried out before the next prompt."""

"""The answers of the agent to load balancers."""

import re

import pytest

from tcpupperd.serving.agent import AgentProtocol

#: Words of agent-check that change what an administrator of HAProxy has set.
ADMINISTRATIVE = re.compile("ready|drain|maint")


@pytest.mark.parametrize(("leaving", "opening"), [(False, b"up 100%\n"), (True, b"up 0%\n")])
def test_agent_says_weight_and_nothing_else(leaving: bool, opening: bytes) -> None:
    protocol = AgentProtocol(leaving=leaving)
    assert protocol.opening == opening
    assert not ADMINISTRATIVE.search(protocol.opening.decode())
    assert protocol.finished
    assert protocol.receive(b"state?\n") == protocol.receive_eof() == b""

"""The events that an administrator acts on, and the fields of log messages.

The journal has both; `data/catalog/tcpupperd.catalog` explains each event to `journalctl -x`.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from tcpupperd.words import host_of

#: For `extra=` of a log call.
Extra = dict[str, dict[str, object]]


def fields(**values: object) -> Extra:
    """Journal fields for a log message, systemd.journal-fields(7). Those of this daemon begin with
    TCPUPPERD_."""
    return {"fields": values}


def client_fields(address: Any) -> dict[str, object]:
    """The fields that name a client by its address; none for a local client."""
    if not isinstance(address, tuple):
        return {}
    return {"TCPUPPERD_CLIENT": host_of(address), "TCPUPPERD_PORT": address[1]}


class Event(Enum):
    """A row for each event: its MESSAGE_ID, which never changes, and its title in the catalog."""

    READY = "f761f76328de4a84a72224c2f51d8161", "The service is ready"
    RELOADED = "88392a473a0c4b24808cfb1e6d2dd928", "The service has been reloaded"
    RELOAD_REFUSED = "fc42b7ca66e242c493f76242190366a8", "A reload has failed"
    SOCKET_CHANGED = "f604bd4c89ad4ce58371a6a7db98bf42", "A socket unit has to be restarted"
    LAST_GOOD_IN_USE = "fb32fdf9c809417fb57ccbdb9ab098e6", "The last good configuration is in use"
    WORKER_DIED = "79e7aaff584b40a783a22f7395ca0612", "A worker has died"
    WORKER_HUNG = "8db25422013b4d989f98e09d73c51915", "A worker is not responding"
    ACCEPTING_PAUSED = "3a38d7b5296f487fb6ae8d6cd9b531d4", "New connections are waiting"
    ACCEPTING_RESUMED = "dcc08a9830884898a63991e2fae0c85d", "New connections are accepted again"
    SOURCE_LIMIT = "ecaa43c1e920473fb48d1d4939a697b7", "A client has too many connections"
    PROXY_REFUSED = (
        "82add1c8d4724220bda5bc43d62562ea",
        "A load balancer's connection has been rejected",
    )
    HANDED_OVER = "232397d42e98476ea7fee70120ef0ab4", "Connections have been handed over"
    TAKEN_OVER = "393370c2858648e5a01c7bac4ddde2c0", "Connections have been taken over"
    HANDOVER_DAMAGED = "d93945a65d0342328c3902700a45ffd1", "Connections could not be taken over"
    CHANNEL_REPLACED = "5b1f0c6e9d3a4c57a2f48be1c0d76e39", "The handover channel has been replaced"
    ANSWERS_CUT_OFF = "57ead5d234e141ce94ecf3c789dac12a", "Answers were cut off while stopping"
    CONNECTION_ENDED = "07796715a8184140b65176a61ab6f305", "A connection has ended"
    MESSAGES_DROPPED = "da3c47757c7443d3b8633670a2642dd9", "Log messages were dropped"

    def __init__(self, message_id: str, title: str) -> None:
        self.message_id = message_id
        self.title = title

    def fields(self, **values: object) -> Extra:
        """The fields of a message that reports this event."""
        return fields(MESSAGE_ID=self.message_id, DOCUMENTATION=DOCUMENTATION, **values)


#: What explains an event, in the form of DOCUMENTATION=.
DOCUMENTATION = "man:tcpupperd(8)"

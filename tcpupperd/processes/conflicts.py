"""Settings that are right by themselves, and contradict what the process was given."""

from __future__ import annotations

from tcpupperd.config import Config
from tcpupperd.host import descriptors

#: Descriptors that a worker needs besides its connections, and for a hand-over.
RESERVE = 64 + 252


def conflicts(settings: Config, *, passed: bool) -> list[str]:
    """What to tell of a configuration that is used; `passed`, with sockets that were passed in.

    Not drain_timeout: a service manager is told how long a stop takes, and waits.
    """
    found = []
    if passed and is_set(settings, "listen"):
        found.append(
            "listen has no effect: the service manager passes the sockets in;"
            " set the addresses in the socket unit"
        )
    limit = descriptors.hard_limit()
    if settings.max_connections > limit - RESERVE:
        found.append(
            f"max_connections = {settings.max_connections} is more than the limit of {limit}"
            " descriptors allows, which counts; raise LimitNOFILE= of the unit, or ulimit -n"
        )
    return found


def not_judged(settings: Config) -> list[str]:
    """What a check without the unit cannot know."""
    found = []
    if is_set(settings, "listen"):
        found.append("listen (no effect if a service manager passes sockets in)")
    if is_set(settings, "max_connections"):
        found.append("max_connections (LimitNOFILE= of the unit may allow fewer)")
    return found


def is_set(settings: Config, name: str) -> bool:
    """Whether a setting is not as by default."""
    return bool(vars(settings)[name] != vars(Config())[name])

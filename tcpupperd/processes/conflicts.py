"""Settings that are valid, but contradict the sockets or limits of the process."""

from __future__ import annotations

from tcpupperd.config import Config
from tcpupperd.host import descriptors
from tcpupperd.processes.capacity import capacity


def conflicts(settings: Config, *, passed: bool, kept: bool) -> list[str]:
    """Warnings about the configuration in use; `passed` if sockets were passed in, and `kept` if a
    restart keeps connections.

    drain_timeout causes none: the service manager is told how long a stop takes, and waits.
    """
    found = []
    if passed and is_set(settings, "listen"):
        found.append(
            "listen has no effect: the service manager passes the sockets in;"
            " set the addresses in the socket unit"
        )
    if complaint := capacity(settings, descriptors.limit(), kept=kept).complaint(settings):
        found.append(complaint)
    return found


def not_judged(settings: Config) -> list[str]:
    """Settings that a check cannot judge without knowing the unit."""
    found = []
    if is_set(settings, "listen"):
        found.append("listen (no effect if a service manager passes sockets in)")
    if is_set(settings, "max_connections"):
        found.append("max_connections (LimitNOFILE= of the unit may allow fewer)")
    return found


def is_set(settings: Config, name: str) -> bool:
    """Whether a setting differs from its default."""
    return bool(vars(settings)[name] != vars(Config())[name])

"""Settings that are valid but conflict with the sockets or limits of the process."""

from __future__ import annotations

import logging

from outlive import descriptors
from tcpupperd.config import Config
from tcpupperd.processes.capacity import capacity


def conflicts(settings: Config, *, passed: bool, kept: bool) -> list[tuple[int, str]]:
    """Messages to log about the running configuration, with their levels; `passed` if the service
    manager passed sockets, and `kept` if a restart keeps connections.

    drain_timeout never conflicts: the service manager is told how long a stop takes, and waits.
    """
    found = []
    if passed and is_set(settings, "listen"):
        text = (
            "listen is ignored because the service manager passes sockets;"
            " set the addresses in the socket unit"
        )
        found.append((logging.WARNING, text))
    if problem := capacity(settings, descriptors.limit(), kept=kept).problem(settings):
        level = logging.WARNING if is_set(settings, "max_connections") else logging.INFO
        found.append((level, problem))
    return found


def cannot_check(settings: Config) -> list[str]:
    """Settings that cannot be checked without knowing the unit."""
    found = []
    if is_set(settings, "listen"):
        found.append("listen (ignored if the service manager passes sockets)")
    if is_set(settings, "max_connections"):
        found.append("max_connections (LimitNOFILE= in the unit may allow fewer)")
    return found


def is_set(settings: Config, name: str) -> bool:
    """Whether a setting differs from its default."""
    return bool(vars(settings)[name] != vars(Config())[name])

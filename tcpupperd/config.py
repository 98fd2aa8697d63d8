"""The table of settings, one row each, from which the file format, the command line and the
completion are derived."""

from __future__ import annotations

import os
from typing import Any

from tcpupperd import settings
from tcpupperd.settings import WORKERS_MAX, Setting, as_toml

#: The maximum number of characters of a name or value in a message.
SHOWN_MAX = 80

DAY = 86400

#: The maximum of TCP_KEEPIDLE, in seconds; see tcp(7).
KEEPALIVE_MAX = 32767


class Config:
    """The values of the settings; immutable. A setting that is not given has its default.

    Raises ValueError if a value is invalid, and TypeError for an unknown setting.
    """

    listen = Setting(
        ("localhost:9999",),
        settings.addresses,
        "ADDRESS",
        "address to listen on: host:port, [::1]:port, port, /path or @abstract; prefix NAME="
        " selects a service other than upper; may be repeated; ignored if the service manager"
        " passes sockets",
    )
    proxy_from = Setting(
        ("127.0.0.0/8", "::1"),
        settings.networks,
        "NETWORK",
        "address or network from which load balancers may connect to the proxy service; may be"
        " repeated",
    )
    workers = Setting(
        "auto",
        settings.workers,
        "N",
        'number of worker processes; "auto" means one per usable CPU',
    )
    framing = Setting(
        "line",
        settings.one_of("line", "none"),
        "KIND",
        '"line": answer each line once it is complete; "none": answer data as it arrives',
    )
    lines_per_connection = Setting(
        0,
        settings.whole_number(0, 2**31 - 1),
        "N",
        "close a connection after this many lines (0 for no limit)",
    )
    max_line = Setting(
        65536,
        settings.whole_number(1, 2**30),
        "BYTES",
        "answer lines longer than this in pieces",
    )
    greeting = Setting(
        "",
        settings.greeting,
        "TEXT",
        "line to send to each client when it connects; {host}, {instance}, {worker} and {client}"
        " are expanded",
    )
    max_connections = Setting(
        10000,
        settings.whole_number(1, 10**6),
        "N",
        "maximum number of open connections per worker; additional clients wait in the accept"
        " queue",
    )
    max_connections_per_source = Setting(
        0,
        settings.whole_number(0, 10**6),
        "N",
        "maximum number of open connections per worker from one client address (one /64 for"
        " IPv6); any more are closed immediately (0 for no limit)",
    )
    idle_timeout = Setting(
        300.0,
        settings.seconds(0, DAY),
        "SECONDS",
        "close a connection after this long without traffic (0 for never)",
    )
    line_timeout = Setting(
        60.0,
        settings.seconds(0, DAY),
        "SECONDS",
        "close a connection if a line takes longer than this to arrive (0 for never)",
    )
    write_timeout = Setting(
        60.0,
        settings.seconds(0, DAY),
        "SECONDS",
        "reset a connection if the client reads nothing of a pending answer for this long (0 for"
        " never)",
    )
    keepalive = Setting(
        60.0,
        settings.seconds(0, KEEPALIVE_MAX),
        "SECONDS",
        "send keepalive probes to a client that has been silent for this long, and drop the"
        " connection if its host does not respond within the same time (0 for never)",
    )
    shutdown_delay = Setting(
        0.0,
        settings.seconds(0, 3600),
        "SECONDS",
        "when told to stop, keep serving for this long while the agent tells load balancers to"
        " send new clients elsewhere (0 for no delay)",
    )
    drain_timeout = Setting(
        10.0,
        settings.seconds(0, 3600),
        "SECONDS",
        "time allowed for delivering pending answers when the service stops; connections with"
        " undelivered answers are then reset",
    )
    log_level = Setting(
        "info",
        settings.one_of("debug", "info", "warning", "error"),
        "LEVEL",
        "log messages of at least this severity; debug also logs each connection",
    )
    log_connections = Setting(
        False,
        settings.switch,
        "BOOLEAN",
        "log why each connection ended and how much was received and sent",
    )

    def __init__(self, **given: Any) -> None:
        values = {setting.name: setting.default for setting in SETTINGS}
        checked = {name: check(name, value) for name, value in given.items()}
        self.__dict__.update(values | checked)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"cannot change {name}: a configuration is immutable")

    def replace(self, **changed: Any) -> Config:
        """A copy with some settings changed."""
        return Config(**(vars(self) | changed))

    @property
    def worker_count(self) -> int:
        """The number of worker processes on this machine."""
        if self.workers == "auto":
            return min(WORKERS_MAX, len(os.sched_getaffinity(0)))
        return int(self.workers)


#: The rows, in order.
SETTINGS = tuple(row for row in vars(Config).values() if isinstance(row, Setting))


def check(name: str, value: Any) -> Any:
    """The value to use for a setting. Raises ValueError if the value is invalid, and TypeError for
    an unknown setting."""
    for setting in SETTINGS:
        if setting.name == name:
            try:
                return setting.check(value)
            except ValueError as error:
                raise ValueError(f"{name} = {_shown(value)}: {error}") from None
    shown = name if name.isprintable() else as_toml(name)
    raise TypeError(f"{_cut(shown)}: unknown setting; {_hint(name)}")


def _shown(value: Any) -> str:
    """A value roughly in TOML syntax, shortened if it is long."""
    try:
        text = _written(value)
    except ValueError:  # Python converts at most 4300 digits
        return "a number too long to display"
    return _cut(text)


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if hasattr(value, "isoformat"):  # a date or a time
        return str(value)
    return repr(value).replace("'", '"')


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "..."


def _hint(name: str) -> str:
    from difflib import get_close_matches  # needed only here

    names = [setting.name for setting in SETTINGS]
    close = get_close_matches(name[:SHOWN_MAX], names, n=1)
    return f"did you mean {close[0]}?" if close else f"the settings are {', '.join(names)}"

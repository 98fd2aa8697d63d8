"""The destination of log messages: the journal with their priority, a terminal, or syslog.

A message never blocks the daemon: if it cannot be written at once, it is dropped, and the number
of dropped messages is logged when writing works again.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from collections.abc import Mapping
from time import monotonic

from tcpupperd.words import counted

#: Levels of syslog(3), which sd-daemon(3) writes before a line as <N>.
PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

#: The facility of system daemons, of syslog(3).
LOG_DAEMON = 3 << 3

#: The maximum length of a line, in bytes: PIPE_BUF of pipe(7). A write of up to this size does not
#: block if poll(2) reports that a pipe, or a Unix socket (then three quarters empty), is writable.
LINE_MAX = 4096


def set_up(level: str, environ: Mapping[str, str], *, as_command: bool = False) -> None:
    """Log messages of `level` ("info", ...) and above to standard error: with their priority for
    the journal, else with the time or, `as_command`, with the command's name."""
    handler = StreamHandler(2, prefixed=is_journal(2, environ), as_command=as_command)
    logging.basicConfig(handlers=[handler], force=True)
    logging.raiseExceptions = False
    set_level(level)


def set_level(level: str) -> None:
    """Change the level."""
    logging.getLogger().setLevel(level.upper())


def to_syslog(address: str = "/dev/log") -> None:
    """Log to syslog from now on; standard error is about to be closed."""
    level = logging.getLogger().level
    logging.basicConfig(handlers=[SyslogHandler(address)], force=True, level=level)


def is_journal(fd: int, environ: Mapping[str, str]) -> bool:
    """Whether a descriptor is connected to the journal, by JOURNAL_STREAM of systemd.exec(5).

    It is not enough that the variable exists: it is inherited even if the stream is redirected.
    """
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class StreamHandler(logging.Handler):
    """Writes messages to a descriptor: each line with its priority if `prefixed`, else with the
    command's name if `as_command`."""

    def __init__(self, fd: int, *, prefixed: bool, as_command: bool = False) -> None:
        super().__init__()
        self._fd = fd
        self._prefixed = prefixed
        self._dropped = 0
        self._as_command = as_command
        plain = prefixed or as_command
        layout = "%(message)s" if plain else "%(asctime)s %(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(layout))

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message, or count it as dropped."""
        try:
            text = self.format(record)
        except Exception:
            text = f"bug: a message that cannot be formatted: {record.msg!r} {record.args!r}"
            if record.exc_info:  # since Python 3.13, a traceback needs a free descriptor
                text += f" {record.exc_info[1]!r}"
        if self._dropped and self._write(f"{counted(self._dropped, 'message')} dropped", 4):
            self._dropped = 0
        if not self._write(text, PRIORITIES.get(record.levelno, 6)):
            self._dropped += 1

    def _write(self, text: str, priority: int) -> bool:
        # Line by line: each line is a message to the journal, even in a traceback.
        prefix = self._prefix(priority)
        lines = [(prefix + line).encode(errors="backslashreplace") for line in text.splitlines()]
        return all(self._write_now(line[: LINE_MAX - 1] + b"\n") for line in lines)

    def _prefix(self, priority: int) -> str:
        if self._prefixed:
            return f"<{priority}>"
        return "tcpupperd: " if self._as_command else ""

    def _write_now(self, data: bytes) -> bool:
        try:
            # Not O_NONBLOCK: it would also apply to the shell that started this process, because
            # they share the open file.
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            return bool(poll.poll(0)) and os.write(self._fd, data) == len(data)
        except OSError:
            return False


class SyslogHandler(StreamHandler):
    """Sends messages to the local syslog daemon, as syslog(3) does.

    `logging.handlers.SysLogHandler` would wait, possibly forever, for a daemon that does not read.
    """

    def __init__(self, address: str) -> None:
        super().__init__(-1, prefixed=True)
        self._address = address
        # Not connected, so that messages also reach a daemon that was restarted.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def _prefix(self, priority: int) -> str:
        return f"<{LOG_DAEMON | priority}>tcpupperd: "

    def _write_now(self, data: bytes) -> bool:
        try:
            self._socket.sendto(data, socket.MSG_DONTWAIT, self._address)
        except OSError:
            return False
        return True


class RateLimitedLog:
    """Limits the rate of warnings that clients can provoke at will."""

    INTERVAL = 10.0  # seconds between two warnings, at least

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._next = 0.0
        self._left_out = 0

    def warn(self, message: str, *values: object) -> None:
        """Log a warning, with the number of those suppressed before it, or suppress it."""
        now = monotonic()
        if now < self._next:
            self._left_out += 1
            return
        self._next = now + self.INTERVAL
        if self._left_out:
            message += f"; {counted(self._left_out, 'similar message')} suppressed"
            self._left_out = 0
        self._log.warning(message, *values)

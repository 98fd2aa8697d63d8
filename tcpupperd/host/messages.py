"""The destination of log messages: the journal, standard error, or syslog.

A message never blocks the daemon: if it cannot be written immediately, it is dropped, and the
number of dropped messages is logged once writing works again.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from time import monotonic

from tcpupperd.host.journal import Journal
from tcpupperd.words import counted

#: The syslog(3) levels, which sd-daemon(3) writes before a line as <N>.
PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

#: The default name of the program in the log.
NAME = "tcpupperd"

#: The facility of system daemons in syslog(3).
DAEMON = 3

#: Maximum number of seconds that an exiting process waits for the journal to handle its entries.
FLUSH_TIME = 0.3

#: The maximum length of a line, in bytes: PIPE_BUF in pipe(7). A write of up to this size does not
#: block if poll(2) reports that a pipe, or a Unix socket (then three quarters empty), is writable.
LINE_MAX = 4096


def set_up(
    level: str,
    environ: Mapping[str, str],
    *,
    name: str = NAME,
    as_command: bool = False,
    dropped: Mapping[str, object] | None = None,
) -> None:
    """Log messages of `level` ("info", ...) and above to the journal, if standard error leads
    there, or else to standard error with the time. `dropped` is the `extra=` of messages that say
    how many were dropped.

    With `as_command`, write lines to standard error: with their priority for the journal, or else
    with the command's name. An entry would lose its unit if the command exited before the journal
    handled the entry (systemd issue 2913).
    """
    prefixed = is_journal(2, environ)
    lines = StreamHandler(2, prefixed=prefixed, name=name if as_command else "")
    handler = JournalHandler(lines, name) if prefixed and not as_command else lines
    handler.about_dropped = dropped or {}
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
    """Whether a descriptor is connected to the journal, according to JOURNAL_STREAM, see
    systemd.exec(5).

    It is not enough that the variable exists: it is inherited even if the stream is redirected.
    """
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Handler(logging.Handler, ABC):
    """Counts messages that cannot be written, and logs their number later."""

    def __init__(self) -> None:
        super().__init__()
        self.about_dropped: Mapping[str, object] = {}
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, or count it as dropped."""
        if self._dropped and self.write(self._of_dropped()):
            self._dropped = 0
        if not self.write(record):
            self._dropped += 1

    @abstractmethod
    def write(self, record: logging.LogRecord) -> bool:
        """Write a message now; return whether that was possible."""

    def _of_dropped(self) -> logging.LogRecord:
        """A message that says how many were dropped."""
        text = f"{counted(self._dropped, 'message')} dropped"
        told = logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None)
        vars(told).update(self.about_dropped)
        return told

    def text(self, record: logging.LogRecord) -> str:
        """The message, with its traceback if it has one."""
        try:
            return self.format(record)
        except Exception:
            text = f"bug: a message that cannot be formatted: {record.msg!r} {record.args!r}"
            if record.exc_info:  # since Python 3.13, a traceback needs a free descriptor
                text += f" {record.exc_info[1]!r}"
            return text


class StreamHandler(Handler):
    """Writes messages to a descriptor: each line with its priority if `prefixed`, else with the
    `name` of a command, else with the time."""

    def __init__(self, fd: int, *, prefixed: bool, name: str = "") -> None:
        super().__init__()
        self._fd = fd
        self._prefixed = prefixed
        self._name = name
        layout = "%(message)s" if prefixed or name else "%(asctime)s %(levelname)s %(message)s"
        self.setFormatter(logging.Formatter(layout))

    def write(self, record: logging.LogRecord) -> bool:
        """Write line by line: each line is a message to the journal, even in a traceback."""
        prefix = self._prefix(priority_of(record))
        text = self.text(record)
        lines = [(prefix + line).encode(errors="backslashreplace") for line in text.splitlines()]
        return all(self._write_now(line[: LINE_MAX - 1] + b"\n") for line in lines)

    def _prefix(self, priority: int) -> str:
        if self._prefixed:
            return f"<{priority}>"
        return f"{self._name}: " if self._name else ""

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

    def __init__(self, address: str, name: str = NAME) -> None:
        super().__init__(-1, prefixed=True, name=name)
        self._address = address
        # Not connected, so that messages also reach a daemon that has been restarted.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def _prefix(self, priority: int) -> str:
        return f"<{DAEMON << 3 | priority}>{self._name}: "

    def _write_now(self, data: bytes) -> bool:
        try:
            self._socket.sendto(data, socket.MSG_DONTWAIT, self._address)
        except OSError:
            return False
        return True


class JournalHandler(Handler):
    """Sends messages to the journal as entries with fields.

    If the journal's socket has disappeared, messages go to standard error, as `lines`. Fatal
    messages are written there as well, because the journal may look up their process only after it
    has exited, when its unit can no longer be determined (systemd issue 2913).
    """

    def __init__(self, lines: StreamHandler, name: str = NAME) -> None:
        super().__init__()
        self._lines = lines
        self._name = name
        self._journal = Journal()
        self._sender = 0  # the process that sent the last entry
        self.setFormatter(logging.Formatter("%(message)s"))

    def write(self, record: logging.LogRecord) -> bool:
        """Send an entry."""
        written = record.levelno >= logging.CRITICAL and self._lines.write(record)
        try:
            self._journal.send(self._fields(record))
        except BlockingIOError:
            return written
        except OSError:
            return written or self._lines.write(record)
        self._sender = os.getpid()
        return True

    def flush(self) -> None:
        """Called before the process exits: gives the journal time to look up its unit."""
        if self._sender == os.getpid():
            self._journal.flush(FLUSH_TIME)

    def close(self) -> None:
        """Close the journal's socket."""
        self._journal.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, object]:
        """The fields of systemd.journal-fields(7), and those that came with the message."""
        found: dict[str, object] = {
            "MESSAGE": self.text(record),
            "PRIORITY": priority_of(record),
            "SYSLOG_FACILITY": DAEMON,
            "SYSLOG_IDENTIFIER": self._name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": record.lineno,
            "CODE_FUNC": record.funcName,
            "TID": threading.get_native_id(),
        }
        if error := error_of(record):
            found["ERRNO"] = error
        return found | getattr(record, "fields", {})


def priority_of(record: logging.LogRecord) -> int:
    """The level of syslog(3)."""
    return PRIORITIES.get(record.levelno, 6)


def error_of(record: logging.LogRecord) -> int | None:
    """The number of the operating system error that a message reports, if any."""
    values = record.args if isinstance(record.args, tuple) else ()
    raised = record.exc_info[1] if record.exc_info else None
    errors = (one.errno for one in (*values, raised) if isinstance(one, OSError) and one.errno)
    return next(errors, None)


class RateLimitedLog:
    """Limits the rate of messages that others can trigger at will."""

    INTERVAL = 10.0  # minimum number of seconds between messages

    def __init__(self, log: logging.Logger, level: int = logging.WARNING) -> None:
        self._log = log
        self._level = level
        self._next = 0.0
        self._left_out = 0

    def warn(
        self, message: str, *values: object, extra: Mapping[str, object] | None = None
    ) -> None:
        """Log a message, with the number of those suppressed before it, or suppress it."""
        now = monotonic()
        if now < self._next:
            self._left_out += 1
            return
        self._next = now + self.INTERVAL
        if self._left_out:
            message += f"; {counted(self._left_out, 'similar message')} suppressed"
            self._left_out = 0
        self._log.log(self._level, message, *values, extra=extra)

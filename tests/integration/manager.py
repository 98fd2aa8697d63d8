"""The part of a service manager that a daemon talks to."""

import os
import re
import socket
import stat
import struct
import threading
from io import FileIO
from typing import Any, NamedTuple, Self

from waiting import DEADLINE

#: Of socket(7), not in Python's module before 3.14: the kernel notes when a datagram was sent.
SO_TIMESTAMPNS = 35

_TIMESPEC = struct.Struct("@ll")
_CREDENTIALS = struct.Struct("@iii")  # process, user, group
_DESCRIPTOR = struct.Struct("@i")
_ANCILLARY = (_TIMESPEC, _CREDENTIALS, _DESCRIPTOR)


class Message(NamedTuple):
    """A datagram that a daemon sent."""

    text: str
    when: float  # seconds

    @property
    def lines(self) -> list[str]:
        """Its assignments."""
        return self.text.split("\n")


class Manager:
    """Reads NOTIFY_SOCKET all the time, and stores descriptors (sd_notify(3))."""

    def __init__(self, address: str, *, store: bool = False) -> None:
        """Bind a socket at a path, or at "@name"; with `store`, offer to keep descriptors."""
        self.environment = {"NOTIFY_SOCKET": address} | ({"FDSTORE": "4"} if store else {})
        self.messages: list[Message] = []
        self.stored: dict[str, Any] = {}  # sockets, and other files
        self.listeners: list[tuple[str, socket.socket]] = []  # several may have the same name
        self.room = 8 if store else 0
        self.senders: set[int] = set()  # processes
        self._seen = 0  # of the messages, by `wait`
        self._news = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(address.replace("@", "\0", 1))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        for one in (*self.stored.values(), *(one for _, one in self.listeners)):
            one.close()

    def wait(self, pattern: str, timeout: float = DEADLINE) -> Message:
        """The next message with a line that matches `pattern` as a whole; the next call looks
        only at later ones."""
        with self._news:
            index = self._news.wait_for(lambda: self.find(pattern), timeout)
            assert index, f"no {pattern} in {self.messages[self._seen :]}"
            self._seen = index
            return self.messages[index - 1]

    def find(self, pattern: str) -> int:
        """The number (from 1) of the message that `wait` would return; 0 if there is none yet."""
        for index in range(self._seen, len(self.messages)):
            if any(re.fullmatch(pattern, line) for line in self.messages[index].lines):
                return index + 1
        return 0

    def count(self, line: str) -> int:
        """The number of messages with this line that have arrived."""
        return sum(line in message.lines for message in self.messages)

    @property
    def status(self) -> str:
        """The last STATUS= that arrived."""
        found = [one.text for one in self.messages if one.text.startswith("STATUS=")]
        return found[-1].removeprefix("STATUS=") if found else ""

    def forget(self, name: str) -> None:
        """Close what is stored under a name."""
        if name in self.stored:
            self.stored.pop(name).close()
        for one in [one for one in self.listeners if one[0] == name]:
            self.listeners.remove(one)
            one[1].close()

    def _read(self) -> None:
        room = sum(socket.CMSG_SPACE(one.size) for one in _ANCILLARY)
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
            if not data:
                return
            files: list[int] = []
            when = 0.0
            for _, kind, content in ancillary:
                match kind:
                    case socket.SCM_RIGHTS:
                        files += _DESCRIPTOR.unpack(content)
                    case socket.SCM_CREDENTIALS:
                        self.senders.add(_CREDENTIALS.unpack(content)[0])
                    case _:
                        seconds, nanoseconds = _TIMESPEC.unpack(content)
                        when = seconds + nanoseconds / 1e9
            message = Message(data.decode(), when)
            with self._news:
                self._keep(message.lines, files)
                self.messages.append(message)
                self._news.notify_all()

    def _keep(self, lines: list[str], files: list[int]) -> None:
        """Store or forget descriptors. As systemd does without FDPOLL=0, drop those that hang up:
        here, all sockets, because each would hang up once its daemon has exited."""
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTOREREMOVE=1" in lines:
            self.forget(name)
        for fd in files:
            if name.startswith("listener-"):
                self.listeners.append((name, socket.socket(fileno=fd)))
            elif self._is_kept(fd, lines):
                is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
                self.stored[name] = socket.socket(fileno=fd) if is_socket else FileIO(fd)
            else:
                os.close(fd)

    def _is_kept(self, fd: int, lines: list[str]) -> bool:
        may_hang_up = stat.S_ISSOCK(os.fstat(fd).st_mode) and "FDPOLL=0" not in lines
        return "FDSTORE=1" in lines and not may_hang_up and len(self.stored) < self.room

"""A journal as the daemon sees it: it receives entries in the native protocol."""

import array
import contextlib
import select
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

#: An entry: the value of each field.
Entry = dict[str, str]


def decode(data: bytes) -> Iterator[tuple[str, str]]:
    """The fields of an entry, read by the documented protocol."""
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack_from("<Q", data)
            value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
            assert end == b"\n"
            assert len(value) == size
        yield name.decode(), value.decode()


class Entries:
    """A socket at a path that receives entries; it is not read until asked to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = 0  # how many entries came in one
        self.questions = 0  # how often a process has asked how far we are
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()
        self.path.unlink()

    def read(self) -> list[Entry]:
        """The entries since the last time."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                pairs = list(decode(self._receive()))
                if not pairs:  # it only shows how far we are
                    self.questions += 1
                    continue
                assert len(dict(pairs)) == len(pairs), pairs  # no field twice
                found.append(dict(pairs))
        return found

    def _receive(self) -> bytes:
        data, ancillary, _, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        for *_, rights in ancillary:
            assert not data
            self.files += 1
            with open(array.array("i", rights)[0], "rb") as file:
                file.seek(0)
                data = file.read()
        return data


class LiveEntries(Entries):
    """A journal that reads all the time: the kernel may keep no more than ten entries for it
    (net.unix.max_dgram_qlen)."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._found: list[Entry] = []
        self._lock = threading.Lock()
        self._end, self._ends = socket.socketpair()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._end.close()
        self._thread.join()
        self._ends.close()
        super().__exit__()

    def read(self) -> list[Entry]:
        """The entries since the last time."""
        with self._lock:
            found, self._found = self._found + super().read(), []
        return found

    def _follow(self) -> None:
        while self._ends not in select.select([self._socket, self._ends], [], [])[0]:
            with self._lock:
                self._found += super().read()

"""Ending connections without losing an answer."""

from __future__ import annotations

import logging
import select
import socket
import struct
from collections.abc import Callable, Iterable
from time import monotonic

from outlive.send_queue import send_queue
from outlive.words import counted

log = logging.getLogger(__name__)

#: Turns the bytes that a client has sent into those to send back.
Answer = Callable[[bytes], bytes]

#: A connection, what is unsent, and what answers the input that has already arrived.
Connection = tuple[socket.socket, bytes] | tuple[socket.socket, bytes, Answer]

#: Bytes to receive from a connection in one step.
RECEIVE_SIZE = 65536

#: The number of times that a client is answered: one that never stops sending must not delay the
#: stop.
ANSWERS_MAX = 64

#: Seconds to wait for a client to close its side. Closing earlier, the kernel would reset the
#: connection if another byte arrived, and the client could lose answers that it has not read.
LINGER = 2.0

#: Seconds between two checks for clients that have acknowledged everything.
TICK = 0.1

#: For SO_LINGER: closing resets the connection.
_RESET = struct.pack("ii", 1, 0)


def end(connections: Iterable[Connection], seconds: float) -> None:
    """Send what is unsent, answer what has arrived, and close the connections, within this many
    seconds. Clients that have not read their answers by then are reset."""
    poll = select.poll()
    open_ones: dict[int, _Ending] = {}
    for sock, unsent, *answer in connections:
        if sock.fileno() < 0:
            continue  # it was closed by the program
        sock.setblocking(False)
        open_ones[sock.fileno()] = _Ending(sock, unsent, answer[0] if answer else None)
        poll.register(sock, select.POLLOUT)
    now = monotonic()
    give_up = now + seconds
    while open_ones and now < give_up:
        lingers = any(one.lingers_until for one in open_ones.values())
        wait = min(give_up - now, TICK) if lingers else give_up - now
        ready = [fd for fd, _ in poll.poll(wait * 1000)]
        now = monotonic()
        late = {fd for fd, one in open_ones.items() if one.may_close(now)}
        for fd in {*ready, *late}:
            events = 0 if fd in late else open_ones[fd].step(now)
            if events:
                poll.modify(fd, events)
            else:
                poll.unregister(fd)
                open_ones.pop(fd).close()
    unread = [one.reset_if_unsent() for one in open_ones.values()]
    if any(unread):
        log.warning("resetting %s with unsent answers", counted(sum(unread), "connection"))


class _Ending:
    """A connection that is being ended."""

    def __init__(self, sock: socket.socket, unsent: bytes, answer: Answer | None) -> None:
        self._socket = sock
        self._unsent = memoryview(unsent)
        self._answer = answer
        self._answers_left = ANSWERS_MAX
        self.lingers_until = 0.0  # once this side is closed

    def step(self, now: float) -> int:
        """Do what can be done now; return the events to wait for, or 0 at the end."""
        try:
            while not self.lingers_until:
                self._send_or_answer()
                if not self._unsent:
                    self._socket.shutdown(socket.SHUT_WR)
                    self.lingers_until = now + LINGER
            return select.POLLIN if self._socket.recv(RECEIVE_SIZE) else 0
        except OSError as error:
            if not _would_block(error):
                return 0
            return select.POLLIN if self.lingers_until else select.POLLOUT
        except Exception:
            log.exception("resetting a connection whose last input cannot be answered")
            self._reset()
            return 0

    def _send_or_answer(self) -> None:
        """Send what is unsent, and answer what has arrived, until there is nothing left."""
        while True:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            if not self._answer or not self._answers_left:
                return
            data = self._received()
            if not data:
                return
            self._answers_left -= 1
            self._unsent = memoryview(self._answer(data))

    def _received(self) -> bytes:
        try:
            return self._socket.recv(RECEIVE_SIZE)
        except OSError as error:
            if _would_block(error):
                return b""
            raise

    def may_close(self, now: float) -> bool:
        """Whether the client has had time to close its side, and has received everything."""
        return bool(self.lingers_until) and now > self.lingers_until and self._is_received()

    def _is_received(self) -> bool:
        try:
            return not send_queue(self._socket)
        except OSError:
            return True

    def reset_if_unsent(self) -> bool:
        """Close the connection when there is no more time, so that the client can tell whether it
        has received everything."""
        unsent = bool(self._unsent)
        if unsent:
            self._reset()
        self.close()
        return unsent

    def _reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


def _would_block(error: OSError) -> bool:
    """Whether the error says that there is nothing to do yet, also for a TLS connection."""
    name = type(error).__name__  # the module ssl may not be loaded
    return isinstance(error, BlockingIOError) or name in ("SSLWantReadError", "SSLWantWriteError")

"""Services with handlers and protocols of all kinds: python3 handlers.py NAME LOOP GATE GRACE.

LOOP is asyncio or uvloop. Some handlers do not continue before the file GATE exists.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Coroutine
from importlib import import_module
from pathlib import Path
from typing import Any

from outlive import Client, Service
from outlive.aio import Reader, Writer, serve, serve_protocol

NAME, LOOP, GATE, GRACE = sys.argv[1:]
CHUNK = b"x" * 2**16


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def gate() -> None:
    """Wait as for a database, which knows nothing of restarts."""
    while not Path(GATE).exists():
        await asyncio.sleep(0.01)


async def lines(reader: Reader, writer: Writer) -> None:
    """Send lines back with a number. The first line closes the gate, if it says so."""
    number = int(writer.state or 0)
    while (line := await reader.readline()).endswith(b"\n"):
        if line == b"gate\n":
            say("at the gate")
            await gate()
        number += 1
        writer.write(b"%d " % number)
        await writer.drain()
        writer.writelines([line[:-1], b"\n"])
        writer.state = b"%d" % number
        await writer.drain()


async def paced(reader: Reader, writer: Writer) -> None:
    """The same, but each line takes time."""
    number = int(writer.state or 0)
    while line := await reader.readline():
        number += 1
        writer.write(b"%d %s" % (number, line))
        writer.state = b"%d" % number
        await asyncio.sleep(0.01)


async def frames(reader: Reader, writer: Writer) -> None:
    """Requests that are a length and as many bytes."""
    while True:
        with reader.atomic():
            length = int(await reader.readline())
            say(f"length {length}")
            data = await reader.readexactly(length)
        writer.write(data[::-1])


async def whole(reader: Reader, writer: Writer) -> None:
    """Count what arrives up to the end."""
    data = await reader.read()
    writer.write(b"%d %d\n" % (len(data), sum(data)))


async def pushes(reader: Reader, writer: Writer) -> None:
    """Send a counter without being asked, and then nothing for a long time."""
    number = int(writer.state or 0) + 1
    writer.write(b"%d\n" % number)
    writer.state = b"%d" % number
    with writer.idle():
        await asyncio.Event().wait()


async def both(reader: Reader, writer: Writer) -> None:
    """One task sends, another one receives."""
    receiving = asyncio.create_task(lines(reader, writer))
    try:
        await asyncio.gather(receiving, pushes(reader, writer))
    finally:
        receiving.cancel()


async def hangs(reader: Reader, writer: Writer) -> None:
    """Answer the first line, and then never continue."""
    writer.write(await reader.readline())
    say("hanging")
    try:
        await asyncio.Event().wait()
    finally:
        say(f"handed over: {writer.handed_over}")


async def floods(reader: Reader, writer: Writer) -> None:
    """Write for as long as the connection lasts."""
    while True:
        writer.write(CHUNK)
        await writer.drain()


async def counts(reader: Reader, writer: Writer) -> None:
    """The same, but it can be interrupted."""
    number = int(writer.state or 0)
    while True:
        number += 1
        writer.write(b"%d %s\n" % (number, CHUNK[:1000]))
        writer.state = b"%d" % number
        with writer.idle():
            await writer.drain()


async def closes(reader: Reader, writer: Writer) -> None:
    """Close with an answer that takes time to be sent."""
    await reader.readline()
    writer.write(CHUNK * 128)
    writer.close()
    say("closed")
    await gate()
    say("through the gate")


async def half_closes(reader: Reader, writer: Writer) -> None:
    """Send everything, and then only listen."""
    if not writer.state:
        await reader.readline()
        writer.write(CHUNK * 128)
        writer.write_eof()
        writer.state = b"listening"
        say("half-closed")
    while line := await reader.readline():
        say(f"received {line!r}")


async def tells(reader: Reader, writer: Writer) -> None:
    """Tell whether the connection is handed over."""
    try:
        while line := await reader.readline():
            writer.write(CHUNK * 128 if line == b"long\n" else line)
    finally:
        say(f"handed over: {writer.handed_over}")
        writer.write(b"lost")


async def upgrades(reader: Reader, writer: Writer) -> None:
    """Try to use TLS."""
    try:
        await writer.start_tls(None)
    except NotImplementedError as error:
        writer.write(str(error).encode() + b"\n")


class Lines(asyncio.Protocol):
    """Sends lines back with a number, each after a while if it says so."""

    transport: asyncio.Transport

    def __init__(self, client: Client) -> None:
        number, _, self.held = (client.state or b"0 ").partition(b" ")
        self.number = int(number)
        self.is_paused = False
        self.work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.held += data
        if not self.work:
            self.answer()

    def answer(self) -> None:
        while b"\n" in self.held:
            line, _, self.held = self.held.partition(b"\n")
            if line == b"gate":
                self.work = asyncio.create_task(self.later(line))
                return
            self.reply(line)

    async def later(self, line: bytes) -> None:
        self.transport.pause_reading()
        say("at the gate")
        await gate()
        self.work = None
        self.reply(line)
        self.answer()
        self.transport.resume_reading()

    def reply(self, line: bytes) -> None:
        self.number += 1
        self.transport.write(b"%d %s\n" % (self.number, line))

    def state(self) -> bytes | None:
        return None if self.work else b"%d %s" % (self.number, self.held)


class Pairs(Lines):
    """The same, but what waits for the gate also needs the line that follows."""

    async def later(self, line: bytes) -> None:
        self.transport.pause_reading()
        say("at the gate")
        await gate()
        self.transport.resume_reading()
        while b"\n" not in self.held:
            await asyncio.sleep(0.01)
        following, _, self.held = self.held.partition(b"\n")
        self.work = None
        self.reply(line + b" " + following)
        self.answer()


class Buffered(asyncio.BufferedProtocol):
    """The same, with a buffer of its own."""

    def __init__(self, client: Client) -> None:
        self.lines = Lines(client)
        self.buffer = bytearray(1000)
        self.connection_made = self.lines.connection_made  # type: ignore[method-assign]
        self.state = self.lines.state

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.lines.data_received(bytes(self.buffer[:nbytes]))


async def named(reader: Reader, writer: Writer) -> None:
    """Tell the name of the listener."""
    while await reader.readline():
        writer.write(writer.listener.encode() + b"\n")


async def strings(reader: Reader, writer: Writer) -> None:
    """Use a state that is no bytes."""
    while line := await reader.readline():
        writer.state = line.decode() if line == b"string\n" else line  # type: ignore[assignment]
        writer.write(line)


class Silent(Lines):
    """Cannot tell its state if its client says so."""

    def state(self) -> bytes | None:
        if self.number > 1:
            raise RuntimeError("no state")
        return super().state()


class Broken(Lines):
    """Fails if a client has a state."""

    def __init__(self, client: Client) -> None:
        if client.state:
            raise RuntimeError("a state that cannot be used")
        super().__init__(client)

    def state(self) -> bytes | None:
        return b"poison" if self.number > 1 else b""


HANDLERS = (lines, paced, frames, whole, pushes, both, hangs, floods, counts)
HANDLERS += (closes, half_closes, tells, upgrades, named, strings)  # type: ignore[assignment]
PROTOCOLS: dict[str, Any] = {
    "protocol": Lines,
    "buffered": Buffered,
    "pairs": Pairs,
    "broken": Broken,
    "silent": Silent,
}


async def reload() -> None:
    """Fail the first time."""
    await asyncio.sleep(0)
    if not Path(GATE).exists():
        raise RuntimeError("no gate")
    say("reloaded")


async def main() -> None:
    service = Service("handlers")
    if NAME in PROTOCOLS:
        await serve_protocol(service, PROTOCOLS[NAME], reload=reload, grace=float(GRACE))
    else:
        handlers = {handler.__name__: handler for handler in HANDLERS}
        await serve(service, handlers[NAME], reload=reload, grace=float(GRACE))
    say("served")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    run: Callable[[Coroutine[Any, Any, None]], None] = import_module(LOOP).run
    run(main())

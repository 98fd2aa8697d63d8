"""asyncio at its fastest: a protocol, called back with whatever has arrived.

``asyncio_protocol.py PORT uvloop`` runs the same protocol on uvloop.
"""

import asyncio
import sys


class UpperProtocol(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.partial = bytearray()

    def data_received(self, data: bytes) -> None:
        complete, newline, partial = data.rpartition(b"\n")
        if newline:
            self.transport.write(self.partial.upper() + complete.upper() + newline)
            self.partial.clear()
        self.partial += partial

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


async def main() -> None:
    loop = asyncio.get_running_loop()
    port = int(sys.argv[1])
    server = await loop.create_server(UpperProtocol, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if sys.argv[2:] == ["uvloop"]:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())

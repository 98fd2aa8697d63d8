"""Keep the connections of an ASGI application open across restarts, with uvicorn.

    python3 kept_uvicorn.py PROGRAM MODULE:APPLICATION [HOST PORT]

HTTP clients that reuse their connections, such as the upstream pool of a reverse proxy, do not see
the restart. A connection between two requests is handed over with what has arrived of the next
request. A request in progress is received and answered first, and so are those that have been
pipelined behind it, for up to `grace` seconds altogether. WebSockets, HTTP upgrades and TLS are
left out, and so is uvicorn's parser in C, httptools, which does not tell what it holds of an
incomplete request.

uvicorn has no public interface for this. The example uses attributes that are not documented, so
it needs the version with which it is tested: uvicorn 0.54.0 with h11 0.16.0.

- `H11Protocol.conn` and `.cycle`, for whether a request is in progress;
- `Server.startup`, `.main_loop`, `.shutdown`, `.server_state` and `.lifespan`, because
  `Server.serve` handles signals and sockets itself.

Two things in uvicorn would make the example small and safe: a method of `Server` that returns the
protocol for an accepted connection, and one of the protocol that returns what it has received and
not handled, or None while it is busy.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from outlive import Client, Service
from outlive.aio import serve_protocol


class Protocol(H11Protocol):
    """An HTTP connection that can be handed over between two requests."""

    def __init__(self, client: Client, server: uvicorn.Server) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self._unread = client.state

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if self._unread:
            self.data_received(self._unread)

    def state(self) -> bytes | None:
        is_answered = self.cycle is None or self.cycle.response_complete
        if self.conn.our_state is h11.IDLE and is_answered:
            unread: bytes = self.conn.trailing_data[0]
            return unread
        return None


async def serve(service: Service, application: str, **options: Any) -> None:
    """Serve an application, as uvicorn.run does; `options` are those of uvicorn.Config."""
    config = uvicorn.Config(application, http=Protocol, ws="none", **options)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[])
    main = asyncio.create_task(server.main_loop())
    await serve_protocol(service, lambda client: Protocol(client, server))
    server.should_exit = True
    await main
    await server.shutdown()


if __name__ == "__main__":
    _, program, application, *listen = sys.argv
    address = (listen[0], int(listen[1])) if listen else None
    asyncio.run(serve(Service(program, listen=address), application, timeout_keep_alive=60))

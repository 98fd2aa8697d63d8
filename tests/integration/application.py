"""An ASGI application: it says what it was sent, after a while or at length if it is told so."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

LONG = 2**23
SLOW = 0.5  # seconds

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/gate":
        print("at the gate", file=sys.stderr, flush=True)
        while not Path(os.environ["GATE"]).exists():
            await asyncio.sleep(0.01)
    if scope["path"].startswith("/slow"):
        await asyncio.sleep(SLOW)
    answer = b"x" * LONG if scope["path"] == "/long" else b"%s %d" % (scope["raw_path"], sum(body))
    headers = [(b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer[:10], "more_body": True})
    await send({"type": "http.response.body", "body": answer[10:]})


async def lifespan(receive: Receive, send: Send) -> None:
    for event in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{event}"
        print(event, file=sys.stderr, flush=True)
        await send({"type": f"lifespan.{event}.complete"})

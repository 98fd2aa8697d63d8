#!/usr/bin/python3
"""Answers each line with its number and its bytes reversed. No connection ends at a restart.

It is one file, to be copied; counter.py therefore begins and ends in the same way.
"""

import asyncio
import logging
import sys
import tomllib
from pathlib import Path

from outlive import Service
from outlive.aio import Reader, Writer, serve


def parse(text: str) -> bytes:
    return str(tomllib.loads(text).get("prefix", "")).encode()


def check(path: str) -> str | None:
    """What is wrong with a configuration file."""
    try:
        parse(Path(path).read_text())
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    return None


async def main(path: str) -> None:
    service = Service("acounter", listen=("127.0.0.1", 7002))
    prefix = service.settings(path, parse)

    async def handle(reader: Reader, writer: Writer) -> None:
        number = int(writer.state or 0)
        while (line := await reader.readline()).endswith(b"\n"):
            number += 1
            writer.write(b"%s%d %s\n" % (prefix, number, line[-2::-1]))
            writer.state = b"%d" % number
            await writer.drain()

    def reload() -> None:
        nonlocal prefix
        prefix = service.settings(path, parse)

    await serve(service, handle, reload=reload)


if __name__ == "__main__":
    if sys.argv[2:] == ["--check"]:
        sys.exit(check(sys.argv[1]))
    logging.basicConfig(level="INFO", format="%(message)s")
    asyncio.run(main(sys.argv[1]))

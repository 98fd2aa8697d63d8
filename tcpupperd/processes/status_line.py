"""The status line, which `systemctl status` shows."""

from __future__ import annotations

from collections.abc import Sequence

from tcpupperd.words import counted

#: The maximum length in bytes. systemd reads 4096 bytes of a message (NOTIFY_BUFFER_MAX in its
#: source) and drops one that is longer.
LENGTH_MAX = 4096 - len("STATUS=")

ELLIPSIS = " ..."


def status_line(facts: Sequence[str], problems: Sequence[str]) -> str:
    """Facts, then problems, in one line. If it is too long, the longest fact is shortened; a
    problem is shortened only if the problems alone are too long."""
    longest = max(facts, key=len)
    excess = len(_joined(facts, problems)) - LENGTH_MAX
    if excess > 0:
        room = max(0, len(longest.encode()) - excess)
        facts = [_shortened(fact, room) if fact is longest else fact for fact in facts]
    return _shortened(_joined(facts, problems).decode(), LENGTH_MAX)


def connections(count: int, limit: int, waiting: int) -> str:
    """The number of open connections, of how many, and those in the accept queues."""
    facts = [f"{count} of {counted(limit, 'connection')}"]
    if count >= limit:
        facts.append("full")
    if waiting:
        facts.append(f"{waiting} waiting")
    return ", ".join(facts)


def _joined(facts: Sequence[str], problems: Sequence[str]) -> bytes:
    return "; ".join((*facts, *problems)).encode()


def _shortened(text: str, room: int) -> str:
    """The beginning of a text, if it takes more than `room` bytes."""
    encoded = text.encode()
    if len(encoded) <= room:
        return text
    return encoded[: max(0, room - len(ELLIPSIS))].decode(errors="ignore") + ELLIPSIS

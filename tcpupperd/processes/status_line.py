"""The status line, which `systemctl status` shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outlive import descriptors
from tcpupperd.host.tcp_info import queue_of
from tcpupperd.processes.capacity import capacity
from tcpupperd.processes.fleet import Fleet
from tcpupperd.processes.rollout import Rollout
from tcpupperd.processes.scoreboard import Scoreboard
from tcpupperd.processes.store import Store
from tcpupperd.serving.counters import LAST_RELOAD_FAILED
from tcpupperd.words import counted

#: The maximum length in bytes. systemd reads 4096 bytes of a message (NOTIFY_BUFFER_MAX in its
#: source) and drops one that is longer.
LENGTH_MAX = 4096 - len("STATUS=")

ELLIPSIS = " ..."


class Status:
    """The state of the daemon, as an administrator should know it."""

    def __init__(
        self, rollout: Rollout, fleet: Fleet, scoreboard: Scoreboard, store: Store
    ) -> None:
        self._rollout = rollout
        self._fleet = fleet
        self._scoreboard = scoreboard
        self._store = store

    def line(self, activity: str) -> str:
        """The line, which begins with what the daemon is doing."""
        totals = self._scoreboard.totals()
        facts = [
            activity,
            f"{counted(len(self._fleet), 'worker')}, {self._connections(totals['open'])}",
            f"{counted(totals['lines'], 'line')} answered",
        ]
        if died := self._scoreboard.deaths():
            facts.append(f"{counted(died, 'worker')} died")
        return status_line(facts, [*filter(None, self._problems())])

    def _connections(self, count: int) -> str:
        config, kept = self._rollout.generation.config, self._store.keeps
        limit = capacity(config, descriptors.limit(), kept=kept).accepted * config.worker_count
        waiting = sum(next(iter(queue_of(one.socket)), 0) for one in self._rollout.listeners)
        return connections(count, limit, waiting)

    def _problems(self) -> Iterator[str]:
        """What an administrator should do something about; an empty string is not a problem."""
        generation, source = self._rollout.generation, self._rollout.source
        if source.has_changed_on_disk(generation):
            yield f"{source.path} changed on disk; reload to apply it"
        failures = self._fleet.backoff.failures
        if failures and self._fleet.missing:
            yield f"a worker cannot be started ({counted(failures, 'attempt')})"
        yield self._store.problem
        if generation.problem:
            yield generation.problem
        elif self._scoreboard.daemon[LAST_RELOAD_FAILED]:
            yield "the last reload failed; see the log"


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

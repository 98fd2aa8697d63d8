"""``--reload``: asks a running daemon to reload, and waits for the outcome.

The kernel tells the supervisor who sent SIGHUP, and the supervisor answers with a signal. kill(1)
and shells also send SIGHUP and are answered too, but they ignore these signals by default.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal

from tcpupperd.errors import ExpectedError

log = logging.getLogger(__name__)

#: The outcomes of a reload.
COMPLETE, FAILED = signal.SIGURG, signal.SIGWINCH

#: Seconds between two checks whether the daemon has exited.
CHECK = 0.1

#: Checks before SIGHUP is sent again. The kernel keeps only one SIGHUP, from the first of several
#: senders, if the supervisor is busy.
CHECKS = 50

#: Times that SIGHUP is sent before the command gives up: longer than a reload can take.
ATTEMPTS = 15


class ReloadError(ExpectedError):
    """The daemon has not reloaded."""


class Requester:
    """The process that asked for the last reload, until it is told the outcome."""

    def __init__(self) -> None:
        self._pid = 0  # none, or one that cannot be told: the kernel

    def ask(self, pid: int) -> None:
        """A process asks for another reload, so the one before, if its workers are still exiting,
        is complete."""
        self.answer(COMPLETE)
        self._pid = pid

    def answer(self, outcome: signal.Signals) -> None:
        """Tell it the outcome, unless it belongs to another user."""
        pid, self._pid = self._pid, 0
        if pid > 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, outcome)


def reload(pid: int) -> None:
    """Have the daemon with this process ID reload. Raises ReloadError if it does not. If it exits
    meanwhile, the next process reads the configuration when it starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {COMPLETE, FAILED})
    try:
        become_owner(pid)
        outcome = ask(pid, os.pidfd_open(pid))
    except (ProcessLookupError, FileNotFoundError):
        outcome = None
    except PermissionError:
        raise ReloadError(
            f"cannot signal process {pid}, which belongs to another user; run this as root"
        ) from None
    if outcome == FAILED:
        raise ReloadError("the reload failed; see the log of the daemon")
    if outcome is None:
        log.info("there is no process %d; a new one reads the configuration when it starts", pid)


def become_owner(pid: int) -> None:
    """As root, become the user of a process: a daemon can answer only its own user."""
    if os.geteuid() == 0:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            [uid] = re.findall(r"^Uid:\t([0-9]+)", status.read(), re.MULTILINE)
        os.setresuid(int(uid), int(uid), int(uid))


def ask(pid: int, process: int) -> int | None:
    """Ask until there is an answer; None if the process has exited."""
    for _ in range(ATTEMPTS):
        os.kill(pid, signal.SIGHUP)
        for _ in range(CHECKS):
            received = signal.sigtimedwait({COMPLETE, FAILED}, CHECK)
            if received and received.si_pid == pid:
                return received.si_signo
            if select.select([process], [], [], 0)[0]:
                return None
    raise ReloadError(
        f"process {pid} did not answer within {ATTEMPTS * CHECKS * CHECK:g} s; is it tcpupperd?"
    )

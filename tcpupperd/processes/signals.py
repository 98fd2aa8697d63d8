"""Signals: which ones the supervisor fetches, and how a process ended."""

from __future__ import annotations

import math
import signal
from collections.abc import Set

#: Signals that the kernel sends for faults in the program itself. Blocking them would not stop the
#: kernel's, but would block those sent by a process, such as the watchdog's SIGABRT.
FAULTS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}

#: Job control signals keep their meaning, for a daemon that runs in a terminal.
JOB_CONTROL = {signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}

#: All other signals stay pending until the supervisor fetches them; no handler ever runs.
BLOCKED = signal.valid_signals() - FAULTS - JOB_CONTROL - {signal.SIGKILL, signal.SIGSTOP}


def block() -> None:
    """Block all signals that are to be fetched."""
    # With an inherited, ignored SIGCHLD, children would vanish before they can be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Never called, but the handler's existence tells systemd that SIGHUP means reload.
    signal.signal(signal.SIGHUP, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)


def fetch(timeout: float, *, but: Set[int] = frozenset()) -> int | None:
    """Wait up to `timeout` seconds for a blocked signal, `but` for those that are to stay pending;
    None if there is none."""
    if timeout == math.inf:
        return signal.sigwaitinfo(BLOCKED - but).si_signo
    received = signal.sigtimedwait(BLOCKED - but, max(0.0, timeout))
    return received.si_signo if received else None


def describe(status: int) -> str:
    """How a process ended, from the result of `os.waitstatus_to_exitcode`."""
    if status >= 0:
        return f"exited with status {status}"
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (out of memory?)"
    # Not signal.Signals: most real-time signals have no name.
    return f"was killed by signal {-status} ({signal.strsignal(-status)})"

"""Signals: which ones the supervisor fetches, and how a process ended."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
from collections.abc import Set

log = logging.getLogger(__name__)

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


#: The sender of a signal, in siginfo_t of sigaction(2), if it is the kernel.
SI_KERNEL = 128


class Signals:
    """The signals of this process, all of which are blocked, and fetched one by one.

    SIGHUP means reload to a daemon, but if it means that the terminal was closed, it is treated as
    SIGTERM: otherwise, a daemon in the foreground would keep serving unseen. The first such signal
    counts, because the shell and the kernel may both send one.
    """

    def __init__(self) -> None:
        """Block the signals."""
        # nohup(1) ignores the signal, so that the program outlives its terminal.
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._may_hang_up = has_terminal() and not ignored
        self._shell = os.getppid()
        self.sender = 0  # of the last signal fetched; 0 if the kernel sent it
        # With an inherited, ignored SIGCHLD, children would vanish before they can be waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Never called, but the handler's existence tells systemd that SIGHUP means reload.
        signal.signal(signal.SIGHUP, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)

    def fetch(self, timeout: float, *, but: Set[int] = frozenset()) -> int | None:
        """Wait up to `timeout` seconds for a blocked signal, ignoring those in `but`, which stay
        pending; return None if none arrives."""
        received = wait_for(BLOCKED - but, timeout)
        if not received:
            return None
        self.sender = received.si_pid
        if self._may_hang_up and self._is_hangup(received):
            self._may_hang_up = False
            log.warning("the terminal was closed; stopping")
            return signal.SIGTERM
        return received.si_signo

    def _is_hangup(self, received: signal.struct_siginfo) -> bool:
        """Whether a signal means that the terminal was closed. The shell that started the daemon
        also sends SIGHUP if a user types kill, but then, the terminal still exists."""
        if received.si_signo != signal.SIGHUP:
            return False
        by_shell = received.si_pid == self._shell and not has_terminal()
        return by_shell or received.si_code == SI_KERNEL


def block_aborts() -> None:
    """In a worker: outlive the SIGABRT that a service manager sends to all processes of a service
    if the supervisor hangs, to hand the connections over. abort(3) is not affected."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})


def fetch_abort(manager: int) -> None:
    """Die of a blocked SIGABRT, unless this process has sent it."""
    received = signal.sigtimedwait({signal.SIGABRT}, 0)
    if received and received.si_pid != manager:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGABRT})
        signal.raise_signal(signal.SIGABRT)


def wake_supervisor() -> None:
    """In a worker: have the supervisor, which waits only for signals, check its workers."""
    with contextlib.suppress(PermissionError):  # it has exited, and the parent is now process 1
        os.kill(os.getppid(), signal.SIGCHLD)


def wait_for(signals: Set[int], timeout: float) -> signal.struct_siginfo | None:
    """Wait up to `timeout` seconds, which may be infinite, for one of several signals."""
    if timeout == math.inf:
        return signal.sigwaitinfo(signals)
    return signal.sigtimedwait(signals, max(0.0, timeout))


def has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def describe(status: int) -> str:
    """How a process ended, from the result of `os.waitstatus_to_exitcode`."""
    if status >= 0:
        return f"exited with status {status}"
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL (out of memory?)"
    # Not signal.Signals: most real-time signals have no name.
    return f"was killed by signal {-status} ({signal.strsignal(-status)})"

"""``--daemonize``: detaches from the terminal, for init systems that expect this of daemons.

The process that the user started, the *launcher*, waits until the daemon reports the result of its
start, prints an error if there is one, and exits with the corresponding status. This makes
``tcpupperd --daemonize && tcpupper hello`` work, and a failed start does not go unnoticed
(daemon(7), "SysV Daemons", steps 14 and 15).

python-daemon (PEP 3143), version 2.3.2 or later, performs the other steps of that list. It is
given every option, because by default it would close the sockets, clear the umask, exit with
status 1 on SIGTERM and guess whether to detach at all. Its lock files are not used, because they
cannot tell a stale file from a live one.
"""

import contextlib
import fcntl
import grp
import os
import pwd
import resource
import signal
import stat
import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from outlive.descriptors import HasFileno
from tcpupperd.errors import ExpectedError

LONGEST_REPORT = 4096  # PIPE_BUF in pipe(7): a write of up to this size is atomic
MOST_DESCRIPTORS = 1 << 20  # Linux's default for fs.nr_open


class BackgroundError(ExpectedError):
    """The daemon cannot run in the background; the message tells the user why."""


class Owner(NamedTuple):
    """The user and groups of the daemon."""

    uid: int
    gid: int
    groups: list[int]  # supplementary


def require_no_service_manager(environ: Mapping[str, str]) -> None:
    """Raise BackgroundError if a service manager started this process.

    A service manager watches the process that it started, and only that process may use the
    descriptors and the notification socket: sd_notify(3), sd_listen_fds(3). A process in the
    background would lose all this.
    """
    if "NOTIFY_SOCKET" in environ:
        reason = f"NOTIFY_SOCKET={environ['NOTIFY_SOCKET']}"
    elif environ.get("LISTEN_PID") == str(os.getpid()):
        reason = f"LISTEN_PID={environ['LISTEN_PID']}"
    else:
        return
    raise BackgroundError(
        f"--daemonize: a service manager started this process ({reason} is set) and already runs "
        "it in the background; remove the option"
    )


def open_standard_streams() -> None:
    """Open the null device for each standard stream that is closed (``<&-``).

    Call this before anything else is opened. Otherwise, another file would get the stream's
    descriptor number and receive everything that is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    # python-daemon needs the stream objects, which Python sets to None for closed streams.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def find_owner(user: str | None, group: str | None) -> Owner:
    """Return the user and groups to run as; by default, the group is the user's own. Raise
    BackgroundError if the user or group does not exist."""
    if user is None:
        if group is not None:
            raise BackgroundError(f"--group {group} requires --user")
        return Owner(os.getuid(), os.getgid(), os.getgroups())
    if os.geteuid() != 0:
        raise BackgroundError(f"--user {user}: only root can change the user; remove the option")
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise BackgroundError(f"--user {user}: no such user") from None
    try:
        gid = account.pw_gid if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise BackgroundError(f"--group {group}: no such group") from None
    return Owner(account.pw_uid, gid, os.getgrouplist(user, gid))


class PidFile:
    """A file with the daemon's process ID, locked with flock(2) while the daemon runs.

    The lock, not the ID, shows that the daemon is running: the kernel releases the lock however
    the daemon ends. A file that was left behind is therefore reused, even if another process now
    has the same ID. Workers inherit the lock and hold it until the last of them has exited.
    """

    def __init__(self, path: str) -> None:
        """Lock ``path``; raise BackgroundError if it is locked, inaccessible or not a pid file."""
        self.path = os.path.abspath(path)  # the daemon changes its working directory
        self.owner = os.getpid()
        self.descriptor = self._open_locked()
        while not self._is_at_path():  # its last owner removed it before it was locked here
            os.close(self.descriptor)
            self.descriptor = self._open_locked()
        os.ftruncate(self.descriptor, 0)
        os.fchmod(self.descriptor, 0o644)  # anyone may read it, whatever the umask

    def _open_locked(self) -> int:
        # O_NOFOLLOW: another user may have put a link there, to a file that only root can write.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            raise self._error(error.strerror) from error
        try:
            self._require_pid_file(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = read_text(descriptor) or "(just starting)"
            os.close(descriptor)
            raise self._error(
                f"tcpupperd is already running as process {holder}; stop it first or specify"
                " another file"
            ) from None
        except BackgroundError:
            os.close(descriptor)
            raise
        return descriptor

    def _require_pid_file(self, descriptor: int) -> None:
        """Prevent a mistyped path from truncating and removing some other file."""
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_file or not (read_text(descriptor) or "0").isdecimal():
            raise self._error("exists, but is not a pid file; use another path with --pid-file")

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _error(self, reason: str | None) -> BackgroundError:
        return BackgroundError(f"--pid-file {self.path}: {reason}")

    def write(self) -> None:
        """Write the ID of this process, which becomes responsible for removing the file."""
        self.owner = os.getpid()
        os.pwrite(self.descriptor, b"%d\n" % self.owner, 0)

    def remove(self) -> None:
        """Remove the file if this process is its owner, not a fork of it, and if the path does not
        lead to another file by now."""
        if self.owner != os.getpid():
            return
        # Truncated first: after a change of user, the daemon may not be allowed to remove it.
        os.ftruncate(self.descriptor, 0)
        with contextlib.suppress(OSError):
            if self._is_at_path():
                os.unlink(self.path)
        os.close(self.descriptor)


def read_text(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip()


class Background:
    """The steps into the background: checks that can fail, then ``detach``, then ``ready``.

    As a context manager, it removes the pid file in the daemon's process and reports unexpected
    errors to the launcher.
    """

    def __init__(self, pid_file: str | None, user: str | None, group: str | None) -> None:
        """Check and lock; raise BackgroundError while the user can still see the message."""
        self.owner = find_owner(user, group)
        self.daemon_context = import_daemon_context()
        self.pid_file = None if pid_file is None else PidFile(pid_file)
        self.launcher: int | None = None  # the pipe to the launcher, while the launcher waits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.failed(1, f"internal error; please report this bug: {error!r}")
        if self.pid_file is not None:
            self.pid_file.remove()

    def detach(self, preserve: Iterable[int | HasFileno]) -> None:
        """Continue as the daemon, with only the descriptors in ``preserve``; never fails.

        From here on, standard input, output and error are the null device; otherwise, workers
        forked before ``ready`` would keep the terminal. ``failed`` passes on messages for the
        user.
        """
        reading, self.launcher = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() > 0:
            os.close(self.launcher)
            relay_report(reading)
        os.close(reading)
        try:
            self._open_context([*preserve, self.launcher])
        except OSError as error:  # the base class of all of python-daemon's errors
            self.failed(1, f"--daemonize: {error}")
            os._exit(1)
        if self.pid_file is not None:
            self.pid_file.write()

    def _open_context(self, preserve: list[int | HasFileno]) -> None:
        if self.pid_file is not None:
            preserve.append(self.pid_file.descriptor)
        if self.owner.uid != os.getuid():
            # The initgroups option is not used, because it does not set the primary group: the
            # daemon would stay in the group root.
            os.setgroups(self.owner.groups)
        # Given None, DaemonContext would open the null device once per stream and never close it.
        with open(os.devnull, "r+b", buffering=0) as null:
            self.daemon_context(
                chroot_directory=None,
                working_directory="/",
                umask=0o077,
                uid=self.owner.uid,
                gid=self.owner.gid,
                initgroups=False,
                prevent_core=False,  # whether to dump core is the administrator's choice
                detach_process=True,
                files_preserve=preserve,
                pidfile=None,
                stdin=null,
                stdout=null,
                stderr=null,
                signal_map={},  # the supervisor waits for signals; none has a handler
            ).open()

    def ready(self) -> None:
        """Let the launcher exit with status 0."""
        self._report(0, "")

    def failed(self, status: int, message: str) -> None:
        """Let the launcher print ``message`` and exit with ``status``; only before ``ready``."""
        self._report(status, message)

    def _report(self, status: int, message: str) -> None:
        if self.launcher is None:
            return
        report = bytes([status]) + message.encode(errors="replace")
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C ended the launcher
            os.write(self.launcher, report[:LONGEST_REPORT])
        os.close(self.launcher)
        self.launcher = None


def relay_report(reading: int) -> NoReturn:
    """Act as the launcher: wait for the daemon's report, print it and exit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    report = os.read(reading, LONGEST_REPORT) or b"\1the daemon exited before it was ready"
    if report[1:]:
        with contextlib.suppress(OSError):  # the terminal has been closed or the disk is full
            os.write(2, b"tcpupperd: " + report[1:] + b"\n")
    os._exit(report[0])  # without cleanup: the pid file and everything else belong to the daemon


def import_daemon_context() -> Any:
    """Return the class of python-daemon; raise BackgroundError if it is not available.

    It is imported only here, because versions before 3 build a set of all possible descriptors on
    import: 30 MiB with the usual hard limit of 524288, and more memory than any machine has with
    the limit of 10**9 found in some containers.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        import importlib.metadata

        version = importlib.metadata.version("python-daemon")
        if limit > MOST_DESCRIPTORS and int(version.split(".")[0]) < 3:
            raise BackgroundError(
                f"--daemonize: python-daemon {version} cannot cope with a limit of {limit} open "
                f"files; lower it first with 'ulimit -Hn {MOST_DESCRIPTORS}', or install version 3"
            )
        from daemon import DaemonContext
    except ImportError:
        raise BackgroundError(
            "--daemonize: python-daemon is not installed (Debian package python3-daemon)"
        ) from None
    return DaemonContext

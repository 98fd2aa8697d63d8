"""``--daemonize``: leaving the terminal, on hosts whose init system expects daemons to do so.

The process that the user started, the *launcher*, stays until the daemon tells how its start went,
repeats that on the terminal and exits accordingly: ``tcpupperd --daemonize && tcpupper hello``
works, and a failed start is seen (daemon(7), "SysV Daemons", steps 14 and 15).

The rest of that list is python-daemon's (PEP 3143), any version from 2.3.2 on. It is given every
option, because its defaults close the sockets, empty the umask, exit with status 1 on SIGTERM and
guess whether to detach at all. Its lock files are not used: they take a stale one for a live one.
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

from tcpupperd.errors import ExpectedError
from tcpupperd.host.descriptors import HasFileno

LONGEST_REPORT = 4096  # PIPE_BUF, pipe(7): the kernel keeps so much in one piece
MOST_DESCRIPTORS = 1 << 20  # Linux's default for fs.nr_open


class BackgroundError(ExpectedError):
    """Why the daemon cannot go to the background, for the user who asked for it."""


class Owner(NamedTuple):
    """Whom the daemon runs as."""

    uid: int
    gid: int
    groups: list[int]  # supplementary


def refuse_under_service_manager(environ: Mapping[str, str]) -> None:
    """Raise BackgroundError if a service manager started this process.

    It watches the process that it started, and has given it descriptors and a notification socket
    for its own use: sd_notify(3), sd_listen_fds(3). All that is lost by going to the background.
    """
    if "NOTIFY_SOCKET" in environ:
        reason = f"NOTIFY_SOCKET={environ['NOTIFY_SOCKET']}"
    elif environ.get("LISTEN_PID") == str(os.getpid()):
        reason = f"LISTEN_PID={environ['LISTEN_PID']}"
    else:
        return
    raise BackgroundError(
        f"--daemonize: a service manager started this process ({reason} is set) and itself keeps "
        "it in the background; leave the option out"
    )


def open_standard_streams() -> None:
    """Open the null device for each standard stream that is closed (``<&-``).

    To be called before anything else is opened, which would otherwise get the stream's number, and
    with it everything that is printed.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    # python-daemon asks the stream objects for their numbers; Python has none for a closed stream.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def find_owner(user: str | None, group: str | None) -> Owner:
    """Return whom to run as; the group is the user's own if None. Raise BackgroundError."""
    if user is None:
        if group is not None:
            raise BackgroundError(f"--group {group}: only together with --user")
        return Owner(os.getuid(), os.getgid(), os.getgroups())
    if os.geteuid() != 0:
        raise BackgroundError(
            f"--user {user}: only root can change the user; leave the option out"
        )
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise BackgroundError(f"--user {user}: there is no such user") from None
    try:
        gid = account.pw_gid if group is None else grp.getgrnam(group).gr_gid
    except KeyError:
        raise BackgroundError(f"--group {group}: there is no such group") from None
    return Owner(account.pw_uid, gid, os.getgrouplist(user, gid))


class PidFile:
    """A file with the daemon's process number, locked with flock(2) for as long as it runs.

    The lock, not the number, says that it runs: the kernel lifts it however the daemon ends. So a
    file left behind is taken over, and a number that another process has got meanwhile does no
    harm. Workers inherit the lock, and so hold it until the last of them is gone.
    """

    def __init__(self, path: str) -> None:
        """Lock ``path``; raise BackgroundError if it is held, inaccessible or no pid file."""
        self.path = os.path.abspath(path)  # the daemon changes its working directory
        self.owner = os.getpid()
        self.descriptor = self._open_locked()
        while not self._is_at_path():  # its last owner removed it before we had the lock
            os.close(self.descriptor)
            self.descriptor = self._open_locked()
        os.ftruncate(self.descriptor, 0)
        os.fchmod(self.descriptor, 0o644)  # whatever the umask: anybody may ask who runs

    def _open_locked(self) -> int:
        # O_NOFOLLOW: others may have put a link there, to a file that only root can write.
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
                f"tcpupperd already runs as process {holder}; stop it first or name another file"
            ) from None
        except BackgroundError:
            os.close(descriptor)
            raise
        return descriptor

    def _require_pid_file(self, descriptor: int) -> None:
        """Keep a mistyped path from emptying and removing somebody's file."""
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not is_file or not (read_text(descriptor) or "0").isdecimal():
            raise self._error("is there, but is no pid file; name another")

    def _is_at_path(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def _error(self, reason: str | None) -> BackgroundError:
        return BackgroundError(f"--pid-file {self.path}: {reason}")

    def write(self) -> None:
        """Write the number of this process, which from now on is the one that removes the file."""
        self.owner = os.getpid()
        os.pwrite(self.descriptor, b"%d\n" % self.owner, 0)

    def remove(self) -> None:
        """Remove the file if this process is its owner, not a fork of it."""
        if self.owner != os.getpid():
            return
        # Emptied first: after a change of user its directory may not let us remove it.
        os.ftruncate(self.descriptor, 0)
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        os.close(self.descriptor)


def read_text(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode(errors="replace").strip()


class Background:
    """The way to the background: what can go wrong first, then ``detach``, then ``ready``.

    As a context manager it removes the pid file in the process that the daemon became, and tells
    the launcher of an error that nobody expected.
    """

    def __init__(self, pid_file: str | None, user: str | None, group: str | None) -> None:
        """Check and lock; raise BackgroundError while the user is still there to read it."""
        self.owner = find_owner(user, group)
        self.daemon_context = import_daemon_context()
        self.pid_file = None if pid_file is None else PidFile(pid_file)
        self.launcher: int | None = None  # the pipe to it, while it waits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.failed(1, f"bug, please report it: {error!r}")
        if self.pid_file is not None:
            self.pid_file.remove()

    def detach(self, preserve: Iterable[int | HasFileno]) -> None:
        """Go on as the daemon, with the ``preserve``d descriptors and no other; never fails.

        Standard input, output and error are the null device from here on: workers forked before
        ``ready`` would keep the terminal otherwise. What is to be said there goes to ``failed``.
        """
        reading, self.launcher = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        if os.fork() > 0:
            os.close(self.launcher)
            repeat_report(reading)
        os.close(reading)
        try:
            self._open_context([*preserve, self.launcher])
        except OSError as error:  # all of python-daemon's errors are of this kind
            self.failed(1, f"--daemonize: {error}")
            os._exit(1)
        if self.pid_file is not None:
            self.pid_file.write()

    def _open_context(self, preserve: list[int | HasFileno]) -> None:
        if self.pid_file is not None:
            preserve.append(self.pid_file.descriptor)
        if self.owner.uid != os.getuid():
            # Not by its own initgroups option, which forgets to set the group itself: the daemon
            # would stay in group root.
            os.setgroups(self.owner.groups)
        # Given None, it would open the null device once a stream and never close it.
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
        """Let the launcher print ``message`` and exit with ``status``; nothing after ``ready``."""
        self._report(status, message)

    def _report(self, status: int, message: str) -> None:
        if self.launcher is None:
            return
        report = bytes([status]) + message.encode(errors="replace")
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C ended the launcher; nobody waits
            os.write(self.launcher, report[:LONGEST_REPORT])
        os.close(self.launcher)
        self.launcher = None


def repeat_report(reading: int) -> NoReturn:
    """Be the launcher: wait for the daemon's report, print it and exit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    report = os.read(reading, LONGEST_REPORT) or b"\1the daemon ended before it was ready"
    if report[1:]:
        os.write(2, b"tcpupperd: " + report[1:] + b"\n")
    os._exit(report[0])  # without clean-up: the pid file and all else is the daemon's now


def import_daemon_context() -> Any:
    """Return python-daemon's class; raise BackgroundError if it cannot be had.

    Imported only here, because versions before 3 build a set of all possible descriptors at
    import: 30 MiB at the usual hard limit of 524288, and more than any machine has at the 10**9
    of some containers.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        import importlib.metadata

        version = importlib.metadata.version("python-daemon")
        if limit > MOST_DESCRIPTORS and int(version.split(".")[0]) < 3:
            raise BackgroundError(
                f"--daemonize: python-daemon {version} cannot cope with a limit of {limit} open "
                f"files; set it with 'ulimit -Hn {MOST_DESCRIPTORS}' first, or install version 3"
            )
        from daemon import DaemonContext
    except ImportError:
        raise BackgroundError(
            "--daemonize: python-daemon is not installed (Debian package python3-daemon)"
        ) from None
    return DaemonContext

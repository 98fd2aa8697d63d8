"""Going to the background: real launchers and daemons, with each version of python-daemon at hand.

The daemon here is a small program that does over its preserved socket what the test tells it.
"""

import contextlib
import ctypes
import fcntl
import grp
import json
import os
import pwd
import resource
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpupperd.host import background

ROOT = Path(__file__).parents[2]
DEADLINE = 30.0  # seconds; every wait is bounded by it, none is expected to take so long
PIPE = subprocess.PIPE

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user")

PROGRAM = """
import json, os, resource, signal, socket, sys
from tcpupperd.host import background

def describe():
    links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{fd}")}
    umask = os.umask(0)
    os.umask(umask)
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
        has_terminal = True
    except OSError:
        has_terminal = False
    return {
        "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0),
        "directory": os.getcwd(), "umask": umask, "user": os.getresuid(),
        "group": os.getresgid(), "groups": sorted(os.getgroups()), "files": links,
        "core": resource.getrlimit(resource.RLIMIT_CORE), "terminal": has_terminal,
        "terminates_by_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }

def obey(command, daemon):
    match command:
        case "ready":
            daemon.ready()
        case "fail":
            daemon.failed(78, "cannot serve: no reason given")
            sys.exit(78)
        case "stumble":
            raise ZeroDivisionError("no answer")
        case "die":
            os._exit(9)
        case "stop":
            sys.exit()
        case "let a fork end":
            if os.fork() == 0:
                sys.exit()
            os.wait()
        case "leave a worker":
            if os.fork() == 0:  # until the test closes its connection
                connection.recv(1, socket.MSG_PEEK)
                os._exit(0)
    return describe()

background.open_standard_streams()
pid_file, user, group = json.loads(sys.argv[1])
try:
    with background.Background(pid_file, user, group) as daemon:
        listener = socket.create_server(("127.0.0.1", 0))
        stray = open("/dev/zero")
        print(listener.getsockname()[1], flush=True)
        daemon.detach([listener])
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                for line in lines:
                    print(json.dumps(obey(line.strip(), daemon)), file=lines, flush=True)
except background.BackgroundError as error:
    print(f"tcpupperd: {error}", file=sys.stderr)
    sys.exit(1)
"""


def daemon_versions() -> dict[str, str]:
    """Return an interpreter for each version of python-daemon that is installed."""
    ask = "import daemon, importlib.metadata as m; print(m.version('python-daemon'))"
    found: dict[str, str] = {}
    for python in (sys.executable, "/usr/bin/python3"):
        with contextlib.suppress(FileNotFoundError):
            asked = subprocess.run(
                [python, "-c", ask], capture_output=True, text=True, check=False
            )
            if asked.returncode == 0:
                found.setdefault(asked.stdout.strip(), python)
    return found


VERSIONS = daemon_versions()


@pytest.fixture(params=list(VERSIONS.values()), ids=list(VERSIONS))
def python(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Daemon:
    """The connection to a daemon; each command is answered by its description of itself."""

    def __init__(self, port: int) -> None:
        self.connection = socket.create_connection(("127.0.0.1", port), DEADLINE)
        self.answers = self.connection.makefile("r")
        self.state = self.tell("describe")
        self.pidfd = os.pidfd_open(self.state["pid"])

    def tell(self, command: str) -> dict[str, Any]:
        self.connection.sendall(command.encode() + b"\n")
        answer = self.answers.readline()
        return dict(json.loads(answer)) if answer else {}

    def wait(self) -> None:
        """Wait until the process has ended."""
        assert select.select([self.pidfd], [], [], DEADLINE)[0]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        self.kill()
        os.close(self.pidfd)
        self.answers.close()
        self.connection.close()


class Launch:
    """A launcher on a terminal of its own, and its daemon when it got so far."""

    def __init__(
        self,
        python: str,
        pid_file: Path | None = None,
        user: str | None = None,
        group: str | None = None,
        redirections: str = "",
    ) -> None:
        arguments = json.dumps([pid_file and str(pid_file), user, group])
        self.terminal, its_side = os.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(its_side, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {redirections}', "sh", python, "-c", PROGRAM, arguments],
            cwd=ROOT,
            stdin=its_side,
            stdout=PIPE,
            stderr=PIPE,
            text=True,
            preexec_fn=take_terminal,  # noqa: PLW1509  (no thread runs here)
        )
        os.close(its_side)
        assert self.process.stdout is not None
        port = self.process.stdout.readline()
        self.daemon = Daemon(int(port)) if port else None

    def end(self) -> tuple[int, str]:
        """Return the launcher's exit status and its messages, once nobody can write more."""
        _, messages = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, messages

    def close(self) -> None:
        if self.daemon is not None:
            self.daemon.close()
        self.process.kill()
        self.process.communicate()
        os.close(self.terminal)


@contextlib.contextmanager
def launched(*arguments: Any, **options: Any) -> Iterator[Launch]:
    launch = Launch(*arguments, **options)
    try:
        yield launch
    finally:
        launch.close()


@contextlib.contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Daemon]:
    """Launch a daemon and let it say that it is ready."""
    with launched(*arguments, **options) as launch:
        assert launch.daemon is not None, launch.end()
        launch.daemon.tell("ready")
        assert launch.end() == (0, "")
        yield launch.daemon


def refusal(*arguments: Any, **options: Any) -> str:
    """Return the message of a launcher that did not start a daemon."""
    with launched(*arguments, **options) as launch:
        assert launch.daemon is None
        status, message = launch.end()
    assert status == 1
    assert message.startswith("tcpupperd: ")
    assert message.count("\n") == 1
    return message


def test_both_supported_versions_are_tested_where_they_can_be_had() -> None:
    assert VERSIONS, "python-daemon is not installed"


# What the daemon is


def test_daemon_has_left_terminal_session_directory_and_files(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        state = launch.daemon.state
        launcher = launch.process.pid
    assert not state["terminal"]
    assert state["session"] not in (launcher, state["pid"])  # so it cannot get another terminal
    assert (state["directory"], state["umask"]) == ("/", 0o077)
    assert [state["files"][stream] for stream in "012"] == ["/dev/null"] * 3
    others = sorted(target.split(":")[0] for fd, target in state["files"].items() if int(fd) > 2)
    assert others == ["pipe", "socket", "socket"]  # to the launcher, the listener, and to us


def test_daemon_keeps_no_way_to_the_launcher_once_ready(python: str) -> None:
    with running(python) as daemon:
        files = daemon.tell("describe")["files"].values()
    assert not [target for target in files if target.startswith("pipe:")]


def test_daemon_keeps_user_core_limit_and_signals(python: str) -> None:
    with running(python) as daemon:
        assert daemon.state["user"] == list(os.getresuid())
        assert daemon.state["group"] == list(os.getresgid())
        assert daemon.state["groups"] == sorted(os.getgroups())
        assert daemon.state["core"] == list(resource.getrlimit(resource.RLIMIT_CORE))
        assert daemon.state["terminates_by_default"]


def test_standard_streams_may_be_closed(python: str) -> None:
    with running(python, redirections="<&-") as daemon:
        assert [daemon.state["files"][stream] for stream in "012"] == ["/dev/null"] * 3


def test_open_standard_streams_takes_each_closed_number() -> None:
    program = (
        "import os; from tcpupperd.host.background import open_standard_streams as fill; fill();"
        "os.write(9, ' '.join(os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)).encode());"
        "import sys; print('nobody reads this'); sys.stderr.write('nor this'); sys.stdin.read()"
    )
    shell = 'exec 9>&1; exec "$@" <&- >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "/dev/null /dev/null /dev/null"


# What the launcher says


def test_launcher_waits_until_the_daemon_is_ready(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        with pytest.raises(subprocess.TimeoutExpired):
            launch.process.wait(0.3)
        launch.daemon.tell("ready")
        assert launch.end() == (0, "")


def test_workers_forked_before_the_daemon_is_ready_hold_nothing_of_the_terminal(
    python: str,
) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.daemon.tell("leave a worker")
        launch.daemon.tell("ready")
        assert launch.end() == (0, "")  # the pipes of its output have come to their end


def test_failed_start_reaches_the_terminal(python: str, tmp_path: Path) -> None:
    with launched(python, tmp_path / "pid") as launch:
        assert launch.daemon is not None
        launch.daemon.tell("fail")
        assert launch.end() == (78, "tcpupperd: cannot serve: no reason given\n")
        launch.daemon.wait()
    assert not (tmp_path / "pid").exists()


def test_death_before_ready_is_a_failed_start(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.daemon.tell("die")
        assert launch.end() == (1, "tcpupperd: the daemon ended before it was ready\n")


def test_unexpected_error_reaches_the_terminal(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.daemon.tell("stumble")
        message = "tcpupperd: bug, please report it: ZeroDivisionError('no answer')\n"
        assert launch.end() == (1, message)


def test_failure_after_ready_is_not_the_launchers(python: str) -> None:
    with running(python) as daemon:
        daemon.tell("fail")
        daemon.wait()


def test_interrupted_launcher_leaves_the_daemon_alone(python: str) -> None:
    with launched(python) as launch:
        assert launch.daemon is not None
        launch.process.send_signal(signal.SIGINT)
        assert launch.end() == (-signal.SIGINT, "")
        assert launch.daemon.tell("ready")["pid"] == launch.daemon.state["pid"]


# The pid file


def test_pid_file_names_the_daemon_while_it_runs(python: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with running(python, pid_file) as daemon:
        assert pid_file.read_text() == f"{daemon.state['pid']}\n"
        assert pid_file.stat().st_mode & 0o7777 == 0o644
        daemon.tell("stop")
        daemon.wait()
    assert not pid_file.exists()


def test_pid_file_with_relative_path(python: str) -> None:
    name = Path(f"test-{os.getpid()}.pid")
    with running(python, name) as daemon:
        assert (ROOT / name).exists()
        daemon.tell("stop")
        daemon.wait()
    assert not (ROOT / name).exists()


def test_pid_file_stays_when_a_fork_of_the_daemon_ends(python: str, tmp_path: Path) -> None:
    with running(python, tmp_path / "pid") as daemon:
        daemon.tell("let a fork end")
        assert (tmp_path / "pid").read_text() == f"{daemon.state['pid']}\n"


def test_pid_file_left_behind_is_taken_over(python: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with running(python, pid_file) as daemon:
        left_behind = daemon.state["pid"]
    assert pid_file.read_text() == f"{left_behind}\n"
    with running(python, pid_file) as daemon:
        assert pid_file.read_text() == f"{daemon.state['pid']}\n"


def test_number_of_another_process_in_the_pid_file_does_not_matter(
    python: str, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    pid_file.write_text(f"{os.getpid()}\n")
    with running(python, pid_file) as daemon:
        assert pid_file.read_text() == f"{daemon.state['pid']}\n"


def test_second_instance_is_refused(python: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with running(python, pid_file) as daemon:
        pid = daemon.state["pid"]
        assert refusal(python, pid_file) == (
            f"tcpupperd: --pid-file {pid_file}: tcpupperd already runs as process {pid}; "
            "stop it first or name another file\n"
        )
        assert pid_file.read_text() == f"{pid}\n"


def test_second_instance_is_refused_while_the_first_starts(python: str, tmp_path: Path) -> None:
    with launched(python, tmp_path / "pid") as launch:
        assert launch.daemon is not None
        assert f" already runs as process {launch.daemon.state['pid']};" in refusal(
            python, tmp_path / "pid"
        )


def test_workers_that_outlive_the_daemon_hold_the_lock(python: str, tmp_path: Path) -> None:
    with running(python, tmp_path / "pid") as daemon:
        daemon.tell("leave a worker")
        daemon.kill()
        assert " already runs " in refusal(python, tmp_path / "pid")


def test_file_that_is_no_pid_file_is_left_alone(python: str, tmp_path: Path) -> None:
    precious = tmp_path / "letters"
    precious.write_text("Dear Ada,\n")
    assert "letters: exists, but is not a pid file;" in refusal(python, precious)
    assert precious.read_text() == "Dear Ada,\n"


def test_link_in_place_of_the_pid_file_is_not_followed(python: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert "link: Too many levels of symbolic links" in refusal(python, tmp_path / "link")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/dev/null", "exists, but is not a pid file"),
        ("/nonexistent/pid", "No such file or directory"),
        ("/", "Is a directory"),
    ],
)
def test_path_where_no_pid_file_can_be(path: str, reason: str) -> None:
    with pytest.raises(background.BackgroundError, match=f"^--pid-file {path}: {reason}"):
        background.PidFile(path)


# The user


@needs_root
def test_user_and_groups_are_switched(python: str) -> None:
    account = pwd.getpwnam("nobody")
    with running(python, user="nobody") as daemon:
        assert daemon.state["user"] == [account.pw_uid] * 3
        assert daemon.state["group"] == [account.pw_gid] * 3
        groups = os.getgrouplist("nobody", account.pw_gid)
        assert daemon.state["groups"] == sorted(groups)


@needs_root
def test_group_may_differ_from_the_users_own(python: str) -> None:
    group = grp.getgrnam("daemon").gr_gid
    with running(python, user="nobody", group="daemon") as daemon:
        assert daemon.state["group"] == [group] * 3
        assert daemon.state["groups"] == [group]


@needs_root
def test_pid_file_is_emptied_where_the_user_cannot_remove_it(python: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with running(python, pid_file, user="nobody") as daemon:
        assert pid_file.read_text() == f"{daemon.state['pid']}\n"
        assert pid_file.stat().st_uid == 0  # what a user could write, root must not trust
        daemon.tell("stop")
        daemon.wait()
    assert pid_file.read_text() == ""
    with running(python, pid_file, user="nobody") as daemon:
        assert pid_file.read_text() == f"{daemon.state['pid']}\n"


@needs_root
@pytest.mark.parametrize(
    ("user", "group", "reason"),
    [
        ("no-such-user", None, "--user no-such-user: there is no such user"),
        ("nobody", "no-such-group", "--group no-such-group: there is no such group"),
    ],
)
def test_unknown_user_or_group(user: str, group: str | None, reason: str) -> None:
    with pytest.raises(background.BackgroundError, match=f"^{reason}$"):
        background.find_owner(user, group)


def test_group_alone_is_refused() -> None:
    with pytest.raises(background.BackgroundError, match=r"^--group daemon: .* with --user$"):
        background.find_owner(None, "daemon")


def test_only_root_can_change_the_user() -> None:
    program = (
        "import os; from tcpupperd.host import background\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "background.find_owner('root', None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "BackgroundError: --user root: only root can change the user" in done.stderr


# Service managers


@pytest.mark.parametrize(
    "environ", [{"NOTIFY_SOCKET": "/run/notify"}, {"LISTEN_PID": str(os.getpid())}]
)
def test_refused_under_a_service_manager(environ: dict[str, str]) -> None:
    with pytest.raises(background.BackgroundError, match=r"^--daemonize: a service manager"):
        background.refuse_under_service_manager(environ)


@pytest.mark.parametrize("environ", [{}, {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1"}])
def test_variables_for_another_process_do_not_matter(environ: dict[str, str]) -> None:
    background.refuse_under_service_manager(environ)


# The whole of it


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Be the parent that daemons get when their launcher is gone: their exit status is seen."""
    pr_set_child_subreaper = 36  # prctl(2)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(pr_set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(pr_set_child_subreaper, 0, 0, 0, 0)


def command(python: str, *arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Run tcpupperd or tcpupper; return its status and what it printed."""
    done = subprocess.run(
        [python, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def tcpupperd(python: str, directory: Path, *options: str) -> Iterator[int]:
    """Run the daemon in the background, at ``directory``/socket; yield its process number."""
    arguments = ["--daemonize", "--pid-file", "pid", "--listen", str(directory / "socket")]
    with adopting_orphans():
        assert command(python, "tcpupperd", *arguments, *options, cwd=directory) == (0, "")
        pid = int((directory / "pid").read_text())
        pidfd = os.pidfd_open(pid)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            os.close(pidfd)


def ask(python: str, directory: Path, *text: str) -> tuple[int, str]:
    return command(python, "tcpupperd.client", "--unix", str(directory / "socket"), *text)


def test_tcpupperd_serves_when_its_launcher_ends_and_stops_with_status_0(
    python: str, tmp_path: Path
) -> None:
    with tcpupperd(python, tmp_path) as pid:
        assert ask(python, tmp_path, "hello") == (0, "HELLO\n")
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not (tmp_path / "pid").exists()


def test_second_tcpupperd_is_refused(python: str, tmp_path: Path) -> None:
    with tcpupperd(python, tmp_path) as pid:
        arguments = ["tcpupperd", "--daemonize", "--pid-file", str(tmp_path / "pid")]
        status, message = command(python, *arguments)
        assert status == 1
        assert f"tcpupperd already runs as process {pid};" in message
        assert ask(python, tmp_path, "hello") == (0, "HELLO\n")


def test_tcpupperd_that_cannot_listen_says_so_on_the_terminal(python: str, tmp_path: Path) -> None:
    with tcpupperd(python, tmp_path):
        arguments = ["tcpupperd", "--daemonize", "--listen", str(tmp_path / "socket")]
        status, message = command(python, *arguments)
    assert status == 71
    assert f"cannot listen on {tmp_path / 'socket'}: Address already in use" in message


@needs_root
def test_tcpupperd_serves_as_another_user(python: str, tmp_path: Path) -> None:
    probe = "import os; os.setuid(65534); import tcpupperd.cli"
    readable = subprocess.run([python, "-c", probe], cwd=ROOT, capture_output=True, check=False)
    if readable.returncode != 0:
        pytest.skip("Python or this checkout is where other users cannot read it")
    with tcpupperd(python, tmp_path, "--user", "nobody") as pid:
        assert os.stat(f"/proc/{pid}").st_uid == pwd.getpwnam("nobody").pw_uid
        assert ask(python, tmp_path, "hello") == (0, "HELLO\n")


def test_tcpupperd_finds_its_configuration_again(python: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("lines_per_connection = 1\n")
    two_lines = "one\ntwo"
    with tcpupperd(python, tmp_path, "--config", file.name) as pid:
        assert ask(python, tmp_path, two_lines)[0] == 1
        file.write_text("lines_per_connection = 2\n")
        os.kill(pid, signal.SIGHUP)
        deadline = time.monotonic() + DEADLINE
        while ask(python, tmp_path, two_lines)[0] != 0:
            assert time.monotonic() < deadline, "not reloaded"


def test_tcpupperd_refuses_to_daemonize_with_sockets_that_were_passed_in(
    python: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        shell = 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&"$0"'
        arguments = ["-m", "tcpupperd", "--daemonize", "--pid-file", str(tmp_path / "pid")]
        done = subprocess.run(
            ["bash", "-c", shell, str(listener.fileno()), python, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
            pass_fds=[listener.fileno()],
        )
    if done.returncode == 0:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert done.returncode == 1
    assert "--daemonize: a service manager started this process (LISTEN_PID=" in done.stderr

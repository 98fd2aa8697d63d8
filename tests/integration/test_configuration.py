"""The command line and the configuration file, and the exit statuses they lead to."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from integration.client import OWN
from integration.daemon import COMMAND, ROOT, Daemon
from tcpupperd import __version__
from tcpupperd.cli import parse
from tcpupperd.config import SETTINGS
from tcpupperd.serving import fast_path
from waiting import DEADLINE, until


def run(*options: str) -> tuple[int, str, str]:
    """The exit status of the command, and what it writes to standard output and error."""
    done = subprocess.run(
        [*COMMAND, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_version() -> None:
    said = f"tcpupperd {__version__}, {fast_path.implementation}\n"
    assert run("--version") == (0, said, "")


def test_help_names_every_option() -> None:
    status, text, errors = run("--help")
    assert (status, errors) == (0, "")
    for setting in SETTINGS:
        assert re.search(rf"^  {setting.option} {setting.metavar}$", text, re.MULTILINE) or (
            f"  {setting.option} {setting.metavar} " in text
        )
        words = " ".join(text.split())
        assert f"{setting.help} (default: {setting.default_text or 'none'})" in words
    for option in ("--config", "--check", "--daemonize", "--pid-file", "--version"):
        assert option in text
    assert all(len(line) <= 79 for line in text.splitlines())


def test_check_says_that_all_is_good_and_binds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status, text, errors = run("--check", "--listen", address, "--listen", str(path))
    assert (status, text) == (0, "tcpupperd: the configuration is valid\n")
    assert errors.startswith("tcpupperd: cannot be checked outside the unit: listen (ignored if")
    assert not path.exists()


def test_check_tells_the_service_manager_nothing(tmp_path: Path) -> None:
    """It runs in ExecReload= with the NOTIFY_SOCKET of the service."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(path)
        notify.setblocking(False)
        command = ["env", f"NOTIFY_SOCKET={path}", "FDSTORE=4", *COMMAND, "--check"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        with pytest.raises(BlockingIOError):
            notify.recv(1)


def test_command_line_over_file_over_default() -> None:
    with Daemon("--lines-per-connection=2", "--workers", "1", lines_per_connection=1) as daemon:
        assert len(daemon.workers()) == 1
        client = daemon.connect()
        client.send(b"one\ntwo\nthree\n")
        assert client.read_to_end() == b"ONE\nTWO\n"
        daemon.reload(lines_per_connection=3, workers=2)  # the command line wins on
        daemon.wait_for_workers(1)
        client = daemon.connect()
        client.send(b"one\ntwo\nthree\n")
        assert client.read_to_end() == b"ONE\nTWO\n"


def test_an_option_that_takes_several_replaces_those_of_the_file() -> None:
    with Daemon("--listen", "127.0.0.1:0", "--listen", f"{OWN}-option") as daemon:
        assert len(daemon.addresses) == 2
        daemon.reload(listen=[f"{OWN}-file"])
        assert len(daemon.addresses) == 2
        assert daemon.connect(f"{OWN}-option").ask(b"hello") == b"HELLO"


def test_auto_is_a_worker_for_each_usable_cpu() -> None:
    (cpu, *_) = os.sched_getaffinity(0)
    with Daemon(workers="auto", wrapper=("taskset", "-c", str(cpu))) as daemon:
        assert len(daemon.workers()) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--lisen", "9999"], "--lisen: unknown option; did you mean --listen?"),
        (["--max_line=3"], "--max_line: unknown option; did you mean --max-line?"),
        (["--xyzzy"], "--xyzzy: unknown option"),
        (["--max-line", "none"], "argument --max-line: must be a whole number from 1 to"),
        (["--max-line", "0"], "argument --max-line: must be a whole number from 1 to"),
        (["--max-line"], "argument --max-line: expected one argument"),
        (["--workers", "0"], 'argument --workers: must be "auto" or a whole number from 1'),
        (["--framing", "lines"], 'argument --framing: must be one of "line", "none"'),
        (["--listen", "localhost"], 'argument --listen: "localhost": must be host:port,'),
        (["--listen", "localhost:65536"], 'argument --listen: "localhost:65536": must be'),
        (["--listen", "300.1.1.1:9"], '"300.1.1.1" is not an IPv4 address'),
        (["--idle-timeout", "-1"], "argument --idle-timeout: "),
        (["--work", "3"], "--work: unknown option; did you mean --workers?"),
        (["--pid-file", "/tmp/x"], "--pid-file, --user and --group require --daemonize"),
        (["--verbose"], "--verbose requires --check"),
        (["hello"], "unexpected argument: 'hello'"),
        ([""], "unexpected argument: ''"),
        (["--", "hello"], "unexpected argument: 'hello'"),
        (["hello", "--lisen"], "--lisen: unknown option; did you mean --listen?"),
    ],
)
def test_invalid_command_line(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(options)
    assert ended.value.code == 2
    wrong, remedy = capsys.readouterr().err.splitlines()
    assert wrong.startswith("tcpupperd: ")
    assert why in wrong
    assert remedy == "Try 'tcpupperd --help' for more information."


def test_invalid_command_line_is_told_with_status_2() -> None:
    status, text, errors = run("--max-line=none")
    assert (status, text) == (2, "")
    assert errors.startswith("tcpupperd: argument --max-line: must be a whole number from 1 to")


@pytest.mark.parametrize(
    ("content", "where", "why"),
    [
        (b"workers = 2\nmax_line = 0\n", ":2", "max_line = 0: must be a whole number from 1 to"),
        (b"\nframing = line\n", ":2", "invalid TOML"),
        (b"# gr\xfc\xdfe", ":1", "byte 0xfc is not valid UTF-8; save the file as UTF-8"),
    ],
)
def test_invalid_file(content: bytes, where: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "tcpupperd.toml"
    path.write_bytes(content)
    status, text, errors = run("--config", str(path))
    assert (status, text) == (78, "")
    (line,) = errors.splitlines()
    assert f"CRITICAL {path}{where}: " in line
    assert why in line
    status, text, errors = run("--config", str(path), "--check")
    assert (status, text) == (78, "")
    (checked,) = errors.splitlines()
    assert checked == f"tcpupperd: {line.partition(' CRITICAL ')[2]}"


def test_all_errors_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "tcpupperd.toml"
    path.write_text('max_line = 0\nframing = "words"\n\nlog_level = "chatty"\nwrokers = 1\n')
    starts = [
        f"{path}:1: max_line = 0: must be ",
        f'{path}:2: framing = "words": must be ',
        f'{path}:4: log_level = "chatty": must be ',
        f"{path}:5: wrokers: unknown setting; did you mean workers?",
    ]
    for check, before in (("--check", "tcpupperd: "), ("--framing=none", " CRITICAL ")):
        status, text, errors = run("--config", str(path), check)
        assert (status, text) == (78, "")
        for line, start in zip(errors.splitlines(), starts, strict=True):
            assert before + start in line


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon's user is the one that checks")
def test_check_by_root_warns_of_files_that_the_service_cannot_read(tmp_path: Path) -> None:
    path, folder = tmp_path / "tcpupperd.toml", tmp_path / "conf.d"
    folder.mkdir(mode=0o700)
    for file in (path, folder / "1.toml"):
        file.touch(mode=0o600)
    status, text, errors = run("--config", str(path), "--check")
    assert (status, text) == (0, "tcpupperd: the configuration is valid\n")
    for name, line in zip([folder, path, folder / "1.toml"], errors.splitlines(), strict=True):
        assert line.startswith(f"tcpupperd: {name}: other users cannot read this")
        assert "chmod 644" in line
    folder.chmod(0o755)
    path.chmod(0o644)
    (folder / "1.toml").chmod(0o644)
    assert run("--config", str(path), "--check")[2] == ""


def test_reload_reads_the_fragments(tmp_path: Path) -> None:
    with Daemon() as daemon:
        folder = daemon.config.parent / "conf.d"
        folder.mkdir()
        (folder / "1.toml").write_text('greeting = "hello"\n')
        daemon.send_signal(signal.SIGCHLD)  # the supervisor checks
        until(lambda: "changed on disk; reload" in daemon.manager.status)
        before = set(daemon.workers())
        daemon.reload()
        until(lambda: not before & set(daemon.workers()))
        assert daemon.connect().read_line() == b"hello\n"
        until(lambda: "changed on disk" not in daemon.manager.status)


def test_all_errors_are_logged_on_a_reload() -> None:
    with Daemon() as daemon:
        daemon.configure('log_level = "chatty"\nwrokers = 1\n')
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "wrokers: unknown setting" in daemon.log)
        failed = re.findall(
            "ERROR reload failed, keeping the current configuration: (.*)", daemon.log
        )
        assert [re.sub("^.*:([0-9]+: .*): .*$", r"\1", line) for line in failed] == [
            '3: log_level = "chatty"',
            "4: wrokers",
        ]


def test_check_shows_the_resulting_configuration_as_toml(tmp_path: Path) -> None:
    path = tmp_path / "tcpupperd.toml"
    path.write_text("# mine\nmax_line = 7\nworkers = 3\n")
    check = ("--check", "--verbose")
    status, text, errors = run(*check, "--config", str(path), "--workers", "2")
    assert (status, errors) == (0, "")
    lines = text.splitlines()
    assert [line.partition(" = ")[0] for line in lines] == [one.name for one in SETTINGS]
    assert f"max_line = 7  # {path}:2" in lines
    assert "workers = 2  # command line" in lines
    assert 'listen = ["localhost:9999"]  # default' in lines
    path.write_text(text)
    again = [
        line.partition("  # ")[0] for line in run(*check, "--config", str(path))[1].splitlines()
    ]
    assert again == [line.partition("  # ")[0] for line in lines]


def test_link_in_the_way_of_a_socket_is_named(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.symlink_to("/nonexistent")
    status, _, errors = run("--listen", str(path))
    assert status == 71
    assert f"cannot listen on {path}: it exists and is not a socket; use another" in errors


def test_no_file() -> None:
    status, text, errors = run("--config", "/nonexistent")
    assert (status, text) == (78, "")
    (line,) = errors.splitlines()
    assert "CRITICAL /nonexistent: cannot be read: No such file or directory" in line


def test_cannot_go_to_the_background() -> None:
    status, text, errors = run("--daemonize", "--user", "no-such-user", "--listen", "127.0.0.1:0")
    assert (status, text) == (1, "")
    assert "--user no-such-user: " in errors


def test_shipped_file_is_good_and_shows_the_defaults(tmp_path: Path) -> None:
    shipped = ROOT / "data/tcpupperd.toml"
    assert run("--check", "--config", str(shipped))[0] == 0
    shown = tmp_path / "defaults.toml"
    shown.write_text(re.sub("^#(?=[a-z_]+ =)", "", shipped.read_text(), flags=re.MULTILINE))
    assert run("--check", "--config", str(shown))[0] == 0
    names = re.findall("^([a-z_]+) =", shown.read_text(), re.MULTILINE)
    assert names == [setting.name for setting in SETTINGS]


# Settings that contradict what the daemon was given


def test_settings_without_effect_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        limit = ("prlimit", "--nofile=1000")
        passed = [("tcpupperd.socket", one)]
        with Daemon(passed=passed, wrapper=limit, max_connections=2000) as daemon:
            for count in (2, 4):  # at the start, and at a reload
                until(lambda: daemon.log.count("WARNING") >= count)  # noqa: B023
                warnings = [line for line in daemon.log.splitlines() if "WARNING" in line]
                assert len(warnings) == count
                assert "listen is ignored because " in warnings[-2]
                assert "max_connections is 2000, but each worker " in warnings[-1]
                assert "a limit of 1000 descriptors" in warnings[-1]
                daemon.reload()


def test_settings_that_contradict_nothing_are_not_told() -> None:
    with Daemon(max_connections=500) as daemon:
        assert "WARNING" not in daemon.log
    assert run("--check", "--framing=none")[2] == ""
    assert "max_connections (LimitNOFILE=" in run("--check", "--max-connections=7")[2]

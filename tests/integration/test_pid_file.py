"""The pid file of a daemon in the background, and the user that it runs as."""

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from integration.background import ROOT, launched, needs_root, refusal, running
from tcpupperd.host import background
from tcpupperd.host.background import PidFile

# The pid file


def test_pid_file_names_the_daemon_while_it_runs(python: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with running(python, pid_file) as daemon:
        assert pid_file.read_text() == f"{daemon.state['pid']}\n"
        assert pid_file.stat().st_mode & 0o7777 == 0o644
        daemon.tell("stop")
        daemon.wait()
    assert not pid_file.exists()


def test_pid_file_with_relative_path(python: str, tmp_path: Path) -> None:
    with running(python, Path(os.path.relpath(tmp_path / "pid", ROOT))) as daemon:
        assert (tmp_path / "pid").exists()
        daemon.tell("stop")
        daemon.wait()
    assert not (tmp_path / "pid").exists()


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
            f"tcpupperd: --pid-file {pid_file}: tcpupperd is already running as process {pid}; "
            "stop it first or specify another file\n"
        )
        assert pid_file.read_text() == f"{pid}\n"


def test_second_instance_is_refused_while_the_first_starts(python: str, tmp_path: Path) -> None:
    with launched(python, tmp_path / "pid") as launch:
        assert launch.daemon is not None
        assert f" is already running as process {launch.daemon.state['pid']};" in refusal(
            python, tmp_path / "pid"
        )


def test_workers_that_outlive_the_daemon_hold_the_lock(python: str, tmp_path: Path) -> None:
    with running(python, tmp_path / "pid") as daemon:
        daemon.tell("leave a worker")
        daemon.kill()
        assert " is already running " in refusal(python, tmp_path / "pid")


def test_file_that_is_no_pid_file_is_left_alone(python: str, tmp_path: Path) -> None:
    precious = tmp_path / "letters"
    precious.write_text("Dear Ada,\n")
    assert "letters: exists, but is not a pid file;" in refusal(python, precious)
    assert precious.read_text() == "Dear Ada,\n"


def test_pid_file_of_another_program_is_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    file = PidFile(str(path))
    file.write()
    path.unlink()
    path.write_text("7\n")
    file.remove()
    assert path.read_text() == "7\n"


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
        ("no-such-user", None, "--user no-such-user: no such user"),
        ("nobody", "no-such-group", "--group no-such-group: no such group"),
    ],
)
def test_unknown_user_or_group(user: str, group: str | None, reason: str) -> None:
    with pytest.raises(background.BackgroundError, match=f"^{reason}$"):
        background.find_owner(user, group)


def test_group_alone_is_refused() -> None:
    with pytest.raises(background.BackgroundError, match=r"^--group daemon requires --user$"):
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

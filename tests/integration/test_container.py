"""What the recipe of a container image starts: the service as process 1, without an init.

No engine is needed: this test follows the instructions of the Containerfile in namespaces of its
own, and as its user if run by root.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from integration.processes import cannot, children, stopped
from tools import need
from waiting import DEADLINE, until

ROOT = Path(__file__).parents[2]
#: The stage that builds, and that of the image.
BUILD, RECIPE = re.split(
    r"^FROM .*\n", (ROOT / "examples/container/Containerfile").read_text(), flags=re.MULTILINE
)[1:]
AS_ROOT = os.geteuid() == 0
#: With the path of images: one of root's own may lead to a Python that only root can read.
ENVIRONMENT = {
    **os.environ,
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}


class Container(NamedTuple):
    """Where the image's entry point runs."""

    folder: Path  # WORKDIR
    outer: subprocess.Popen[bytes]  # ends with the status of process 1
    pid: int  # of process 1, as seen here
    ready: str  # the message that it serves

    def enter(self, *words: str) -> list[str]:
        """The command that runs another one inside, as an engine's "exec" does. The files in /proc
        of process 1 belong to root: it protects its memory."""
        user = () if AS_ROOT else ("--user", "--preserve-credentials")
        pid = f"--pid=/proc/{self.outer.pid}/ns/pid_for_children"
        return ["nsenter", f"--target={self.outer.pid}", *user, "--net", pid, *words]

    def is_healthy(self) -> bool:
        """Whether the health check succeeds."""
        command = self.enter(*json.loads(instruction("HEALTHCHECK CMD")))
        outcome = subprocess.run(
            command,
            cwd=self.folder,
            env=ENVIRONMENT,
            check=False,
            timeout=DEADLINE,
            capture_output=True,
        )
        return outcome.returncode == 0


def test_process_1_serves_reaps_orphans_and_stops() -> None:
    with running() as container:
        until(container.is_healthy)
        if AS_ROOT:
            uid = int(instruction("USER").partition(":")[0])
            assert os.stat(f"/proc/{container.pid}").st_uid == uid
        orphan = subprocess.check_output(
            container.enter("sh", "-c", "sleep 600 >/dev/null & echo $!"), timeout=DEADLINE
        )
        [outside] = until(lambda: with_number(container.pid, int(orphan)))
        os.kill(outside, signal.SIGKILL)
        until(lambda: outside not in children(container.pid))
        os.kill(container.pid, getattr(signal, instruction("STOPSIGNAL")))
        assert container.outer.wait(DEADLINE) == 0


def test_image_has_the_c_module() -> None:
    with running() as container:
        assert ", using the C module, " in container.ready


def test_health_check_asks_the_service() -> None:
    with running() as container:
        until(container.is_healthy)
        with stopped(*children(container.pid)):
            assert not container.is_healthy()


def instruction(name: str) -> str:
    """What follows the name of an instruction."""
    [found] = instructions(name)
    return found


def instructions(name: str) -> list[str]:
    """The same of an instruction that may come more than once."""
    return re.findall(rf"^{name} (.+)", RECIPE, re.MULTILINE)


@contextmanager
def running() -> Iterator[Container]:
    """Start the entry point, in a copy of what the recipe copies."""
    with tempfile.TemporaryDirectory() as root:
        build(Path(f"{root}/build"))
        for copy in instructions("COPY"):
            stage, source, target = copy.split()
            assert stage == "--from=build"
            shutil.copytree(f"{root}{source}", f"{root}{target}")
        subprocess.run(["chmod", "--recursive", "a+rX", root], check=True)
        folder = Path(f"{root}{instruction('WORKDIR')}")
        with subprocess.Popen(
            command(), cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE
        ) as outer:
            try:
                yield Container(folder, outer, *first_process(outer))
            finally:
                for pid in children(outer.pid):  # --kill-child kills none of another user
                    os.kill(pid, signal.SIGKILL)
                outer.kill()


def build(folder: Path) -> None:
    """Do in a folder what the stage "build" does in /build, except install packages."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        cannot("Python's headers are not installed (apt-get install python3-dev)")
    need("gcc")
    left_out = shutil.ignore_patterns(".*", "*.so", "build", "tests", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    [script] = re.findall(r"^RUN cd /build && (.+)", BUILD, re.MULTILINE)
    script = script.replace("python3", shlex.quote(sys.executable))
    subprocess.run(["sh", "-c", script], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def command() -> list[str]:
    user, _, group = instruction("USER").partition(":")
    ids = f"setpriv --reuid={user} --regid={group} --clear-groups -- " if AS_ROOT else ""
    script = f'{need("ip")} link set lo up && exec {ids}"$@"'
    return [
        *(need("unshare"), "--net", "--pid", "--fork", "--kill-child"),
        *(() if AS_ROOT else ("--user", "--map-root-user")),
        *("sh", "-c", script, "sh"),
        *json.loads(instruction("ENTRYPOINT")),
        *json.loads(instruction("CMD")),
    ]


def first_process(outer: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Process 1 inside, once it serves, and what it says then."""
    assert outer.stderr
    for line in outer.stderr:
        if b" ready: " in line:
            [pid] = children(outer.pid)
            return pid, line.decode()
        if b"Operation not permitted" in line:
            cannot("this system lets only root make namespaces")
    raise AssertionError(f"exited with status {outer.wait()}")


def with_number(parent: int, number: int) -> list[int]:
    """The child that has a number inside."""
    return [
        pid
        for pid in children(parent)
        if re.search(rf"^NSpid:.*\t{number}$", Path(f"/proc/{pid}/status").read_text(), re.M)
    ]

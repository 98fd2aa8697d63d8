"""A Debian machine with systemd as PID 1, booted in about a second and removed without a trace."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from system.roots import Root
from waiting import until

RUN_TIMEOUT = 120
# A shell as a user's: systemd-nspawn plays the service manager of what it starts.
SHELL = ("env", "--unset=NOTIFY_SOCKET", "sh", "-ec")
CGROUPS = Path("/sys/fs/cgroup")
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


class Container:
    """A booted Debian release, and root's shell in it."""

    def __init__(self, leader: int) -> None:
        """`leader` is the process that is PID 1 inside."""
        self.leader = leader

    def command(self, *words: str) -> list[str]:
        """The host's command that runs `words` inside."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd")
        return ["nsenter", f"--target={self.leader}", *namespaces, "--", *words]

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command inside, with the options of subprocess.Popen."""
        return subprocess.Popen(self.command(*words), env=ENVIRONMENT, text=True, **options)

    def try_run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside, which may fail."""
        return subprocess.run(
            self.command(*words),
            check=False,
            env=ENVIRONMENT,
            input=stdin,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=RUN_TIMEOUT,
        )

    def run(self, *words: str, stdin: str = "") -> str:
        """What a command writes, less the last newline; AssertionError with it where it fails."""
        result = self.try_run(*words, stdin=stdin)
        assert result.returncode == 0, f"{' '.join(words)}: {result.returncode}\n{result.stdout}"
        return result.stdout.rstrip("\n")

    def write(self, path: str, text: str) -> None:
        """Write a file, its folder included."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat >"$1"', "sh", path, stdin=text)

    def show(self, unit: str, name: str) -> str:
        """One property of a unit, as systemctl(1) shows it."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit)

    def journal(self, *words: str) -> str:
        """journalctl(1) of everything that was logged before this call."""
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--quiet", *words)


@contextmanager
def booted(root: Root, share: Path) -> Iterator[Container]:
    """Boot `root` with the folder `share` at /mnt inside, and kill all of it at the end."""
    with own_cgroup() as cgroup, TemporaryFile() as console:
        machine = start_machine(root, share, cgroup, console)
        try:
            yield wait_for_boot(machine, console)
        finally:
            # Not the wrapper around it, which then would leave reaping to the host's PID 1.
            for nspawn_pid in children_of(machine.pid):
                os.kill(nspawn_pid, signal.SIGKILL)
            machine.wait()


def nspawn(root: Root, share: Path, *words: str) -> list[str]:
    """The command that starts `root` with the folder `share` at /mnt inside.

    All changes go to a tmpfs in the container's own mount namespace. The container lives in a
    process namespace of systemd-nspawn's, which ends with this process: nothing is left, however
    it ends.
    """
    return [
        *("setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--fork", "--kill-child"),
        # Where systemd-nspawn keeps its locks and the folders that it would leave behind.
        *("--mount-proc", "sh", "-ec", 'mount -t tmpfs nspawn /run/systemd && exec "$@"', "sh"),
        # The host's own PID 1 need not be systemd.
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit"),
        *(f"--directory={root.path()}", "--volatile=overlay", f"--bind={share}:/mnt"),
        *words,
    ]


@contextmanager
def own_cgroup() -> Iterator[Path]:
    """A control group for one container: two in the same one would manage each other's processes.

    It lies below this process's own in the unified hierarchy, which may be mounted next to the
    older ones.
    """
    own = next(line for line in read_lines("/proc/self/cgroup") if line.startswith("0::"))
    unified = CGROUPS / "unified"
    parent = (unified if unified.exists() else CGROUPS) / own.removeprefix("0::/")
    cgroup = parent / f"tcpupperd-{os.getpid()}-{os.urandom(4).hex()}"
    cgroup.mkdir()
    try:
        yield cgroup
    finally:
        until(lambda: "populated 0" in read_lines(cgroup / "cgroup.events"))
        # systemd-nspawn makes groups of this name in the older hierarchies, too.
        for group in groups_named(cgroup.name):
            for folder, _, _ in os.walk(group, topdown=False):
                Path(folder).rmdir()


def groups_named(name: str) -> list[Path]:
    """The control groups of a name in all hierarchies."""
    # Not Path.rglob(), which fails if another container's group goes meanwhile.
    return [Path(folder, name) for folder, names, _ in os.walk(CGROUPS) if name in names]


def start_machine(
    root: Root, share: Path, cgroup: Path, console: IO[bytes]
) -> subprocess.Popen[bytes]:
    enter = ("sh", "-c", 'echo $$ >"$0"/cgroup.procs && exec "$@"', str(cgroup))
    # The system manager inside filters by IPAddressAllow= with BPF programs.
    options = ("--private-network", "--system-call-filter=bpf", "--boot")
    return subprocess.Popen(
        [*enter, *nspawn(root, share, *options)],
        env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
    )


def wait_for_boot(machine: subprocess.Popen[bytes], console: IO[bytes]) -> Container:
    try:
        container = Container(until(lambda: leader_of(machine)))
        until(lambda: has_booted(container))
    except AssertionError as error:
        console.seek(0)
        error.add_note(console.read().decode(errors="replace"))
        raise
    return container


def leader_of(machine: subprocess.Popen[bytes]) -> int:
    """The process that is PID 1 inside, a child of systemd-nspawn's; 0 if not there yet."""
    assert machine.poll() is None, "systemd-nspawn has ended"
    for nspawn_pid in children_of(machine.pid):
        for child in children_of(nspawn_pid):
            with suppress(OSError):  # it has just ended
                status = read_lines(f"/proc/{child}/status")
                ids = next(line for line in status if "NSpid" in line)
                if ids.split()[-1] == "1":
                    return child
    return 0


def children_of(pid: int) -> list[int]:
    return [
        int(child) for child in " ".join(read_lines(f"/proc/{pid}/task/{pid}/children")).split()
    ]


def has_booted(container: Container) -> bool:
    """Whether every unit of the boot has started or failed."""
    state = container.try_run("systemctl", "is-system-running", "--wait").stdout
    return state.strip() in ("running", "degraded")


def read_lines(path: str | Path) -> list[str]:
    return Path(path).read_text().splitlines()

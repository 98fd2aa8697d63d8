"""What an administrator does with the service, in words."""

import os
import subprocess
from typing import Self

from system.container import Container
from waiting import DEADLINE

SERVICE = "tcpupperd.service"
SOCKET = "tcpupperd.socket"
CONFIGURATION = "/etc/tcpupperd/tcpupperd.toml"


def answer(machine: Container, text: str) -> str:
    """What the client prints for `text`."""
    return machine.run("tcpupper", stdin=text)


def main_pid(machine: Container) -> int:
    return int(machine.show(SERVICE, "MainPID"))


def workers(machine: Container) -> set[int]:
    """The service's processes without the first and the keepers, by their numbers inside."""
    group = machine.show(SERVICE, "ControlGroup")
    pids = machine.run("cat", f"/sys/fs/cgroup{group}/cgroup.procs").split()
    names = [f"/proc/{pid}/comm" for pid in pids]
    # Those that have exited meanwhile are none.
    named = machine.try_run("grep", "-sL", "^tcpupperd-keep$", *names).stdout.split()
    return {int(name.split("/")[2]) for name in named} - {main_pid(machine)}


def drop_in(machine: Container, unit: str, text: str) -> None:
    """Add settings to a unit and make them count."""
    machine.write(f"/etc/systemd/system/{unit}.d/test.conf", text)
    machine.run("systemctl", "daemon-reload")


def use_own_user(machine: Container) -> None:
    """Stop the service and start it as a user that no other test has.

    The kernel limits the descriptors in flight by user ID, and that of a dynamic user is the same
    in all machines.
    """
    machine.run("systemctl", "stop", SERVICE)  # a restart with another user is worth a warning
    machine.write(
        f"/etc/systemd/system/{SERVICE}.d/user.conf", f"[Service]\nUser=tcpupperd-{os.getpid()}\n"
    )
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", SERVICE)


def is_active(machine: Container, unit: str = SERVICE) -> bool:
    """Whether a unit has started. To be waited for, even after an answer: workers do not wait
    until systemd has read that the service is ready."""
    return machine.show(unit, "ActiveState") == "active"


class Conversation:
    """A client that stays connected, asking line by line."""

    def __init__(self, machine: Container, *options: str) -> None:
        self.client = machine.popen(
            "tcpupper", *options, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.kill()
        self.client.communicate()

    def ask(self, line: str) -> str:
        """The answer to one line, "" if there will be none."""
        assert self.client.stdin
        assert self.client.stdout
        self.client.stdin.write(f"{line}\n")
        self.client.stdin.flush()
        return self.client.stdout.readline().rstrip("\n")

    def end(self) -> str:
        """Hang up; what was still answered."""
        rest, _ = self.client.communicate(timeout=DEADLINE)
        return rest

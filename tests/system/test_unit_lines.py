"""The lines of the service's unit: each has an effect, and each system call is needed."""

import re

import pytest

from system.container import Container
from system.roots import RELEASES, TESTING
from system.service import (
    SERVICE,
    SOCKET,
    Conversation,
    answer,
    drop_in,
    is_active,
    main_pid,
    workers,
)
from waiting import until

EVERYWHERE = [*RELEASES, TESTING]
UNITS = "/run/systemd/system"
CONFIGURATION = "/etc/tcpupperd/tcpupperd.toml"
EXAMPLES = "/usr/share/doc/tcpupperd/examples"
METRICS = "tcpupperd-metrics.socket"
PROXY = "tcpupperd-proxy.socket"

#: Lines of which DynamicUser= makes the default, unless a drop-in turns it off.
FOR_A_FIXED_USER = {
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "RemoveIPC=yes",
    "RestrictSUIDSGID=yes",
}
#: A line of which systemctl(1) shows nothing before a start.
NOT_SHOWN = {"WatchdogSec=20"}

#: What else systemctl(1) shows: names, of the user as well, and times.
OF_EACH_UNIT = re.compile(r"(Id|Names|FragmentPath|User|Group|InvocationID|\w*Timestamp\w*)=")

#: systemd ends a process that makes a call that is denied, except for what is tried in vain: the C
#: library asks nscd for names, and Python keeps compiled modules.
DENIED_IS_FATAL = """
[Service]
SystemCallErrorNumber=
SystemCallFilter=~connect:EPERM mkdir:EPERM
"""

#: The system calls that are allowed beyond those that systemd calls @default, @basic-io, @io-event
#: and @signal, by its other groups; none of a group that is not named here.
ALLOWED = {
    "@network-io": {
        *("accept", "accept4", "getpeername", "getsockname", "getsockopt", "recv", "recvfrom"),
        *("recvmsg", "send", "sendmsg", "sendto", "setsockopt", "shutdown", "socket"),
        *("socketcall", "socketpair"),
    },
    "@process": {
        *("clone", "clone3", "fork", "getrusage", "kill", "pidfd_open", "prctl", "tgkill"),
        *("times", "vfork", "wait4", "waitid", "waitpid"),
    },
    "@timer": {"times"},
    "@ipc": {"memfd_create", "pipe", "pipe2"},
}
#: Those of files are not listed again: the file systems are not writable. These groups overlap.
FREE = ("@default", "@basic-io", "@io-event", "@signal", "@file-system")
WHOLE = ("@known", "@system-service")

pytestmark = pytest.mark.parametrize("release", EVERYWHERE, indirect=True)


def test_each_line_has_an_effect(machine: Container) -> None:
    """systemd shows another service without it."""
    assert lines_without_effect(machine, "") == FOR_A_FIXED_USER
    assert lines_without_effect(machine, "DynamicUser=no") == {"DynamicUser=yes"}


def lines_without_effect(machine: Container, last: str) -> set[str]:
    """The lines of the unit without which systemd shows the same, if `last` is added to them."""
    text = machine.run("cat", f"/usr/lib/systemd/system/{SERVICE}")
    before, service = re.split(
        r"(?<=^\[Service\]\n)", text.partition("\n[Install]")[0], flags=re.M
    )
    settings = [line for line in service.splitlines() if line and not line.startswith("#")]
    units = {"whole.service": [*settings, last]}
    for number, line in enumerate(settings):
        if line not in NOT_SHOWN:
            units[f"without-{number}.service"] = [
                *settings[:number],
                *settings[number + 1 :],
                last,
            ]
    for name, lines in units.items():
        machine.write(f"{UNITS}/{name}", "\n".join([before, *lines, ""]))
    machine.run("systemctl", "daemon-reload")
    whole, *others = (shown(machine, name) for name in units)
    left_out = [line for line in settings if line not in NOT_SHOWN]
    return {line for line, other in zip(left_out, others, strict=True) if other == whole}


def shown(machine: Container, unit: str) -> set[str]:
    """How systemd understands a unit, but for what differs between any two."""
    text = machine.run("systemctl", "show", unit).replace(unit.removesuffix(".service"), "NAME")
    fields = [line.partition("=") for line in text.splitlines() if not OF_EACH_UNIT.match(line)]
    # Lists are in no order.
    return {f"{name}={sorted(value.split())}" for name, _, value in fields}


def test_store_is_announced(machine: Container) -> None:
    """FDSTORE= is set for systemd 252, which does not set it itself."""
    drop_in(machine, SERVICE, "[Service]\nEnvironment=\n")
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: is_active(machine))
    environment = machine.run("cat", f"/proc/{main_pid(machine)}/environ").split("\0")
    version = int(re.findall(r"\d+", machine.run("systemctl", "--version"))[0])
    announced = f"FDSTORE={machine.show(SERVICE, 'FileDescriptorStoreMax')}"
    assert (announced in environment) == (version >= 254)
    assert announced in machine.run("cat", f"/usr/lib/systemd/system/{SERVICE}")


def test_no_system_call_is_missing(machine: Container) -> None:
    """If one that is denied ended its process, no process would end of it."""
    drop_in(machine, SERVICE, DENIED_IS_FATAL)
    drop_in(machine, SOCKET, machine.run("cat", f"{EXAMPLES}/unix-socket.conf"))
    machine.write(CONFIGURATION, "workers = 2\nlog_connections = true\n")
    machine.run("systemctl", "enable", METRICS, PROXY)
    machine.run("systemctl", "restart", SOCKET, SERVICE)
    with Conversation(machine) as conversation:
        assert conversation.ask("hello") == "HELLO"
        reload_and_signal(machine)
        assert conversation.ask("after a reload") == "AFTER A RELOAD"
        machine.run("systemctl", "kill", "--signal=KILL", "--kill-whom=main", SERVICE)
        assert conversation.ask("after a death") == "AFTER A DEATH"
        until(lambda: is_active(machine))
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("after a restart") == "AFTER A RESTART"
    use_other_sockets(machine)
    fail_and_recover(machine)
    machine.run("systemctl", "stop", SOCKET, SERVICE)
    assert machine.show(SERVICE, "Result") == "success"
    log = machine.journal(f"--unit={SERVICE}")
    assert "killed by SIGKILL" not in log
    assert not re.search("SIGSYS|SYS/|status=31|bad system call", log, re.IGNORECASE)


def reload_and_signal(machine: Container) -> None:
    machine.run("systemctl", "reload", SERVICE)
    machine.run("systemctl", "kill", "--signal=USR1", "--kill-whom=main", SERVICE)
    until(lambda: "accepted=" in machine.journal(f"--unit={SERVICE}"))


def use_other_sockets(machine: Container) -> None:
    page = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9998/%s').read())"
    assert "tcpupperd_workers" in machine.run("python3", "-c", page % "metrics")
    assert "Lines answered" in machine.run("python3", "-c", page % "")
    assert machine.run("tcpupper", "--unix", "/run/tcpupperd.sock", "hello") == "HELLO"
    header = "import socket; s = socket.create_connection(('127.0.0.1', 9997));"
    ask = r"s.sendall(b'PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nhello\n'); print(s.recv(9))"
    assert "HELLO" in machine.run("python3", "-c", f"{header} {ask}")


def fail_and_recover(machine: Container) -> None:
    machine.write(CONFIGURATION, "workers = none\n")
    assert machine.try_run("systemctl", "reload", SERVICE).returncode != 0
    machine.run("systemctl", "restart", SERVICE)
    assert answer(machine, "hello\n") == "HELLO"
    machine.write(CONFIGURATION, "workers = 2\n")
    machine.run("systemctl", "reload", SERVICE)
    until(lambda: "last good" not in machine.show(SERVICE, "StatusText"))
    before = workers(machine)
    machine.run("kill", "-SEGV", str(min(before)))
    until(lambda: len(workers(machine)) == 2 and workers(machine) != before)


def test_system_calls_that_are_allowed(machine: Container) -> None:
    names = machine.run("systemctl", "show", "--value", "--property=SystemCallFilter", SERVICE)
    groups = groups_of_system_calls(machine)
    free = set().union(*(groups[name] for name in FREE))
    left = {name: (calls & set(names.split())) - free for name, calls in groups.items()}
    assert {name: calls for name, calls in left.items() if calls and name not in WHOLE} == ALLOWED


def groups_of_system_calls(machine: Container) -> dict[str, set[str]]:
    """The system calls of each group of systemd's; a group may contain others."""
    groups: dict[str, set[str]] = {}
    for paragraph in machine.run("systemd-analyze", "syscall-filter").split("\n\n"):
        name, *calls = [line.split()[0] for line in paragraph.splitlines() if line.strip()]
        if name.startswith("@"):
            groups[name] = set(calls) - {"#"}
    while nested := [name for name in groups if any(one[0] == "@" for one in groups[name])]:
        for name in nested:
            parts = [groups[one] if one[0] == "@" else {one} for one in groups[name]]
            groups[name] = set().union(*parts)
    return groups

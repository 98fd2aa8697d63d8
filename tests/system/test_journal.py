"""The journal: the fields of entries, and the events, which journalctl -x explains."""

import json
import re
import subprocess
from contextlib import ExitStack

from system.container import Container
from system.service import (
    CONFIGURATION,
    SERVICE,
    SOCKET,
    Conversation,
    answer,
    drop_in,
    main_pid,
    workers,
)
from system.test_service import STALLED
from tcpupperd.events import Event
from waiting import until

JOURNALD = ("systemd-journald.service", "systemd-journald.socket")

#: Puts messages of another program into the channel of a process: once for each of its sockets of
#: that kind, for they look the same from outside.
DAMAGE = """
import ctypes, os, socket, sys

def sockets(pid):
    names = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    return {fd: name for fd, name in names.items() if name.startswith("socket:")}

pid, worker = map(int, sys.argv[1:3])
pidfd = os.pidfd_open(pid)
shared = sockets(worker).values()  # the channel, but not the worker's control socket
for name, target in sockets(pid).items():
    if target not in shared:
        continue
    SYS_pidfd_getfd = 438
    fd = ctypes.CDLL(None).syscall(SYS_pidfd_getfd, pidfd, int(name), 0)
    if fd < 0:  # it has just been closed
        continue
    one = socket.socket(fileno=fd)
    if one.type == socket.SOCK_SEQPACKET and sys.argv[3] == "shut down":
        one.shutdown(socket.SHUT_RDWR)
    elif one.type == socket.SOCK_SEQPACKET:
        ours, theirs = socket.socketpair()
        socket.send_fds(one, [b"of another program"], [theirs.fileno()])
"""


def entries(machine: Container, *words: str) -> list[dict[str, str]]:
    """The service's entries that match."""
    found = machine.journal("--output=json", f"--unit={SERVICE}", *words)
    return [json.loads(line) for line in found.splitlines()]


def told(machine: Container, event: Event) -> list[dict[str, str]]:
    """The entries that tell of an event."""
    return entries(machine, f"MESSAGE_ID={event.message_id}")


def test_events_are_explained(machine: Container) -> None:
    drop_in(machine, SERVICE, "[Service]\nWatchdogSec=4\n")
    restart_with(machine, "workers = 1\n")
    hand_over(machine)
    damage_a_hand_over(machine)
    refuse_a_configuration(machine)
    lose_workers(machine)
    refuse_clients(machine)
    cut_answers(machine)
    refuse_a_proxy(machine)
    elsewhere = {Event.SOCKET_CHANGED, Event.MESSAGES_DROPPED, Event.CONNECTION_ENDED}
    for event in set(Event) - elsewhere:
        explained = machine.journal("--catalog", f"MESSAGE_ID={event.message_id}")
        assert f" Subject: {event.title}\n" in explained, event


def restart_with(machine: Container, configuration: str) -> None:
    machine.write(CONFIGURATION, configuration)
    machine.run("systemctl", "restart", SERVICE)


def hand_over(machine: Container) -> None:
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        (old,) = workers(machine)
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("two") == "TWO"
        (given,) = until(lambda: told(machine, Event.HANDED_OVER))
        (taken,) = until(lambda: told(machine, Event.TAKEN_OVER))
        assert (given["_PID"], given["MESSAGE"]) == (str(old), "handed over 1 connection")
        assert taken["MESSAGE"] == "took over 1 connection"
        machine.run("systemctl", "reload", SERVICE)
        until(lambda: told(machine, Event.RELOADED))


def damage(machine: Container, how: str) -> None:
    (worker,) = workers(machine)
    machine.run("python3", "-c", DAMAGE, str(main_pid(machine)), str(worker), how)


def damage_a_hand_over(machine: Container) -> None:
    damage(machine, "write")
    until(lambda: told(machine, Event.HANDOVER_DAMAGED))
    damage(machine, "shut down")
    until(lambda: told(machine, Event.CHANNEL_REPLACED))
    assert answer(machine, "still here\n") == "STILL HERE"


def refuse_a_configuration(machine: Container) -> None:
    machine.write(CONFIGURATION, "wrong = 1\n")
    machine.run("systemctl", "kill", "--kill-who=main", "--signal=HUP", SERVICE)
    until(lambda: told(machine, Event.RELOAD_REFUSED))
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: told(machine, Event.LAST_GOOD_IN_USE))


def lose_workers(machine: Container) -> None:
    restart_with(machine, "workers = 1\n")
    assert answer(machine, "served\n") == "SERVED"
    (killed,) = workers(machine)
    machine.run("kill", "-KILL", str(killed))
    (replaced,) = until(lambda: told(machine, Event.WORKER_DIED))
    assert replaced["TCPUPPERD_WORKER"] == str(killed)
    (hangs,) = until(lambda: workers(machine) - {killed})
    machine.run("kill", "-STOP", str(hangs))
    (hung,) = until(lambda: told(machine, Event.WORKER_HUNG))
    assert hung["TCPUPPERD_WORKER"] == str(hangs)


def refuse_clients(machine: Container) -> None:
    restart_with(machine, "workers = 1\nmax_connections = 2\n")
    with ExitStack() as stack:
        for _ in range(2):
            assert stack.enter_context(Conversation(machine)).ask("one") == "ONE"
        until(lambda: told(machine, Event.ACCEPTING_PAUSED))
    assert answer(machine, "room again\n") == "ROOM AGAIN"
    until(lambda: told(machine, Event.ACCEPTING_RESUMED))
    restart_with(machine, "workers = 1\nmax_connections_per_source = 1\n")
    with Conversation(machine) as one, Conversation(machine) as other:
        assert one.ask("one") == "ONE" or other.ask("other") == "OTHER"
        (refused,) = until(lambda: told(machine, Event.SOURCE_LIMIT))
        assert refused["TCPUPPERD_CLIENT"] in ("127.0.0.1", "::1")


def cut_answers(machine: Container) -> None:
    restart_with(machine, "drain_timeout = 1\n")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with machine.popen("python3", "-c", STALLED, **pipes) as client:
        assert client.stdout
        assert client.stdout.readline() == "stalled\n"
        machine.run("systemctl", "stop", SERVICE)
        client.kill()
    until(lambda: told(machine, Event.ANSWERS_CUT_OFF))


def refuse_a_proxy(machine: Container) -> None:
    drop_in(machine, SOCKET, "[Socket]\nFileDescriptorName=proxy\n")
    machine.run("systemctl", "restart", SOCKET)
    machine.try_run("tcpupper", "hello")
    until(lambda: told(machine, Event.PROXY_REFUSED))


def test_life_of_a_connection_is_found_by_its_client(machine: Container) -> None:
    """Across a restart, by the command in the README."""
    restart_with(machine, "log_connections = true\n")
    with Conversation(machine, "--host", "127.0.0.1") as conversation:
        assert conversation.ask("one") == "ONE"
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("two") == "TWO"
        ((port, cookie),) = re.findall(
            r"127\.0\.0\.1:9999 +127\.0\.0\.1:(\d+) .* sk:(\w+)",
            machine.run("ss", "-Htne", "state", "established", "sport", "=", "9999"),
        )
        conversation.end()
    (entry,) = until(lambda: entries(machine, "TCPUPPERD_CLIENT=127.0.0.1"))
    assert entry["MESSAGE_ID"] == Event.CONNECTION_ENDED.message_id
    assert entry["TCPUPPERD_PORT"] == port
    assert entry["TCPUPPERD_CONNECTION"] == cookie
    assert entry["TCPUPPERD_LISTENER"] == "127.0.0.1:9999"
    assert entry["TCPUPPERD_WORKER"] in map(str, workers(machine))
    assert entry["TCPUPPERD_REASON"] == "client closed"
    assert (entry["TCPUPPERD_LINES"], entry["TCPUPPERD_RECEIVED"]) == ("2", "8")
    explained = machine.journal("--catalog", f"--unit={SERVICE}", "TCPUPPERD_CLIENT=127.0.0.1")
    assert f" Subject: {Event.CONNECTION_ENDED.title}\n" in explained
    assert "journalctl -u tcpupperd TCPUPPERD_CLIENT=127.0.0.1" in explained


def test_entries_arrive_after_a_restart_of_the_journal(machine: Container) -> None:
    """Those of its service arrive as before. After one of its sockets, the sandbox still has the
    old socket for entries: messages are lines on the stream, which is systemd's own and lasts, and
    the next process gets both."""
    machine.run("systemctl", "restart", JOURNALD[0])
    machine.run("systemctl", "reload", SERVICE)
    (entry,) = until(lambda: told(machine, Event.RELOADED))
    assert entry["_TRANSPORT"] == "journal"
    assert entry["PRIORITY"] == "6"
    assert entry["CODE_FILE"].endswith("/tcpupperd/processes/supervisor.py")
    machine.run("systemctl", "restart", *JOURNALD)
    machine.run("systemctl", "reload", SERVICE)
    lines = ("_TRANSPORT=stdout", "PRIORITY=6")
    until(lambda: any("reloaded: " in one["MESSAGE"] for one in entries(machine, *lines)))
    machine.run("systemctl", "restart", SERVICE)
    until(lambda: told(machine, Event.READY)[-1]["_PID"] == str(main_pid(machine)))


def test_entries_go_to_the_namespace_of_a_drop_in(machine: Container) -> None:
    drop_in(machine, SERVICE, "[Service]\nLogNamespace=ours\n")
    machine.run("systemctl", "restart", SERVICE)
    pid = main_pid(machine)
    ready = (f"MESSAGE_ID={Event.READY.message_id}", f"_PID={pid}", "--output=cat")
    until(lambda: "ready: " in machine.run("journalctl", "--namespace=ours", *ready))
    assert machine.journal(*ready) == ""

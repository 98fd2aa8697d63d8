"""The metrics socket, started while the service is running."""

from pathlib import Path

from system.container import Container
from system.roots import TREE
from system.service import SERVICE, SOCKET, Conversation, is_active
from system.test_package import newer_package
from waiting import until

METRICS = "tcpupperd-metrics.socket"
KINDS = (".service", ".socket")

#: Prints what a page says; curl(1) need not be installed.
GET = """
import sys, urllib.request
with urllib.request.urlopen("http://localhost:9998" + sys.argv[1], timeout=30) as answer:
    print(answer.headers["Content-Type"], answer.read().decode(), sep="\\n")
"""


def get(machine: Container, page: str = "/metrics") -> str:
    return machine.run("python3", "-c", GET, page)


def test_metrics_start_and_stop_while_connections_are_open(
    machine: Container, package: Path
) -> None:
    assert machine.try_run("systemctl", "is-enabled", METRICS).stdout == "disabled\n"
    assert not is_active(machine, METRICS)
    assert ":9998 " not in machine.run("ss", "-tln")
    with Conversation(machine) as conversation:
        assert conversation.ask("before") == "BEFORE"
        until(lambda: is_active(machine))
        # As systemd has it, and the reason for the way that is documented.
        assert machine.try_run("systemctl", "start", METRICS).returncode

        machine.run("systemctl", "enable", METRICS)
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("restarted") == "RESTARTED"
        text = get(machine)
        assert text.startswith("text/plain; version=0.0.4\n")
        assert '\ntcpupperd_connections_handed_over_total{direction="in"} 1\n' in text
        assert "\ntcpupperd_configuration_current 1\n" in text
        assert "tcpupperd.toml, <span class=" in get(machine, "/")

        machine.run("apt-get", "install", "--yes", *newer_package(machine, package))
        assert conversation.ask("upgraded") == "UPGRADED"
        until(lambda: "\ntcpupperd_lines_total 1\n" in get(machine))

        machine.run("systemctl", "disable", "--now", METRICS)
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.ask("without") == "WITHOUT"
        assert ":9998 " not in machine.run("ss", "-tln")


def test_no_scrape_starts_what_was_stopped_or_disabled(machine: Container) -> None:
    machine.run("systemctl", "enable", METRICS)
    machine.run("systemctl", "restart", SERVICE)
    get(machine)
    for units in ([SERVICE], [SOCKET], [SOCKET, SERVICE]):
        machine.run("systemctl", "stop", *units)
        until(lambda: not is_active(machine, METRICS))
        assert machine.try_run("python3", "-c", GET, "/").returncode != 0
        assert not is_active(machine)
        machine.run("systemctl", "start", SOCKET, SERVICE)
        get(machine)
    machine.run("systemctl", "disable", "--now", SOCKET, SERVICE)
    machine.run("systemctl", "start", "sockets.target", "multi-user.target")  # as a boot does
    assert not is_active(machine, METRICS)
    assert not is_active(machine, SOCKET)


def test_presets_enable_only_the_main_units(machine: Container) -> None:
    """As at the first boot of an image."""
    machine.run("systemctl", "preset-all")
    units = machine.run("systemctl", "list-unit-files", "--no-legend", "tcpupperd*").splitlines()
    states = {unit: state for unit, state, *_ in map(str.split, units)}
    assert {unit for unit, state in states.items() if state == "enabled"} == {SERVICE, SOCKET}
    units_in_tree = [path for path in (TREE / "systemd").iterdir() if path.suffix in KINDS]
    assert len(states) == 2 * len(units_in_tree)  # each is also a template

"""An invalid configuration file and live connections: none is lost, whatever follows."""

from load.clients import LASTING
from system.container import Container
from system.service import CONFIGURATION, SERVICE, drop_in, main_pid
from system.test_handover import at_work, complaints, kill, pause, reload, restart
from waiting import until

CONNECTIONS = 500
MODULE = "/usr/lib/tcpupperd/tcpupperd/cli.py"


def test_invalid_file_closes_no_connection(machine: Container, program: str) -> None:
    """One machine for all: each action stands alone, and the last one leaves everything as it
    was."""
    with at_work(machine, program, CONNECTIONS) as clients:
        machine.write(CONFIGURATION, "workers = 2\n")
        pause(clients, reload, machine)
        machine.write(CONFIGURATION, 'log_level = "chatty"\n')
        for action in (restart, reinstall, kill, reexec, restart):
            pause(clients, action, machine)
            assert is_told(machine)
        assert machine.try_run("systemctl", "reload", SERVICE).returncode != 0
        machine.run("systemctl", "kill", "--signal=USR1", "--kill-whom=main", SERVICE)
        until(lambda: "reloads_failure=1" in machine.journal(f"--unit={SERVICE}"))
        by_hand = machine.try_run("tcpupperd", "--reload", str(main_pid(machine)))
        assert by_hand.returncode == 1
        machine.run("rm", CONFIGURATION)
        pause(clients, restart, machine)
        assert f"{CONFIGURATION}: cannot be read" in complaints(machine)
        pause(clients, restart_with_workers_that_cannot_start, machine)
        assert is_told(machine)
        machine.write(CONFIGURATION, "")
        pause(clients, reload, machine)
        assert not is_told(machine)
        pause(clients, restart_without_the_module, machine)
        assert clients.report().open == CONNECTIONS // 500 * LASTING
        assert clients.finish().faults == {}
    machine.run("systemctl", "stop", SERVICE)
    machine.write(CONFIGURATION, "next = 1\n")
    assert machine.try_run("systemctl", "start", SERVICE).returncode != 0
    assert machine.show(SERVICE, "ExecMainStatus") == "78"


def is_told(machine: Container) -> bool:
    return "running with the last good configuration" in machine.show(SERVICE, "StatusText")


def reinstall(machine: Container) -> None:
    before = main_pid(machine)
    package = machine.run("sh", "-c", "echo /mnt/tcpupperd_*.deb")
    machine.run("apt-get", "install", "--yes", "--reinstall", package)
    assert main_pid(machine) != before


def reexec(machine: Container) -> None:
    machine.run("systemctl", "daemon-reexec")
    restart(machine)


def restart_with_workers_that_cannot_start(machine: Container) -> None:
    drop_in(machine, SERVICE, "[Service]\nLimitNPROC=7\n")
    machine.write(CONFIGURATION, "workers = 9\n")
    restart(machine)
    assert "cannot start a worker" in complaints(machine)


def restart_without_the_module(machine: Container) -> None:
    """As with a package that is broken: nothing starts until another one is there."""
    machine.run("mv", MODULE, f"{MODULE}.good")
    machine.write(MODULE, "raise ImportError\n")
    machine.try_run("systemctl", "restart", SERVICE)
    until(lambda: int(machine.show(SERVICE, "NRestarts")) >= 2)
    machine.run("mv", f"{MODULE}.good", MODULE)
    until(lambda: machine.show(SERVICE, "ActiveState") == "active")

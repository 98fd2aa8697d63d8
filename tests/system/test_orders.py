"""Commands in immediate succession: nothing fails, and no client is left unanswered."""

import random

from system.container import Container
from system.service import SERVICE, Conversation, drop_in, is_active
from system.test_handover import at_work
from waiting import until

#: Connections at work meanwhile.
CONNECTIONS = 500

COMMANDS = (
    ("reload",),
    ("reload", "--no-block"),
    ("restart",),
    ("restart", "--no-block"),
    ("try-restart", "--no-block"),
    ("reload-or-restart", "--no-block"),
)


def test_any_order_of_reloads_and_restarts(machine: Container, program: str) -> None:
    """A command may be overtaken by the next; no client notices any."""
    order = random.Random(5)
    with at_work(machine, program, CONNECTIONS) as clients:
        for _ in range(30):
            machine.try_run("systemctl", *order.choice(COMMANDS), SERVICE)
        machine.run("systemctl", "restart", SERVICE)
        until(lambda: is_active(machine))
        assert clients.finish().faults == {}
    assert "Failed with" not in machine.journal(f"--unit={SERVICE}")


def test_stop_after_a_restart_leaves_no_line_unanswered_that_came_before(
    machine: Container, program: str
) -> None:
    """A client that connects while the service stops starts it again, which cancels the stop."""
    for _ in range(3):
        with at_work(machine, program, CONNECTIONS) as clients:
            clients.mark()
            machine.run("systemctl", "restart", "--no-block", SERVICE)
            machine.try_run("systemctl", "stop", SERVICE)
            machine.run("systemctl", "start", SERVICE)
            until(lambda: is_active(machine))
            assert clients.report().lost == 0


#: On a busy machine, the reload may be over before anybody has seen it.
RESTART_IN_RELOAD = f"""
    systemctl reload --no-block {SERVICE}
    for each in $(seq 50); do
        [ "$(systemctl is-active {SERVICE})" = reloading ] && break
    done
    systemctl restart {SERVICE}
"""


def test_restart_in_the_midst_of_a_reload(machine: Container) -> None:
    """SIGUSR2 goes to all processes of the unit, to the check of the reload, too."""
    with Conversation(machine) as conversation:
        for number in range(5):
            machine.run("sh", "-ec", RESTART_IN_RELOAD)
            assert conversation.ask(f"line {number}") == f"LINE {number}"
    assert "Failed with" not in machine.journal(f"--unit={SERVICE}")


def test_store_that_keeps_nothing(machine: Container) -> None:
    """FDSTORE=512 stays in the unit."""
    drop_in(machine, SERVICE, "[Service]\nFileDescriptorStoreMax=0\n")
    machine.run("systemctl", "stop", SERVICE)
    machine.run("systemctl", "start", SERVICE)
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        until(lambda: "does not keep file descriptors" in machine.journal(f"--unit={SERVICE}"))
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.end() == ""
    assert "closing 1 connection" in machine.journal(f"--unit={SERVICE}")


def test_store_that_keeps_nothing_from_now_on(machine: Container) -> None:
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        drop_in(machine, SERVICE, "[Service]\nFileDescriptorStoreMax=0\n")
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.end() == ""
    journal = machine.journal(f"--unit={SERVICE}")
    assert "closing 1 connection" in journal
    assert "Failed with" not in journal


def test_limit_of_file_sizes_costs_no_connection(machine: Container) -> None:
    """No memfd can be written."""
    drop_in(machine, SERVICE, "[Service]\nLimitFSIZE=0\n")
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        for command in ("restart", "reload", "restart"):
            machine.run("systemctl", command, SERVICE)
            assert conversation.ask(command) == command.upper()
    journal = machine.journal(f"--unit={SERVICE}")
    assert "LimitFSIZE= in the unit" in journal
    assert "bug" not in journal
    assert "Failed with" not in journal

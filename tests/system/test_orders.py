"""Commands that follow at once on each other: nothing fails, and nobody is left unanswered."""

from system.container import Container
from system.service import SERVICE, Conversation, drop_in
from waiting import until


def test_restart_in_the_midst_of_a_reload(machine: Container) -> None:
    """SIGUSR2 goes to all processes of the unit, to the check of the reload, too."""
    with Conversation(machine) as conversation:
        for number in range(5):
            machine.run("systemctl", "reload", "--no-block", SERVICE)
            until(lambda: machine.show(SERVICE, "ActiveState") == "reloading")
            machine.run("systemctl", "restart", SERVICE)
            assert conversation.ask(f"line {number}") == f"LINE {number}"
    assert "Failed with" not in machine.journal(f"--unit={SERVICE}")


def test_store_that_keeps_nothing(machine: Container) -> None:
    """FDSTORE=8 stays in the unit."""
    drop_in(machine, SERVICE, "[Service]\nFileDescriptorStoreMax=0\n")
    machine.run("systemctl", "stop", SERVICE)
    machine.run("systemctl", "start", SERVICE)
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        until(lambda: "keeps no descriptors" in machine.journal(f"--unit={SERVICE}"))
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.end() == ""
    assert "ending 1 connections" in machine.journal(f"--unit={SERVICE}")


def test_store_that_keeps_nothing_from_now_on(machine: Container) -> None:
    with Conversation(machine) as conversation:
        assert conversation.ask("one") == "ONE"
        drop_in(machine, SERVICE, "[Service]\nFileDescriptorStoreMax=0\n")
        machine.run("systemctl", "restart", SERVICE)
        assert conversation.end() == ""
    journal = machine.journal(f"--unit={SERVICE}")
    assert "ending 1 connections" in journal
    assert "Failed with" not in journal

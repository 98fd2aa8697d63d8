"""What the documentation teaches must hold: each program that it shows, at each step of it, in
the situations that show whether a daemon is one."""

import contextlib
import select
import signal
import socket
from functools import partial
from pathlib import Path

import pytest

from integration.client import Client
from integration.measures import cpu_share
from integration.models import MODELS, PREFIX, Counting, Model, Running
from integration.processes import descriptors, polled_for
from integration.service import Service
from waiting import until

ACTIVATED = [model for model in MODELS if model.is_activated]
WITH_SETTINGS = [model for model in MODELS if model.has_settings]
KEEPING = [model for model in MODELS if model.keeps_connections]


def name_of(model: Model) -> str:
    return model.name


every = pytest.mark.parametrize("model", MODELS, ids=name_of)
every_activated = pytest.mark.parametrize("model", ACTIVATED, ids=name_of)
every_with_settings = pytest.mark.parametrize("model", WITH_SETTINGS, ids=name_of)
every_keeping = pytest.mark.parametrize("model", KEEPING, ids=name_of)


@pytest.fixture
def small_limit_of_the_model(request: pytest.FixtureRequest, model: Model) -> None:
    """For the models that send descriptors: those that store a setting."""
    if model.has_settings:
        request.getfixturevalue("small_limit")


@pytest.fixture
def many_in_flight_of_the_model(request: pytest.FixtureRequest, model: Model) -> None:
    """For the models that hand connections over."""
    if model.keeps_connections:
        request.getfixturevalue("many_in_flight")


def test_models_differ() -> None:
    """Each step shows what it is about: otherwise, tests that depend on it test nothing."""
    programs = [model.files for model in MODELS]
    assert len({str(files) for files in programs}) == len(MODELS) - 1  # the sandbox is the unit's
    assert [len(group) for group in (ACTIVATED, WITH_SETTINGS, KEEPING)] == [6, 4, 2]


@every
def test_client_that_reads_slowly_gets_all_answers(
    model: Model, service: Service, tmp_path: Path
) -> None:
    with Running(model, service, tmp_path) as running:
        check_slow_client(running, running.connect(4096))


@every_activated
def test_client_of_a_unix_socket_that_reads_slowly_gets_all_answers(
    model: Model, service: Service, tmp_path: Path
) -> None:
    """There, an answer may find no room at all, and be sent later as a whole."""
    service.listener.close()
    service.address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as service.listener:
        service.listener.bind(service.address)
        service.listener.listen()
        with Running(model, service, tmp_path) as running:
            check_slow_client(running, running.connect())


def check_slow_client(running: Running, slow: Client) -> None:
    """All of its answers arrive once it reads, and others are served meanwhile."""
    sent = slow.clog(lambda: waits_to_send(running), running.model.lines)
    until(lambda: is_idle(running))
    other = running.connect()
    assert other.ask(b"one") + b"\n" == running.model.answers(b"one\n")
    slow.end()
    assert slow.read_to_end() == running.model.answers(sent)


def waits_to_send(running: Running) -> bool:
    pid = running.process.pid
    return any(polled_for(pid, fd) & select.EPOLLOUT for fd in descriptors(pid))


def is_idle(running: Running) -> bool:
    """Whether it sleeps: a program that polls what it cannot serve uses a whole CPU."""
    return cpu_share([running.process.pid], 0.2) < 0.1


@every
@pytest.mark.parametrize(("limit", "count"), [("1024:", 1100), ("300:300", 400)])
@pytest.mark.usefixtures("small_limit_of_the_model")
def test_clients_beyond_the_limit_wait(
    model: Model, service: Service, tmp_path: Path, limit: str, count: int
) -> None:
    """With the default limits, and with fewer descriptors than clients."""
    with Running(model, service, tmp_path, ("prlimit", f"--nofile={limit}")) as running:
        clients = [running.connect() for _ in range(count)]
        for client in clients:
            client.send(b"one\n")
        while clients:
            until(lambda: is_idle(running))
            served = until(partial(answered, clients))
            for client in served:
                assert client.read_line() == model.answers(b"one\n")
                client.close()
            clients = [client for client in clients if client not in served]


def answered(clients: list[Client]) -> list[Client]:
    """Those with something to read."""
    poll = select.poll()
    by_number = {client.socket.fileno(): client for client in clients}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(0)]


@every_keeping
@pytest.mark.usefixtures("small_limit")
def test_restart_at_the_limit_keeps_all_connections(
    model: Model, service: Service, tmp_path: Path
) -> None:
    wrapper = ("prlimit", "--nofile=300:300")
    with Running(model, service, tmp_path, wrapper) as running:
        clients = [running.connect() for _ in range(400)]
        for client in clients:
            client.send(b"one\n")
        until(lambda: len(answered(clients)) >= 250)
        until(lambda: is_idle(running))
        served = answered(clients)
        for client in served:
            assert client.read_line() == PREFIX + b"1\n"
    with Running(model, service, tmp_path, wrapper):
        for client in served:
            assert client.ask(b"two") == PREFIX + b"2"
            client.close()
        for client in clients:
            if client not in served:
                assert client.read_line() == PREFIX + b"1\n"


@every_with_settings
def test_typo_changes_nothing(model: Model, service: Service, tmp_path: Path) -> None:
    with Running(model, service, tmp_path) as running:
        client = running.connect()
        assert client.ask(b"one") == PREFIX + b"1"
        running.configure(b"number ")
        running.process.send_signal(signal.SIGHUP)
        service.manager.wait("RELOADING=1")
        service.manager.wait("READY=1")
        assert client.ask(b"two") == b"number 2"
        running.settings.write_text("prefix = \n")
        running.process.send_signal(signal.SIGHUP)
        service.manager.wait("RELOADING=1")
        service.manager.wait("READY=1")
        assert client.ask(b"three") == b"number 3"
        running.may_log = model.falls_back
    for _ in range(2):
        with Running(model, service, tmp_path) as running:
            running.may_log = model.falls_back
            assert running.connect().ask(b"one") == b"number 1"
            if model.keeps_connections:
                assert client.ask(b"four").startswith(b"number ")


@every_with_settings
def test_typo_at_the_first_start_is_reported(
    model: Model, service: Service, tmp_path: Path
) -> None:
    running = Running(model, service, tmp_path)
    running.settings.write_text("prefix = \n")
    assert running.run() in (1, 78)
    assert "counter.toml: Invalid value" in running.log
    assert "Traceback" not in running.log


@every_activated
@pytest.mark.usefixtures("many_in_flight_of_the_model")
def test_restarts_under_load(model: Model, service: Service, tmp_path: Path) -> None:
    """No client is refused or answered wrongly and, by a model that keeps them, none is lost."""
    counting = Counting(service.address, 300, PREFIX if model.has_settings else b"")
    with contextlib.ExitStack() as load:
        with Running(model, service, tmp_path) as running:
            slow = running.connect(4096)
            sent = slow.clog(lambda: waits_to_send(running), model.lines)
            load.enter_context(counting)
            counting.go_on()
        for _ in range(2):
            with Running(model, service, tmp_path):
                counting.go_on()
        with Running(model, service, tmp_path):
            counting.go_on()
            load.close()
            if model.keeps_connections:
                slow.end()
                assert slow.read_to_end() == model.answers(sent)
    assert set(counting.faults) <= (set() if model.keeps_connections else {"lost"})


@every
def test_next_process_serves_after_a_kill(model: Model, service: Service, tmp_path: Path) -> None:
    with Running(model, service, tmp_path) as running:
        lost = running.connect()
        assert lost.ask(b"one") + b"\n" == model.answers(b"one\n")
        running.process.kill()
        lost.wait_for_end()
        waiting = running.connect() if model.is_activated else None
    with Running(model, service, tmp_path) as running:
        client = waiting or running.connect()
        assert client.ask(b"one") + b"\n" == model.answers(b"one\n")

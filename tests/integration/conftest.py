"""What the integration tests share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.client import Client
from integration.embedding import ANY_PORT, CountingServer, connected, serving
from integration.journal import Journal
from integration.manager import Manager
from integration.service import Service


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for a `python` runs with each that has a version of python-daemon."""
    if "python" in metafunc.fixturenames:
        from integration.background import VERSIONS  # which starts processes to find out

        metafunc.parametrize("python", VERSIONS.values(), ids=list(VERSIONS))


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with serving(CountingServer(ANY_PORT)) as server:
        yield server


@pytest.fixture
def client(server: CountingServer) -> Iterator[Client]:
    with connected(server) as client:
        yield client


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Manager(str(tmp_path / "notify"), store=True) as manager:
        service = Service(manager)
        with service.listener:
            yield service
            for client in service.clients:
                client.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path)) as journal:
        yield journal

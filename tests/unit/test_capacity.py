"""How many connections a limit of descriptors allows."""

from hypothesis import given
from hypothesis import strategies as st

from outlive.channel import BATCH
from tcpupperd.config import Config
from tcpupperd.processes.capacity import capacity
from tcpupperd.serving.acceptor import PRIVILEGED_EXTRA


def test_usual_limit_does_not_bind() -> None:
    config = Config(workers=16)
    allowed = capacity(config, 524_288, kept=True)
    assert allowed.accepted == config.max_connections
    assert allowed.batch == BATCH
    assert allowed.problem(config) == ""


def test_limit_that_binds_is_named() -> None:
    config = Config(workers=2)
    problem = capacity(config, 1024, kept=True).problem(config)
    assert "max_connections is 10000" in problem
    assert "each worker will accept at most 471 connections: with 2 workers" in problem
    assert "1024 descriptors (RLIMIT_NOFILE; LimitNOFILE= in the unit)" in problem


def test_without_a_store_each_worker_has_the_limit_to_itself() -> None:
    config = Config(workers=64)
    allowed = capacity(config, 1024, kept=False)
    assert allowed.accepted == allowed.descriptors == 1024 - BATCH - 64


@given(st.integers(1, 64), st.integers(256, 10**6), st.integers(1, 10**6))
def test_all_can_be_in_flight(workers: int, limit: int, most: int) -> None:
    config = Config(workers=workers, max_connections=most)
    allowed = capacity(config, limit, kept=True)
    assert 1 <= allowed.accepted <= most
    # Each worker's last message may have room left.
    assert workers * allowed.accepted + allowed.messages + workers <= limit
    if allowed.total_connections > workers:
        assert (
            workers * (allowed.accepted + PRIVILEGED_EXTRA) + allowed.messages + workers <= limit
        )
    assert allowed.accepted <= allowed.descriptors
    assert allowed.descriptors + allowed.batch < limit

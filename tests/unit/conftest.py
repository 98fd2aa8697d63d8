"""What the unit tests share."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# By default an example may take 200 ms, which a busy machine does not always give it.
settings.register_profile("bounded by examples, not by time", deadline=None)
settings.load_profile("bounded by examples, not by time")


def open_descriptors() -> set[int]:
    """The descriptors of this process, less the one that lists them."""
    listed = os.listdir("/proc/self/fd")
    return {int(name) for name in listed if os.path.lexists(f"/proc/self/fd/{name}")}


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Fails the test if it leaves more descriptors open than it found."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before

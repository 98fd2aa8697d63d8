"""What the unit tests share."""

import gc
import os
from collections.abc import Iterator

import pytest

from outlive.channel import Channel, open_channel
from unit.channels import NOBODY


def open_descriptors() -> set[int]:
    """The descriptors of this process, less the one that lists them."""
    listed = os.listdir("/proc/self/fd")
    return {int(name) for name in listed if os.path.lexists(f"/proc/self/fd/{name}")}


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Fails the test if it leaves more descriptors open than it found."""
    gc.disable()  # otherwise, what an earlier test left could be closed meanwhile
    try:
        before = open_descriptors()
        yield
        assert open_descriptors() <= before
    finally:
        gc.enable()


@pytest.fixture
def channel(no_leak: None) -> Iterator[Channel]:
    channel = open_channel({}, NOBODY, store=False)
    yield channel
    channel.send_end.close()
    channel.receive_end.close()

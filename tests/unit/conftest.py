"""What the unit tests share."""

import gc
import os
import resource
from collections.abc import Iterator

import pytest
from hypothesis import settings

from outlive.channel import Channel, open_channel
from unit.channels import NOBODY

# By default an example may take 200 ms, which a busy machine does not always give it.
settings.register_profile("bounded by examples, not by time", deadline=None)
settings.load_profile("bounded by examples, not by time")
# For builds of packages: --hypothesis-profile=reproducible.
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)

# The usual limit is 1024, which is less than the connections that a test opens.
_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard_limit), hard_limit))


def open_descriptors() -> set[int]:
    """The descriptors of this process, less the one that lists them."""
    listed = os.listdir("/proc/self/fd")
    return {int(name) for name in listed if os.path.lexists(f"/proc/self/fd/{name}")}


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Fails the test if it leaves more descriptors open than it found."""
    gc.collect()  # what an earlier test has left may be closed meanwhile
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.fixture
def channel(no_leak: None) -> Iterator[Channel]:
    channel = open_channel({}, NOBODY, store=False)
    yield channel
    channel.send_end.close()
    channel.receive_end.close()

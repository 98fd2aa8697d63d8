"""What fuzzing found is tried again, and bytes at random; `make soak` fuzzes on."""

import random
from pathlib import Path

import pytest

from fuzz.targets import TARGETS, run
from integration.measures import scaled

CORPUS = Path(__file__).parents[1] / "fuzz/corpus"
INPUTS = scaled(1_000, 1_000_000)


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(target: str) -> None:
    inputs = [path.read_bytes() for path in (CORPUS / target).iterdir()]
    assert inputs
    for data in inputs:
        run(target, data)


@pytest.mark.parametrize("target", TARGETS)
def test_random_bytes(target: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(INPUTS):
        run(target, chance.randbytes(chance.randrange(200)))


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_with_errors(target: str) -> None:
    """A few bytes changed: most of it is understood, and then comes something odd."""
    inputs = [path.read_bytes() for path in (CORPUS / target).iterdir()]
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(INPUTS):
        data = bytearray(chance.choice(inputs))
        for _ in range(chance.randrange(5)):
            place = chance.randrange(len(data) + 1)
            data[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        run(target, bytes(data))

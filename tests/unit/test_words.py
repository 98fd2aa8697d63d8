"""Numbers in messages."""

import pytest

from tcpupperd.words import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 lines"), (1, "1 line"), (2, "2 lines")])
def test_noun_agrees_with_its_number(number: int, text: str) -> None:
    assert counted(number, "line") == text

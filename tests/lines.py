"""What happens to a process at a chosen line of its program."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def before_line(number: int, is_counted: Callable[[str], bool], act: Callable[[], None]) -> None:
    """Have this thread call `act` before it runs a line: this number of them, from 1, in the files
    whose path `is_counted`."""
    left = number

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not is_counted(frame.f_code.co_filename):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                act()
        return trace

    sys.settrace(trace)

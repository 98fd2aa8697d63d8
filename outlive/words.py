"""Numbers in messages."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 line", "2 lines"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"

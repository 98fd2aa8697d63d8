"""The client takes a greeting out of what it receives."""

from tcpupperd.client.greeting import LONGEST, Greeting


def test_greeting_comes_before_the_answer() -> None:
    greeting = Greeting(is_expected=True)
    assert [greeting.strip(part) for part in (b"web", b"1\nHEL", b"LO\n")] == [
        b"",
        b"HEL",
        b"LO\n",
    ]
    assert (greeting.text, greeting.is_due) == ("web1", False)


def test_without_a_greeting_all_is_answer() -> None:
    assert Greeting(is_expected=False).strip(b"HELLO\n") == b"HELLO\n"


def test_endless_greeting_takes_no_memory() -> None:
    greeting = Greeting(is_expected=True)
    for _ in range(3):
        assert greeting.strip(b"x" * LONGEST) == b""
    assert len(greeting.text) == LONGEST


def test_greeting_cannot_control_a_terminal() -> None:
    greeting = Greeting(is_expected=True)
    greeting.strip(b"\x1b[2Jweb1\r\n")
    assert greeting.text == "?[2Jweb1?"

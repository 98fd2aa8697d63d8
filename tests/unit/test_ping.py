"""What a ping asks, verifies, counts and measures, without a connection."""

import pytest

from tcpupperd.client.options import PingOptions, parse_arguments
from tcpupperd.client.pending_lines import PendingLines, WrongAnswerError
from tcpupperd.client.ping_statistics import PingStatistics, Times, duration, milliseconds

# Lines and answers


def test_answers_are_matched_in_order() -> None:
    lines = PendingLines("run 7")
    assert [lines.ask(10.0), lines.ask(11.0)] == [b"run 7 seq=1\n", b"run 7 seq=2\n"]
    assert list(lines.receive(b"RUN 7 SEQ=1\nRUN 7 SEQ=2\n")) == [(1, 10.0), (2, 11.0)]
    assert not lines.pending


def test_answers_may_come_in_pieces() -> None:
    lines = PendingLines("run")
    lines.ask(1.0)
    lines.ask(2.0)
    pieces = [b"RU", b"N SEQ=1", b"\nRUN SE", b"Q=2\n"]
    assert [list(lines.receive(piece)) for piece in pieces] == [[], [], [(1, 1.0)], [(2, 2.0)]]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (b"run seq=1\n", r"'run seq=1\n'"),  # an echo
        (b"RUN SEQ=2\n", r"'RUN SEQ=2\n'"),  # of another line
        (b"RUN SEQ=1 \n", r"'RUN SEQ=1 \n'"),
        (b"X" * 1000, repr("X" * 60)),
    ],
)
def test_wrong_answer(answer: bytes, shown: str) -> None:
    lines = PendingLines("run")
    lines.ask(1.0)
    with pytest.raises(WrongAnswerError) as told:
        list(lines.receive(answer))
    assert str(told.value) == shown
    assert lines.give_up() == [1]


def test_unsolicited_data_is_wrong() -> None:
    with pytest.raises(WrongAnswerError):
        list(PendingLines("run").receive(b"220 ready\r\n"))


def test_after_giving_up_nothing_is_left_of_an_answer() -> None:
    lines = PendingLines("run")
    lines.ask(1.0)
    assert list(lines.receive(b"RUN S")) == []
    assert lines.give_up() == [1]
    assert lines.ask(2.0) == b"run seq=2\n" == lines.unanswered()
    assert list(lines.receive(b"RUN SEQ=2\n")) == [(2, 2.0)]


# Counts and times


def test_times() -> None:
    times = Times()
    for number in range(1, 1001):
        times.add(number / 1000)
    assert (times.count, times.least, times.most) == (1000, 0.001, 1.0)
    assert times.mean == pytest.approx(0.5005)
    assert 0.99 <= times.percentile(0.99) <= 0.99 * 1.0101
    assert times.percentile(1.0) == 1.0


def test_percentile_of_one_time_is_that_time() -> None:
    times = Times()
    times.add(0.0002)
    assert times.percentile(0.99) == 0.0002


def test_memory_of_times_does_not_grow_with_their_number() -> None:
    times = Times()
    for number in range(100_000):
        times.add(1e-6 * 1.0002**number)  # from a microsecond to eight minutes
    assert len(times._buckets) < 2100


def test_summary_of_a_perfect_run() -> None:
    statistics = PingStatistics()
    statistics.sent = 2
    statistics.add_answer(0.0002)
    statistics.add_answer(0.0004)
    statistics.add_gap(0.0004)
    assert statistics.is_perfect
    assert statistics.summary() == (
        "2 sent, 2 answered, 0 lost (0 %), 0 wrong, 0 disconnected, 0 reconnected, longest gap"
        " 0.400 ms\n"
        "time min/avg/max/p99 = 0.200/0.300/0.400/0.400 ms\n"
    )


def test_summary_without_an_answer_has_no_times() -> None:
    statistics = PingStatistics()
    statistics.sent = statistics.lost = 3
    statistics.add_gap(2.5)
    assert not statistics.is_perfect
    expected = "3 sent, 0 answered, 3 lost (100 %), 0 wrong, 0 disconnected, 0 reconnected\n"
    assert statistics.summary() == expected


def test_lost_connection_is_not_perfect_even_if_nothing_is_lost() -> None:
    statistics = PingStatistics()
    statistics.sent = statistics.answered = statistics.disconnected = 1
    assert statistics.is_complete
    assert not statistics.is_perfect


def test_nothing_sent_is_not_perfect() -> None:
    assert not PingStatistics().is_perfect


def test_wrong_data_is_not_perfect_even_if_nothing_is_lost() -> None:
    statistics = PingStatistics()
    statistics.sent = statistics.answered = statistics.wrong = 1
    assert not statistics.is_perfect


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.000021, "0.021"), (0.00021, "0.210"), (0.0021, "2.10"), (0.021, "21.0"), (2.1, "2100")],
)
def test_milliseconds_are_written_as_by_ping(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "200 ms"), (1.0, "1.00 s"), (75, "75.00 s")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# The command line


def test_defaults() -> None:
    options = parse_arguments(["--ping"])
    assert isinstance(options, PingOptions)
    assert options.endpoint.name == "localhost:9999"
    assert (options.interval, options.count, options.deadline) == (1.0, None, None)
    assert (options.connections, options.timeout, options.show) == (1, 10.0, "all")


def test_options_of_ping_are_those_of_ping() -> None:
    words = ["-c3", "-i", "0.2", "-w", "5", "-q", "--connections", "7", "--ping", "--port", "7"]
    options = parse_arguments(words)
    assert isinstance(options, PingOptions)
    assert (options.count, options.interval, options.deadline) == (3, 0.2, 5.0)
    assert (options.show, options.connections, options.endpoint.port) == ("summary", 7, 7)


def test_ping_after_two_dashes_is_text() -> None:
    options = parse_arguments(["--", "--ping"])
    assert not isinstance(options, PingOptions)
    assert options.text == ["--ping"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-c", "0"], "'0' is not a number from 1 to 999999999"),
        (["-c", "1_0"], "'1_0' is not a number from 1 to 999999999"),
        (["-i", "0"], "'0' is not a number of seconds from 0.001 to 86400"),
        (["-i", "nan"], "'nan' is not a number of seconds from 0.001 to 86400"),
        (["-w", "0"], "'0' is not a number of seconds greater than 0"),
        (["--connections", "0"], "'0' is not a number from 1 to 999999999"),
        (["example.org"], "unexpected argument: 'example.org'"),
    ],
)
def test_usage_errors_end_with_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--ping", *arguments])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err

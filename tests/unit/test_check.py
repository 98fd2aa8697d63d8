"""`tcpupper --check`: its command line, and what it prints."""

import pytest

from tcpupperd.client.check import performance, rate
from tcpupperd.client.options import CheckOptions, parse_arguments
from tcpupperd.client.plugin import CRITICAL, OK, UNKNOWN, WARNING, report


def check_options(*words: str) -> CheckOptions:
    options = parse_arguments(["--check", *words])
    assert isinstance(options, CheckOptions)
    return options


LIMITS = check_options("--warning", "0.5", "--critical", "1")
NO_LIMITS = check_options("--timeout", "2.5")


@pytest.mark.parametrize(
    ("seconds", "status"), [(0.4, OK), (0.5, OK), (0.6, WARNING), (1.0, WARNING), (1.1, CRITICAL)]
)
def test_time_decides_on_the_status(seconds: float, status: int) -> None:
    assert rate(LIMITS, seconds) == status
    assert rate(NO_LIMITS, seconds) == OK


def test_performance_data() -> None:
    assert performance(LIMITS, 0.000213) == "time=0.000213s;0.5;1;0;10"
    assert performance(NO_LIMITS, 1.5) == "time=1.500000s;;;0;2.5"


def test_line_is_one_line_with_one_bar(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert report(CRITICAL, "a|b\nc", "time=1s;;;;") == 2
    assert capfdbinary.readouterr().out == b"TCPUPPER CRITICAL: a/b?c | time=1s;;;;\n"


def test_options_have_the_letters_of_plugins() -> None:
    options = check_options("-H::1", "-p", "7", "-w", "0.5", "-c", "1", "-t", "2", "-v")
    assert (options.endpoint.name, options.verbose) == ("[::1]:7", True)
    assert (options.warning, options.critical, options.timeout) == (0.5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-w", "x"], "argument -w/--warning: 'x' is not a number of seconds"),
        (["-w", "2", "-c", "1"], "--warning 2 has no effect, because --critical is only 1"),
        (["--ping"], "--ping and --check cannot be used together"),
        (
            ["localhost"],
            "unexpected argument: 'localhost'; use --host localhost to specify the server",
        ),
        (["--unix", "/x", "--port", "1"], "--unix cannot be used together with"),
        (["-i", "1"], "-i: unknown option"),
    ],
)
def test_invalid_command_line_is_unknown(
    arguments: list[str], complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--check", *arguments])
    assert ended.value.code == UNKNOWN
    told = capfd.readouterr().out
    assert told.startswith(f"TCPUPPER UNKNOWN: {complaint}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("option", ["--help", "--version", "-V"])
def test_information_is_not_ok(option: str) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--check", option])
    assert ended.value.code == UNKNOWN

"""The client's command line, and what it calls the server."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tcpupperd import __version__
from tcpupperd.client.options import parse_arguments
from tcpupperd.serving.lab import LONGEST

ROOT = Path(__file__).parents[2]


def test_defaults_name_the_default_server() -> None:
    options = parse_arguments([])
    assert options.endpoint.name == "localhost:9999"
    assert (options.endpoint.unix, options.timeout, options.text) == (None, 10.0, [])


def test_lab_has_defaults_of_its_own() -> None:
    options = parse_arguments(["--lab", "wait", "1", "a"])
    assert options.endpoint.name == "localhost:9992"
    assert options.text == ["wait", "1", "a"]
    assert options.timeout > LONGEST


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--host", "example.org", "--port", "7"], "example.org:7"),
        (["--host", "::1"], "[::1]:9999"),
        (["--host", "[::1]"], "[::1]:9999"),
        (["--host", "[fe80::1%lo]", "--port", "7"], "[fe80::1%lo]:7"),
        (["--unix", "/run/tcpupperd.sock"], "/run/tcpupperd.sock"),
        (["--unix", "@tcpupperd"], "@tcpupperd"),
    ],
)
def test_server_is_named_as_the_user_knows_it(arguments: list[str], name: str) -> None:
    assert parse_arguments(arguments).endpoint.name == name


@pytest.mark.parametrize(
    "arguments",
    [["a", "b", "--port", "7"], ["--port", "7", "a", "b"], ["--port=7", "--", "a", "b"]],
)
def test_text_may_stand_before_or_after_options(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    assert (options.endpoint.port, options.text) == (7, ["a", "b"])


def test_number_is_text_unless_it_is_an_option() -> None:
    options = parse_arguments(["-5", "-4"])
    assert (options.text, options.endpoint.family) == (["-5"], socket.AF_INET)


@pytest.mark.parametrize("text", ["::1", "[::1]"])
def test_address_to_connect_from_decides_on_the_family(text: str) -> None:
    endpoint = parse_arguments(["--bind", text]).endpoint
    assert (endpoint.family, endpoint.source) == (socket.AF_INET6, ("::1", 0, 0, 0))


def test_text_after_two_dashes_may_look_like_an_option() -> None:
    assert parse_arguments(["--", "--port", "7"]).text == ["--port", "7"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "0"], "'0' is not a port number from 1 to 65535"),
        (["--port", "65536"], "'65536' is not a port number from 1 to 65535"),
        (["--port", "http"], "'http' is not a port number from 1 to 65535"),
        (["--timeout", "0"], "'0' is not a number of seconds"),
        (["--timeout", "nan"], "'nan' is not a number of seconds"),
        (["--timeout", "inf"], "'inf' is not a number of seconds"),
        (["--timeout", "soon"], "'soon' is not a number of seconds"),
        (["--unix", "/run/x", "--port", "1"], "--unix cannot be used together with"),
        (["--unix", "/run/x", "--host", "x"], "--unix cannot be used together with"),
        (["--host", "localhost:99"], "includes a port; use --host localhost --port 99"),
        (["--host", "localhost:"], "includes a port; use --host localhost --port PORT"),
        (["--host", "[::1]:99"], "includes a port; use --host [::1] --port 99"),
        (["--hos", "x"], "--hos: unknown option; did you mean --host?"),
        (["--hots=x", "hello"], "--hots: unknown option; did you mean --host?"),
        (["-x"], "-x: unknown option"),
        (["-4", "-6"], "argument -6: not allowed with argument -4"),
        (["--bind", "127.1"], "argument --bind: '127.1' is not an IP address"),
        (["--bind", "example.org"], "argument --bind: 'example.org' is not an IP address"),
        (["--bind", "fe80::1%nowhere"], "argument --bind: 'fe80::1%nowhere' is not an IP address"),
        (["-6", "--bind", "127.0.0.1"], "the --bind address does not belong to the family"),
        (["--unix", "/run/x", "-4"], "-4, -6 and --bind apply to IP addresses and cannot"),
    ],
)
def test_usage_errors_end_with_status_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(arguments)
    assert ended.value.code == 2
    wrong, remedy = capsys.readouterr().err.splitlines()
    assert wrong.startswith("tcpupper: ")
    assert complaint in wrong
    assert remedy == "Try 'tcpupper --help' for more information."


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--version"])
    assert ended.value.code == 0
    assert capfd.readouterr().out == f"tcpupper {__version__}\n"


@pytest.mark.parametrize("use", ["exchange", "ping", "check"])
def test_client_imports_nothing_slow_and_nothing_of_the_daemon(use: str) -> None:
    report = f"import sys, tcpupperd.client.command, tcpupperd.client.{use}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", report], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"asyncio", "dataclasses", "logging", "tomllib", "tqdm", "typing"} & set(loaded)
    shared = {name for name in loaded if name.startswith("tcpupperd.") and "client" not in name}
    values = {"arguments", "errors", "output", "words"}
    assert shared <= {f"tcpupperd.{name}" for name in values}

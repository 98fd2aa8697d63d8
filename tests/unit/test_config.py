"""Settings: their values, their names, and what is said of errors."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpupperd.address import SERVICES
from tcpupperd.config import SETTINGS, Config
from tcpupperd.config_file import ERRORS_MAX, explain, load, parse
from tcpupperd.settings import Setting
from unit.configurations import BY_NAME, NAMES, SECONDS, WHOLE, WORDS, complaint, write

#: The settings of other kinds, and what their values must be.
OTHERS = {
    "listen": 'must be a list of addresses, for example ["localhost:9999"]',
    "proxy_from": 'must be a list of addresses and networks, for example ["192.0.2.0/24"]',
    "greeting": "must be a line of up to 200 characters;"
    " it may contain {host}, {instance}, {worker}, {client}, {balancer}, {balancer_port},"
    " {destination}, {authority}, {alpn}, {tls_version}, {tls_cipher}, {tls_cn}, {unique_id},"
    " {aws_vpce_id}, {gcp_psc_connection_id}, {azure_link_id}",
    "log_connections": "must be true or false",
}


def must_be(name: str) -> str:
    """What the message says that a value must be."""
    if name in WORDS:
        return "must be one of " + ", ".join(f'"{word}"' for word in WORDS[name])
    if name in SECONDS:
        return "must be a number of seconds from {} to {}".format(*SECONDS[name])
    if name in OTHERS:
        return OTHERS[name]
    what = '"auto" or a whole number' if name == "workers" else "a whole number"
    return f"must be {what} from {WHOLE[name][0]} to {WHOLE[name][1]}"


GOOD = [
    *((name, str(value)) for name, limits in WHOLE.items() for value in limits),
    *((name, str(value)) for name, limits in SECONDS.items() for value in limits),
    *((name, f'"{word}"') for name, words in WORDS.items() for word in words),
    ("idle_timeout", "0.5"),
    ("idle_timeout", "1e3"),
    ("workers", '"auto"'),
    ("max_line", "0x1000"),
    ("max_line", "65_536"),
    ("listen", '["localhost:9999"]'),
    ("listen", '["127.0.0.1:0", "[::1]:0", "9999", "/run/socket", "@name"]'),
    ("listen", '["upper=localhost:9999", "upper=/run/socket"]'),
    ("proxy_from", "[]"),
    ("greeting", '"hello"'),
    ("log_connections", "true"),
    ("log_connections", "false"),
    ("greeting", '"{host} {instance} {worker} {client} {client}"'),
    ("proxy_from", '["192.0.2.1", "10.0.0.0/8", "::1", "2001:db8::/32"]'),
]

#: The two kinds of settings that are whole numbers: one may be "auto", too.
MIXED = ("workers", "max_line")

# As in the file, and as the message shows it.
BAD = [
    *((name, str(low - 1), None) for name, (low, _) in WHOLE.items()),
    *((name, str(high + 1), None) for name, (_, high) in WHOLE.items()),
    *((name, text, None) for name in MIXED for text in ("1.0", '"1"', "true", "[1]", "-1")),
    *((name, "{}", None) for name in NAMES),
    *((name, "-1", None) for name in SECONDS),
    *((name, f"{high + 1}", None) for name, (_, high) in SECONDS.items()),
    *(("keepalive", text, None) for text in ("inf", "nan", '"1"', "false", "[1]")),
    *(("framing", text, None) for text in ("1", '""', "true", '["line"]', '"LINE"', '" line"')),
    ("log_level", '"INFO"', None),
    ("workers", '"Auto"', None),
    ("workers", '""', None),
    ("idle_timeout", "86400.5", None),
    ("idle_timeout", "-0.001", None),
    ("listen", "[]", None),
    ("listen", '"9999"', None),
    ("listen", "9999", None),
    ("listen", "[9999]", None),
    ("listen", '["9999", 9999]', None),
    ("listen", '[["9999"]]', '[["9999"]]'),
    ("proxy_from", '"::1"', None),
    ("proxy_from", "[10]", None),
    ("greeting", '"{user}"', None),
    ("greeting", '"{"', None),
    ("greeting", '"{host:5}"', None),
    ("greeting", '"{{host}}"', None),
    ("greeting", '"a\\nb"', None),
    ("greeting", "true", None),
    ("log_connections", "1", None),
    ("log_connections", '"true"', None),
]


# Values


def test_every_setting_is_tried_here() -> None:
    assert {*WHOLE, *SECONDS, *WORDS, *OTHERS} == set(NAMES)
    assert {name for name, _ in GOOD} == {name for name, *_ in BAD} == set(NAMES)


def test_without_a_file_all_have_their_defaults() -> None:
    defaults = {setting.name: setting.default for setting in SETTINGS}
    assert vars(load(None, {})) == vars(Config()) == defaults


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_defaults_are_allowed_values(setting: Setting[Any]) -> None:
    assert setting.check(setting.default) == setting.default


@pytest.mark.parametrize(("name", "text"), GOOD)
def test_good_value_is_taken(tmp_path: Path, name: str, text: str) -> None:
    line = f"{name} = {text}"
    value = getattr(load(write(tmp_path, line), {}), name)
    expected = tomllib.loads(line)[name]
    assert value == (tuple(expected) if isinstance(expected, list) else expected)


@pytest.mark.parametrize(("name", "text", "shown"), BAD)
def test_bad_value_is_named_with_line_and_remedy(
    tmp_path: Path, name: str, text: str, shown: str | None
) -> None:
    path = write(tmp_path, f"# a comment\n\n{name} = {text}\n")
    assert complaint(path) == f"3: {name} = {shown or text}: {must_be(name)}"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (
            "localhost:65536",
            "must be host:port, [::1]:port, port, /path or @abstract (0 to 65535)",
        ),
        ("localhost", "must be host:port, [::1]:port, port, /path or @abstract (0 to 65535)"),
        ("300.1.1.1:9999", '"300.1.1.1" is not an IPv4 address'),
        ("[::g]:9999", '"::g" is not an IPv6 address'),
        ("@", "a socket path must be 1 to 107 bytes long and contain no NUL"),
        ("lower=9999", f'unknown service "lower"; the services are {", ".join(SERVICES)}'),
    ],
)
def test_bad_address_is_named(tmp_path: Path, address: str, reason: str) -> None:
    path = write(tmp_path, f'listen = ["9999", "{address}"]')
    assert complaint(path) == f'1: listen = ["9999", "{address}"]: "{address}": {reason}'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("[" + "1, " * 100 + "1]", "[" + "1, " * 25 + "1..."),
        ("1" * 4000, "1" * 77 + "..."),
        ("0x" + "f" * 10000, "a number too long to display"),
        ("[0x" + "f" * 10000 + "]", "a number too long to display"),
    ],
    ids=["list", "decimal", "hexadecimal", "hexadecimal in a list"],
)
def test_long_value_is_shortened_in_the_message(tmp_path: Path, value: str, shown: str) -> None:
    path = write(tmp_path, f"max_line = {value}")
    assert complaint(path) == f"1: max_line = {shown}: {must_be('max_line')}"


def test_date_is_no_number(tmp_path: Path) -> None:
    path = write(tmp_path, "max_line = 2026-11-22")
    assert complaint(path).endswith(must_be("max_line"))


# Names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_lines", "did you mean max_line?"),
        ("max-line", "did you mean max_line?"),
        ("Workers", "did you mean workers?"),
        ("idle_timout", "did you mean idle_timeout?"),
        ("port", "the settings are " + ", ".join(NAMES)),
        ("colour", "the settings are " + ", ".join(NAMES)),
    ],
)
def test_unknown_name_is_an_error_with_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    path = write(tmp_path, f"workers = 1\n{name} = 1\n")
    assert complaint(path) == f"2: {name}: unknown setting; {hint}"


def test_table_is_an_unknown_name_at_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\n\n[tcpupperd]\nmax_line = 1\n")
    assert complaint(path).startswith("3: tcpupperd: unknown setting; ")


def test_name_that_does_not_stand_in_the_file_as_it_is_has_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, '"max_\\u006cine" = 0')
    assert complaint(path) == f" max_line = 0: {must_be('max_line')}"


def test_setting_that_is_given_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\nworkers = 2\n")
    assert complaint(path) == (
        "2: invalid TOML: workers is already set in line 1; set it only once"
    )


def test_date_is_shown_as_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 2024-01-01\nlisten = [2024-01-01]\n")
    first, second = complaint(path).splitlines()
    assert first.startswith("1: workers = 2024-01-01: must be")
    assert " listen = [2024-01-01]: must be" in second


# Several errors

#: The content, and what is said of it in turn, in brief. After an error of syntax, the rest could
#: mean anything.
SEVERAL = {
    "values": ("max_line = 0\nworkers = 1\nframing = 1\n", ["1: max_line", "3: framing"]),
    "names and values": ("colour = 1\nmax_line = 0\n", ["1: colour", "2: max_line"]),
    "syntax and values": ("max_line = 0\nworkers = 1 2\nwrokers = 1\n", ["2: invalid TOML"]),
    "a list over several lines": (
        'max_line = 0\nlisten = [\n"9999",\n"x",\n]\nworkers = 0\n',
        ["1: max_line", "2: listen", "6: workers"],
    ),
    "an open list": ('listen = ["9999",\nworkers = 1\nmax_line = 0\n', ["2: invalid TOML"]),
}


@pytest.mark.parametrize(("content", "brief"), SEVERAL.values(), ids=SEVERAL)
def test_every_invalid_setting_or_the_first_error_of_syntax_is_reported(
    tmp_path: Path, content: str, brief: list[str]
) -> None:
    path = write(tmp_path, content)
    lines = complaint(path).replace(f"{path}:", "").splitlines()
    assert [line[: len(start)] for line, start in zip(lines, brief, strict=True)] == brief


def test_endless_errors_are_limited(tmp_path: Path) -> None:
    path = write(tmp_path, "".join(f"x{number} = 1\n" for number in range(1000)))
    lines = complaint(path).splitlines()
    assert len(lines) == ERRORS_MAX + 1
    assert lines[-1].endswith(" only the first 20 errors are shown")


@pytest.mark.parametrize("name", ["a\\nb", "a" * 10_000])
def test_odd_name_takes_one_line(tmp_path: Path, name: str) -> None:
    message = complaint(write(tmp_path, f'"{name}" = 1'))
    assert len(message) < 500
    assert "\n" not in message


# The resulting configuration


def test_explanation_is_the_configuration_with_its_origins(tmp_path: Path) -> None:
    path = write(tmp_path, "# mine\nidle_timeout = 0.5\nmax_line = 7\n")
    lines = explain(path, {"max_line": 9})
    assert f"idle_timeout = 0.5  # {path}:2" in lines
    assert "max_line = 9  # command line" in lines
    assert 'framing = "line"  # default' in lines
    assert "line_timeout = 60  # default" in lines
    assert [line.split()[0] for line in lines] == NAMES


@given(st.lists(st.text().map(lambda s: "@x" + s[:20])))
@example(["@é", '@"\\', "@\x7f", "/new\nline"])
def test_explanation_reads_back_as_the_same(listen: list[str]) -> None:
    given = {"listen": ["9999", *(text.replace("\0", "") for text in listen)], "max_line": 1}
    loaded = parse("\n".join(explain(None, given)), "test")
    assert vars(Config(**loaded)) == vars(load(None, given))


# Command line


def test_option_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 3\nmax_line = 5\n")
    loaded = load(path, {"workers": 7})
    assert (loaded.workers, loaded.max_line) == (7, 5)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("workers", "auto", "auto"),
        ("workers", "4", 4),
        ("max_line", "+5", 5),
        ("idle_timeout", "2", 2.0),
        ("idle_timeout", "2.5", 2.5),
        ("framing", "none", "none"),
        ("listen", "9999", ("9999",)),
        ("greeting", "220", "220"),
        ("greeting", "2.5", "2.5"),
        ("greeting", "true", "true"),
    ],
)
def test_option_has_the_meaning_of_the_setting(name: str, text: str, value: Any) -> None:
    found = BY_NAME[name].from_text(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("workers", "0"),
        ("workers", "two"),
        ("workers", "4.0"),
        ("max_line", ""),
        ("max_line", "1e3"),
        ("max_line", "٣"),
        ("max_line", "9" * 30),
        ("max_line", "1_000"),
        ("idle_timeout", "nan"),
        ("idle_timeout", "inf"),
        ("idle_timeout", "-1"),
        ("framing", "1"),
        ("log_level", "INFO"),
    ],
)
def test_invalid_option_is_rejected_with_the_valid_values(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(must_be(name))):
        BY_NAME[name].from_text(text)


@given(st.sampled_from(SETTINGS), st.text())
def test_option_is_a_good_value_or_a_value_error(setting: Setting[Any], text: str) -> None:
    try:
        value = setting.from_text(text)
    except ValueError:
        return
    assert setting.check(value) == value


# Config


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot change workers"):
        Config().workers = 2


def test_unknown_keyword_is_a_bug() -> None:
    with pytest.raises(TypeError, match=r"wrokers: unknown setting; did you mean workers\?"):
        Config(wrokers=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_line", -5), ("framing", "lines"), ("idle_timeout", "1"), ("listen", ())],
)
def test_value_in_a_program_is_checked_too(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} = .*: {re.escape(must_be(name))}$"):
        Config(**{name: value})


def test_auto_is_the_number_of_usable_cpus() -> None:
    assert Config().worker_count == len(os.sched_getaffinity(0))
    assert Config(workers=3).worker_count == 3

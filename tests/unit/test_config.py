"""The settings: right values, wrong ones with their messages, and the documents that name them."""

import datetime
import os
import re
import threading
import tomllib
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tcpupperd import config
from tcpupperd.config import (
    ERRORS_MAX,
    FILE_SIZE_MAX,
    SETTINGS,
    Config,
    ConfigError,
    explain,
    from_text,
    load,
    parse,
)

ROOT = Path(__file__).parents[2]
NAMES = [setting.name for setting in SETTINGS]
BY_NAME = {setting.name: setting for setting in SETTINGS}

WHOLE = {
    "workers": (1, 1024),
    "lines_per_connection": (0, 2**31 - 1),
    "max_line": (1, 2**30),
    "max_connections": (1, 10**6),
    "max_connections_per_source": (0, 10**6),
}
SECONDS = {
    "idle_timeout": (0, 86400),
    "line_timeout": (0, 86400),
    "write_timeout": (0, 86400),
    "keepalive": (0, 32767),
    "drain_timeout": (0, 3600),
}
WORDS = {
    "framing": ("line", "none"),
    "log_level": ("debug", "info", "warning", "error"),
}


def must_be(name: str) -> str:
    """What the message says that a value must be."""
    if name in WORDS:
        return "must be one of " + ", ".join(f'"{word}"' for word in WORDS[name])
    if name in SECONDS:
        return "must be a number of seconds from {} to {}".format(*SECONDS[name])
    if name == "listen":
        return 'must be a list of addresses, for example ["localhost:9999"]'
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
]

# As in the file, and as the message shows it.
BAD = [
    *((name, str(low - 1), None) for name, (low, _) in WHOLE.items()),
    *((name, str(high + 1), None) for name, (_, high) in WHOLE.items()),
    *((name, text, None) for name in WHOLE for text in ("1.0", '"1"', "true", "[1]", "-1")),
    *((name, "{}", None) for name in NAMES),
    *((name, "-1", None) for name in SECONDS),
    *((name, f"{high + 1}", None) for name, (_, high) in SECONDS.items()),
    *((name, text, None) for name in SECONDS for text in ("inf", "nan", '"1"', "false", "[1]")),
    *((name, text, None) for name in WORDS for text in ("1", '""', "true", '["line"]')),
    *((name, f'"{WORDS[name][0].upper()}"', None) for name in WORDS),
    *((name, f'" {WORDS[name][0]}"', None) for name in WORDS),
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
]


def write(folder: Path, content: str | bytes) -> str:
    """A file to load."""
    path = folder / "tcpupperd.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def complaint(path: str | Path) -> str:
    """The message about a file, without the file's path."""
    with pytest.raises(ConfigError) as caught:
        load(str(path), {})
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:")


# Values


def test_every_setting_is_tried_here() -> None:
    assert {*WHOLE, *SECONDS, *WORDS, "listen"} == set(NAMES)
    assert {name for name, _ in GOOD} == {name for name, *_ in BAD} == set(NAMES)


def test_without_a_file_all_have_their_defaults() -> None:
    defaults = {setting.name: setting.default for setting in SETTINGS}
    assert vars(load(None, {})) == vars(Config()) == defaults


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_defaults_are_allowed_values(setting: config.Setting) -> None:
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
        ("@", "a socket path has 1 to 107 bytes and no NUL"),
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
        ("0x" + "f" * 10000, "a number of very many digits"),
        ("[0x" + "f" * 10000 + "]", "a number of very many digits"),
    ],
    ids=["list", "decimal", "hexadecimal", "hexadecimal in a list"],
)
def test_long_value_is_cut_in_the_message(tmp_path: Path, value: str, shown: str) -> None:
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
        ("port", "there are " + ", ".join(NAMES)),
        ("colour", "there are " + ", ".join(NAMES)),
    ],
)
def test_unknown_name_is_an_error_with_a_hint(tmp_path: Path, name: str, hint: str) -> None:
    path = write(tmp_path, f"workers = 1\n{name} = 1\n")
    assert complaint(path) == f"2: {name}: no such setting; {hint}"


def test_table_is_an_unknown_name_at_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\n\n[tcpupperd]\nmax_line = 1\n")
    assert complaint(path).startswith("3: tcpupperd: no such setting; ")


def test_name_that_does_not_stand_in_the_file_as_it_is_has_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, '"max_\\u006cine" = 0')
    assert complaint(path) == f" max_line = 0: {must_be('max_line')}"


def test_setting_that_is_given_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\nworkers = 2\n")
    assert re.fullmatch(
        r"2: is not TOML: Cannot overwrite a value \(column \d+\)", complaint(path)
    )


# Several errors

#: The content, and what is said of it in turn, in brief.
SEVERAL = {
    "values": ("max_line = 0\nworkers = 1\nframing = 1\n", ["1: max_line", "3: framing"]),
    "names and values": ("colour = 1\nmax_line = 0\n", ["1: colour", "2: max_line"]),
    "syntax and values": (
        "framing = line\nmax_line = 0\nworkers = 1 2\nwrokers = 1\nlog_level = info",
        ["1: is not", "2: max_line", "3: is not", "4: wrokers", "5: is not"],
    ),
    "twice": (
        "workers = 1\nworkers = 2\nmax_line = 0\nworkers = 0\n",
        ["2: is not", "3: max_line", "4: is not"],
    ),
    "a list over several lines": (
        'max_line = 0\nlisten = [\n"9999",\n"x",\n]\nworkers = 0\n',
        ["1: max_line", "2: listen", "6: workers"],
    ),
    # Nothing of what follows is called wrong for it.
    "an open bracket": ('framing = 1 2\nlisten = ["9999"\nworkers = 1\nmax_line = 5\n', None),
    "an open list": ('framing = 1 2\nlisten = ["9999",\nworkers = 1\nmax_line = 5\n', None),
}


@pytest.mark.parametrize(("content", "brief"), SEVERAL.values(), ids=SEVERAL)
def test_every_error_is_reported_in_order(
    tmp_path: Path, content: str, brief: list[str] | None
) -> None:
    path = write(tmp_path, content)
    lines = complaint(path).replace(f"{path}:", "").splitlines()
    expected = brief or ["1: is not", "3: is not"]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected


@pytest.mark.parametrize("line", ["wrong\n", "x{} = 1\n"], ids=["syntax", "names"])
def test_errors_without_end_are_cut(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, "".join(line.format(number) for number in range(1000)))
    lines = complaint(path).splitlines()
    assert len(lines) == ERRORS_MAX + 1
    assert lines[-1].endswith(" there are more errors than these 20")


@pytest.mark.parametrize("name", ["a\\nb", "a" * 10_000])
def test_odd_name_takes_one_line(tmp_path: Path, name: str) -> None:
    message = complaint(write(tmp_path, f'"{name}" = 1'))
    assert len(message) < 500
    assert "\n" not in message


# What is in force


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


# Files


def test_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\nmax_line =\n")
    assert complaint(path) == "2: is not TOML: Invalid value (column 11)"


@pytest.mark.parametrize("content", ["", "# nothing\n", "\n\n", "workers = 1\r\n"])
def test_file_may_be_empty_or_of_another_system(tmp_path: Path, content: str) -> None:
    load(write(tmp_path, content), {})


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none") == (
        " cannot be read: No such file or directory; create it (an empty file has all defaults)"
    )


@contextmanager
def as_somebody_else() -> Iterator[None]:
    """Without root's right to read everything."""
    me = os.geteuid()
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.toml"
    path.touch(mode=0)
    if os.geteuid():
        assert complaint(path) == " cannot be read: Permission denied"
    else:
        with as_somebody_else():
            assert complaint(path) == " cannot be read: Permission denied"


def test_directory_is_refused(no_leak: None, tmp_path: Path) -> None:
    assert complaint(tmp_path) == " cannot be read: Is a directory"


def test_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(complaint(tmp_path / "fifo")))
    reader.daemon = True  # where it waits for a writer, the run must not
    reader.start()
    reader.join(10)
    assert found == [" is not a regular file; name a TOML file"]


def test_device_is_refused() -> None:
    assert complaint("/dev/zero") == " is not a regular file; name a TOML file"


def test_huge_file_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    assert complaint(path) == f" is larger than {FILE_SIZE_MAX} bytes; name a TOML file"
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * FILE_SIZE_MAX


def test_file_of_the_greatest_size_is_read(tmp_path: Path) -> None:
    setting = "workers = 3\n"
    path = write(tmp_path, setting + "#" * (FILE_SIZE_MAX - len(setting)))
    assert load(path, {}).workers == 3


def test_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, b"workers = 1\n# caf\xe9\n")
    assert complaint(path) == "2: byte 0xe9 is not UTF-8; save as UTF-8"


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    assert " is not TOML: " in complaint(write(tmp_path, "workers = " + "[" * 100_000))


def test_number_of_too_many_digits_is_refused(tmp_path: Path) -> None:
    assert " is not TOML: " in complaint(write(tmp_path, "workers = " + "1" * 100_000))


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
    ],
)
def test_option_has_the_meaning_of_the_setting(name: str, text: str, value: Any) -> None:
    found = from_text(BY_NAME[name], text)
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
def test_bad_option_is_told_what_it_must_be(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(must_be(name))):
        from_text(BY_NAME[name], text)


@given(st.sampled_from(SETTINGS), st.text())
def test_option_is_a_good_value_or_a_value_error(setting: config.Setting, text: str) -> None:
    try:
        value = from_text(setting, text)
    except ValueError:
        return
    assert setting.check(value) == value


# Config


def test_annotations_are_the_settings_in_order_with_their_types() -> None:
    hints = get_type_hints(Config)
    assert list(hints) == NAMES
    strict = {name: hint for name, hint in hints.items() if name not in ("listen", "workers")}
    assert all(type(BY_NAME[name].default) is hint for name, hint in strict.items())
    assert hints["listen"] == tuple[str, ...]
    assert hints["workers"] == int | str


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="cannot change workers"):
        Config().workers = 2


def test_unknown_keyword_is_a_bug() -> None:
    with pytest.raises(TypeError, match=r"wrokers: no such setting; did you mean workers\?"):
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


# Documents


def test_installed_file_shows_every_default_and_sets_nothing(tmp_path: Path) -> None:
    text = (ROOT / "data/tcpupperd.toml").read_text()
    assert tomllib.loads(text) == {}
    lines = re.findall(r"^#(\w+ = .*)$", text, re.MULTILINE)
    assert [line.partition(" = ")[0] for line in lines] == NAMES
    assert vars(load(write(tmp_path, "\n".join(lines)), {})) == vars(Config())


def manual() -> dict[str, str]:
    """The text on each setting in the man page, as plain words."""
    page = (ROOT / "data/man/tcpupperd.toml.5").read_text()
    described = page.partition(".Sh SETTINGS")[2].partition(".Sh FILES")[0]
    plain = re.sub(r"^\.(Li|Pq|Cm|Xr) ", "", described, flags=re.MULTILINE).replace(r"\(dq", '"')
    _, *parts = re.split(r"^\.It (?=\w+$)|^\.It Cm (?=\w+$)", plain, flags=re.MULTILINE)
    return {part.partition("\n")[0]: part for part in parts}


def test_manual_describes_every_setting_in_order() -> None:
    assert list(manual()) == NAMES


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_manual_tells_default_and_a_good_example(setting: config.Setting) -> None:
    text = manual()[setting.name]
    (default,) = re.findall(r"^Default:\n(.*)$", text, re.MULTILINE)
    assert setting.check(tomllib.loads(f"x = {default}")["x"]) == setting.default
    (example,) = re.findall(r"^Example:\n(.*)$", text, re.MULTILINE)
    ((name, value),) = tomllib.loads(example).items()
    assert name == setting.name
    assert setting.check(value) != setting.default


@pytest.mark.parametrize("name", [*WHOLE, *SECONDS])
def test_manual_tells_the_range(name: str) -> None:
    low, high = (WHOLE | SECONDS)[name]
    what = "a number of seconds" if name in SECONDS else "a whole number"
    assert f"{what} from {low} to {high}" in manual()[name].replace("\n", " ")


@pytest.mark.parametrize("name", list(WORDS))
def test_manual_names_every_word(name: str) -> None:
    assert all(f'"{word}"' in manual()[name] for word in WORDS[name])


# Any content

values = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["auto", "line", "none", "debug", "localhost:1"])
    | st.dates(datetime.date(1, 1, 1)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


def as_toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    return str(value)


def check_load(folder: Path, content: str | bytes) -> None:
    """Whatever the content, there are only good values or a ConfigError."""
    with suppress(ConfigError):
        loaded = load(write(folder, content), {})
        for setting in SETTINGS:
            value = getattr(loaded, setting.name)
            assert setting.check(value) == value


@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_are_taken_or_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    check_load(tmp_path, "".join(f"{name} = {as_toml(v)}\n" for name, v in document.items()))


@given(st.binary() | st.text("ax_=[]{}\"'\\#.\n\r\t 01-:TZ\0é").map(str.encode))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_taken_or_refused(tmp_path: Path, content: bytes) -> None:
    check_load(tmp_path, content)
    check_load(tmp_path, b"workers = " + content)

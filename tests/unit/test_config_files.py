"""The configuration as a file: what can be wrong with it, and any content."""

import datetime
import os
import re
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpupperd.config import SETTINGS
from tcpupperd.config_file import FILE_SIZE_MAX, ConfigError, explain, load
from tcpupperd.processes.source import file_identity
from unit.configurations import NAMES, complaint, write
from waiting import DEADLINE

# Files


def test_syntax_error_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\nmax_line =\n")
    assert complaint(path) == "2: invalid TOML: Invalid value (column 11)"


def test_byte_order_mark_is_named(tmp_path: Path) -> None:
    remedy = "save the file as UTF-8 without it"
    path = write(tmp_path, "\ufeffworkers = 1\n")
    assert complaint(path) == f"1: begins with a byte order mark; {remedy}"


@pytest.mark.parametrize(
    "content", ['listen = [\n"a",\nworkers = 2\n', 'listen = ["a"\n"b"\n', 'listen = [\n"a",\n']
)
def test_list_that_is_not_closed_is_named_with_the_line_where_it_begins(
    tmp_path: Path, content: str
) -> None:
    complaint_about = complaint(write(tmp_path, "# x\n" + content))
    assert complaint_about.endswith("; the list that begins in line 2 is not closed")


@pytest.mark.parametrize("content", ["", "# nothing\n", "\n\n", "workers = 1\r\n"])
def test_file_may_be_empty_or_of_another_system(tmp_path: Path, content: str) -> None:
    load(write(tmp_path, content), {})


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert complaint(tmp_path / "none") == (
        " cannot be read: No such file or directory; create it (in an empty file, every setting"
        " has its default)"
    )


DENIED = (
    "cannot be read: Permission denied; the user of the daemon must have access (chmod 644 for a"
    " file, 755 for a folder)"
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
        assert complaint(path) == f" {DENIED}"
    else:  # whose folder is closed to others, too
        with as_somebody_else(), pytest.raises(ConfigError, match=re.escape(DENIED)):
            load(str(path), {})


def test_directory_is_refused(no_leak: None, tmp_path: Path) -> None:
    assert complaint(tmp_path) == " cannot be read: Is a directory"


def test_named_pipe_is_rejected_immediately(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(complaint(tmp_path / "fifo")))
    reader.daemon = True  # where it waits for a writer, the run must not
    reader.start()
    reader.join(DEADLINE)
    assert found == [" not a regular file; specify a TOML file"]


def test_device_is_refused() -> None:
    assert complaint("/dev/zero") == " not a regular file; specify a TOML file"


def test_huge_file_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 30)
    tracemalloc.start()
    assert complaint(path) == f" larger than {FILE_SIZE_MAX} bytes; specify a TOML file"
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * FILE_SIZE_MAX


def test_file_of_the_greatest_size_is_read(tmp_path: Path) -> None:
    setting = "workers = 3\n"
    path = write(tmp_path, setting + "#" * (FILE_SIZE_MAX - len(setting)))
    assert load(path, {}).workers == 3


def test_byte_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, b"workers = 1\n# caf\xe9\n")
    assert complaint(path) == "2: byte 0xe9 is not valid UTF-8; save the file as UTF-8"


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    assert " invalid TOML: " in complaint(write(tmp_path, "workers = " + "[" * 100_000))


def test_number_of_too_many_digits_is_refused(tmp_path: Path) -> None:
    assert " invalid TOML: " in complaint(write(tmp_path, "workers = " + "1" * 100_000))


# Fragments


def fragment(folder: Path, name: str, content: str) -> Path:
    path = folder / "conf.d" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return path


def test_fragments_follow_the_file_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 1\nmax_line = 1\nkeepalive = 1\n")
    last = fragment(tmp_path, "20-last.toml", "# mine\nworkers = 3\n")
    first = fragment(tmp_path, "10-first.toml", "workers = 2\nmax_line = 2\n")
    for name in ("30.toml.dpkg-new", ".40.toml", "README"):
        fragment(tmp_path, name, "workers = 9\n")
    loaded = load(path, {})
    assert (loaded.workers, loaded.max_line, loaded.keepalive) == (3, 2, 1)
    lines = explain(path, {})
    assert f"workers = 3  # {last}:2" in lines
    assert f"max_line = 2  # {first}:2" in lines
    assert f"keepalive = 1  # {path}:3" in lines


def test_errors_in_all_files_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, "workers = 0\n")
    one = fragment(tmp_path, "1.toml", "max_line = 0\n")
    two = fragment(tmp_path, "2.toml", "max_line =\n")
    with pytest.raises(ConfigError) as told:
        load(path, {})
    starts = [f"{path}:1: workers", f"{one}:1: max_line", f"{two}:1: invalid TOML"]
    lines = str(told.value).splitlines()
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_change_of_a_fragment_is_a_change(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    found = [file_identity(path)]
    one = fragment(tmp_path, "1.toml", "")
    found.append(file_identity(path))
    os.utime(one, (1, 1))
    found.append(file_identity(path))
    one.unlink()
    assert file_identity(path) == found[0]
    assert len(set(found)) == 3


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
def test_any_values_are_taken_or_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    check_load(tmp_path, "".join(f"{name} = {as_toml(v)}\n" for name, v in document.items()))


@given(st.binary() | st.text("ax_=[]{}\"'\\#.\n\r\t 01-:TZ\0é").map(str.encode))
def test_any_bytes_are_taken_or_refused(tmp_path: Path, content: bytes) -> None:
    check_load(tmp_path, content)
    check_load(tmp_path, b"workers = " + content)

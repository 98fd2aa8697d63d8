"""What the documentation says about the settings."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tcpupperd.address import SERVICES
from tcpupperd.config import SETTINGS, Config
from tcpupperd.config_file import load
from tcpupperd.settings import Setting
from unit.configurations import NAMES, ROOT, SECONDS, WHOLE, WORDS, write


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


def test_manual_lists_the_services_of_a_listener() -> None:
    assert re.findall(r"^\.It Li ([\w-]+)$", manual()["listen"], re.MULTILINE) == list(SERVICES)


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_manual_tells_default_and_a_good_example(setting: Setting[Any]) -> None:
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

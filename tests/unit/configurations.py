"""Settings and files of settings, for tests."""

from pathlib import Path

import pytest

from tcpupperd.config import SETTINGS
from tcpupperd.config_file import ConfigError, load

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
    "shutdown_delay": (0, 3600),
    "drain_timeout": (0, 3600),
}
WORDS = {"framing": ("line", "none"), "log_level": ("debug", "info", "warning", "error")}


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

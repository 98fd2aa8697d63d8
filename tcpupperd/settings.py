"""Settings: what a row of the table is, and the kinds of values."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from tcpupperd.address import parse_address, parse_network, split_service

T = TypeVar("T")


class Setting(Generic[T]):
    """A row of the table, an attribute of `Config`. `check` returns the value to use, or raises a
    ValueError that says what the value must be."""

    __slots__ = ("check", "default", "help", "metavar", "name")

    def __init__(self, default: Any, check: Callable[[Any], T], metavar: str, text: str) -> None:
        self.name = ""
        self.default = default
        self.check = check
        self.metavar = metavar
        self.help = text

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, config: None, owner: type) -> Setting[T]: ...

    @overload
    def __get__(self, config: object, owner: type) -> T: ...

    def __get__(self, config: object, owner: type) -> Any:
        # Only for type checkers: the values of a configuration precede its rows.
        return self

    @property
    def option(self) -> str:
        """The corresponding command line option."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether the setting is a list."""
        return isinstance(self.default, tuple)

    @property
    def is_switch(self) -> bool:
        """Whether the setting is true or false."""
        return isinstance(self.default, bool)

    @property
    def is_text(self) -> bool:
        """Whether the setting is a text that is never a number."""
        return isinstance(self.default, str) and self.check is not workers

    @property
    def default_text(self) -> str:
        """The default in readable form."""
        if self.is_switch:
            return as_toml(self.default)
        return " ".join(self.default) if self.is_list else f"{self.default:{self._format}}"

    @property
    def _format(self) -> str:
        return "g" if isinstance(self.default, float) else ""

    def from_text(self, text: str) -> T:
        """Parse and check the value of the option. Raises ValueError."""
        if self.is_list:
            return self.check([text])
        return self.check(self._of_type(text))

    def _of_type(self, text: str) -> Any:
        """A value of the type of the setting, or the text if it does not have the form of one."""
        if self.is_switch:
            return {"true": True, "false": False}.get(text, text)
        if self.is_text:
            return text
        if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
            return int(text)
        return float(text) if re.fullmatch(r"[+-]?[0-9]+\.[0-9]+", text) else text


def whole_number(low: int, high: int) -> Callable[[Any], int]:
    """A whole number from `low` to `high`."""

    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise ValueError(f"must be a whole number from {low} to {high}")

    return check


def seconds(low: float, high: float) -> Callable[[Any], float]:
    """A number of seconds from `low` to `high`; fractions are allowed."""

    def check(value: Any) -> float:
        if type(value) in (int, float) and low <= value <= high:
            return float(value)
        raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")

    return check


def one_of(*choices: str) -> Callable[[Any], str]:
    """One of the words in `choices`."""

    def check(value: Any) -> str:
        if value in choices:
            return str(value)
        raise ValueError("must be one of " + ", ".join(f'"{choice}"' for choice in choices))

    return check


def switch(value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    raise ValueError("must be true or false")


WORKERS_MAX = 1024


def workers(value: Any) -> int | str:
    """ "auto" or a number of processes."""
    if value == "auto":
        return "auto"
    try:
        return whole_number(1, WORKERS_MAX)(value)
    except ValueError:
        raise ValueError(f'must be "auto" or a whole number from 1 to {WORKERS_MAX}') from None


def addresses(value: Any) -> tuple[str, ...]:
    """A list of one or more addresses to listen on."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        for item in value:
            parse_address(split_service(item)[1])
        return tuple(value)
    raise ValueError('must be a list of addresses, for example ["localhost:9999"]')


def networks(value: Any) -> tuple[str, ...]:
    """A list of IP addresses and networks."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        for item in value:
            parse_network(item)
        return tuple(value)
    raise ValueError('must be a list of addresses and networks, for example ["192.0.2.0/24"]')


#: What a load balancer may say about a client in a PROXY header, besides its address.
INTRODUCED = (
    "balancer",
    "balancer_port",
    "destination",
    "authority",
    "alpn",
    "tls_version",
    "tls_cipher",
    "tls_cn",
    "unique_id",
    "aws_vpce_id",
    "gcp_psc_connection_id",
    "azure_link_id",
)

#: The placeholders that a greeting may contain besides text.
PLACEHOLDERS = ("host", "instance", "worker", "client", *INTRODUCED)

#: The maximum number of characters of a greeting.
GREETING_MAX = 200


def greeting(value: Any) -> str:
    """A line of text with placeholders."""
    if isinstance(value, str) and len(value) <= GREETING_MAX and value.isprintable():
        plain = re.sub(f"{{({'|'.join(PLACEHOLDERS)})}}", "", value)
        if not set("{}") & set(plain):
            return value
    names = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    raise ValueError(f"must be a line of up to {GREETING_MAX} characters; it may contain {names}")


def as_toml(value: Any) -> str:
    """A value in TOML syntax."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, str):
        return f'"{"".join(map(escaped, value))}"'
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0")


def escaped(character: str) -> str:
    """A character in a string of TOML syntax."""
    if character.isascii() and character.isprintable() and character not in '"\\':
        return character
    return f"\\U{ord(character):08x}"

"""A command line parser with short error messages: what is wrong, and where to read more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tcpupperd.errors import ExpectedError
from tcpupperd.output import write_output

TYPE_CHECKING = False  # stands in for typing.TYPE_CHECKING; the client does not import typing
if TYPE_CHECKING:
    from typing import NoReturn

    from _typeshed import SupportsWrite


#: How similar an option must be to be suggested, from 0 to 1. With less, --prot would suggest
#: --group.
SIMILARITY = 0.7


class Parser(argparse.ArgumentParser):
    """A command line parser that does not accept abbreviated options."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Return the values; exit with status 2 if the command line is invalid."""
        values, unknown = self.parse_known_args(argv)
        if unknown := [word for word in unknown if word != "--"]:
            self.error(self._what_is_wrong_with(unknown))
        return values

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print what was asked for or, if that is impossible, exit with status 1; argparse would
        ignore the error."""
        if file is sys.stderr:
            super()._print_message(message, file)
            return
        try:
            if file is None:
                raise ExpectedError("standard output is closed")
            write_output(os.fsencode(message))
        except ExpectedError as error:
            self.exit(error.status, f"{self.prog}: {error}\n")

    def error(self, message: str) -> NoReturn:
        """Print the message, without the usage that argparse adds, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help' for more information.\n")

    def _what_is_wrong_with(self, unknown: Sequence[str]) -> str:
        from difflib import get_close_matches  # needed only here

        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        if not wrong.startswith("-"):
            return f"unexpected argument: {wrong!r}"
        option = wrong.partition("=")[0]
        close = get_close_matches(option, self._option_string_actions, n=1, cutoff=SIMILARITY)
        return f"{option}: unknown option" + (f"; did you mean {close[0]}?" if close else "")

"""The errors that a user or the machine can cause. Any other exception is a bug."""

from __future__ import annotations


class ExpectedError(Exception):
    """Something outside the program is wrong; the message says what it is, and gives the value and
    the remedy.

    `status` is the exit status of a command that fails with this error.
    """

    status = 1

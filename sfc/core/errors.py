"""The one exception for mistakes a user can make and correct."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


INTERRUPTED = 130
"""exit status of a command that Ctrl-C ended, as shells have it"""
INTERRUPTED_LINE = "interrupted: what is finished is kept, and the same command goes on from there"


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong, and the user can put it right.

    The message is one line that says what is wrong, where, and what to do. Commands print it to standard error
    and end with exit status 2; library users catch it like any other exception.
    """


class CannotLoadModel(UserError):
    """A model's weights or tokenizer cannot be had, so that nothing can be done with it."""


def one_line(error: BaseException) -> str:
    """What a foreign error says, in one line without control characters."""
    text = "".join(char if char.isprintable() else " " for char in str(error))
    return " ".join(text.split())[:300] or type(error).__name__


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where a known name is close, else the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def is_count(text: str) -> bool:
    """Whether a text is a whole number of no more digits than anything has that can be counted."""
    return text.isdecimal() and len(text) <= 15


def first_problem(error: "ValidationError") -> str:
    """What pydantic objects to first, in one line: `key: what is wrong (got the value)`."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"{where} is missing"
    what = problem["msg"].removeprefix("Value error, ")
    return " ".join(f"{where}{': ' if where else ''}{what} (got {problem['input']!r})"[:400].split())

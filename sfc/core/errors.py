"""The one exception for mistakes a user can make and mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong, and the user can mend it.

    The message is one line that says what is wrong, where, and what to do. Commands print it to standard error
    and end with exit status 2; library users catch it like any other exception.
    """


class CannotLoadModel(UserError):
    """A model's weights or tokenizer cannot be had, so that nothing can be done with it."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` where a known name is close, else the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"

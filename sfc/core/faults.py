"""What is said of an exception: of one that a user can correct, what to do; of any other, where its traceback is."""

import errno
import os
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from pydantic import ValidationError

from sfc.core.artifacts import package_versions
from sfc.core.errors import UserError, first_problem

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another --root",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another --root",
    errno.EFBIG: "a file would be larger than this process may write: raise the limit (ulimit -f)",
    errno.EROFS: "the disk is read-only: choose another --root",
    errno.EACCES: "no permission to read or write: change that, or choose another --root",
    errno.EPERM: "no permission to read or write: change that, or choose another --root",
    errno.ENAMETOOLONG: "a name is too long: give a shorter one",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENOMEM: "there is not enough memory: make it less, or use a larger machine",
}
"""what a user can do about an error of the operating system"""
_KINDS = {
    "MemoryError": "there is not enough memory",
    "OutOfMemoryError": "the device has not enough memory (--device cpu is slower, and may have more)",
    "SafetensorError": "a file of weights is damaged",
    "UnicodeError": "a text is not valid UTF-8",
    "TemplateError": "a chat template cannot be rendered (see --set model.template)",
    "ImportError": "a package is missing or does not fit the others: pip install it",
}
"""what an error says to a user who can correct it, by the name of its class or of one that it is derived from"""
_ALLOCATION = "allocate memory"
"""what torch's error of no particular class says when main memory does not suffice"""


def user_message(error: Exception) -> str | None:
    """What to tell a user of an error that he can correct; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if of_usage := getattr(error, "format_message", None):  # typer's copy of click has private classes
        return f"{of_usage()} (see --help)"
    told = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ValidationError):
        return f"a file or a setting does not have the form that it should: {first_problem(error)}"
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        places = ", ".join(map(os.fsdecode, names))
        if remedy := _REMEDIES.get(error.errno or 0):
            return f"{remedy} ({places or Path.cwd()})"
        what = f"cannot read or write {places or 'a file'}: {error.strerror or told}; check what is there"
        return what if error.errno else told  # libraries raise it with a sentence of their own
    if isinstance(error, RuntimeError) and _ALLOCATION in told:
        return f"there is not enough memory: {told}"
    kinds = [_KINDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _KINDS]
    return f"{kinds[0]}: {told}" if kinds else None


def fault_message(error: Exception) -> str:
    """What to tell a user of an error that is the program's; the traceback goes to a file."""
    what = f"unexpected {type(error).__name__}: {error}"[:300]
    told = [shlex.join(["sfc", *sys.argv[1:]]), str(package_versions()), traceback.format_exc()]
    try:
        descriptor, path = tempfile.mkstemp(prefix="sfc-fault-", suffix=".txt")
        os.close(descriptor)
        Path(path).write_text("\n".join(told), encoding="utf-8", errors="backslashreplace")
    except OSError:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{what} (line {last.lineno} of {last.filename}; its traceback could not be written)"
    return f"{what}; its traceback is in {path}"

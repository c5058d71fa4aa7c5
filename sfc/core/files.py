"""Files are written whole or not at all, journals line by line, and nothing is ever written through a link."""

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sfc.core.errors import UserError


def below(root: Path, *names: str) -> Path:
    """The folder `root/names…`, in which artifacts or data lie.

    Raises:
        UserError: a link on the way leads out of the root.
    """
    path = root.joinpath(*names)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{path} leads out of {root} by a link: remove it, or choose that disk with --root")
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what an error of the file system means for what is being written.

    Raises:
        UserError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"cannot write {path} ({reason}); what is finished stays valid: solve that and run the same command,"
            " which goes on where it was"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; when the block ends well it is fsynced and becomes `path`.

    Raises:
        UserError: the folder cannot be written, or `path` is a folder.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with writing(path):
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: bool = False, shared: bool = False) -> Iterator[BinaryIO]:
    """Hold a lock on a file, which stays behind empty; a killed process holds nothing.

    Args:
        wait: wait for another process to let go, instead of failing.
        shared: with others that share it (see `share`); else exclusively.

    Raises:
        UserError: another process holds it, or it is a link or no file.
    """
    with writing(path):
        handle = os.fdopen(_open_in_place(path, os.O_CREAT), "r+b", buffering=0)
    with handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            name = path.parent / path.stem.removeprefix(".")
            raise UserError(f"another process is working on {name}; wait for it to end") from None
        yield handle


def share(lock: BinaryIO) -> None:
    """Let others share a lock that was held exclusively."""
    fcntl.flock(lock, fcntl.LOCK_SH)


def open_journal(path: Path) -> BinaryIO:
    """A file to which whole lines are added; a last line that a kill cut short is removed from it.

    Raises:
        UserError: it is a link, a folder or the like, or cannot be written.
    """
    with writing(path):
        descriptor = _open_in_place(path, os.O_CREAT | os.O_APPEND)
        file = os.fdopen(descriptor, "ab")
        end, size = 0, os.fstat(descriptor).st_size
        for start in range(max(size - _BLOCK, 0), -_BLOCK, -_BLOCK):
            if (found := os.pread(descriptor, _BLOCK, max(start, 0)).rfind(b"\n")) >= 0:
                end = max(start, 0) + found + 1
                break
        if end < size:
            os.ftruncate(descriptor, end)
        return file


def open_in_place(path: Path) -> BinaryIO:
    """A file that is there open to be written in place, unbuffered.

    Raises:
        UserError: it is a link, a folder or the like, or cannot be written.
    """
    with writing(path):
        return os.fdopen(_open_in_place(path, 0), "r+b", buffering=0)


_BLOCK = 1 << 16


def _open_in_place(path: Path, flags: int) -> int:
    """Never through a link, which may lead anywhere, and never a pipe, which would be waited for."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is no regular file: remove it and run the same command")
    return descriptor

"""What the files of a finished artifact are, and whether they still are that.

A manifest has the size and the SHA-256 of every file of its folder (`contents`), and a checksum of its own. Whatever is
read from such a folder is compared first, so that damage is told and never taken for a result. A file that a person
adds, such as `labels.json`, is not among the contents. Manifests of earlier versions have none: what they describe is
read as it is, and said to be unverified.
"""

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from sfc.core.errors import UserError, first_problem
from sfc.core.files import replacing
from sfc.core.machine import check_memory
from sfc.core.progress import say

MANIFEST = "manifest.json"
BEFORE = "manifest-before.json"
"""the manifest of a finished artifact while more is added to it"""
OWN_FILES = ("labels.json",)
"""what a person writes into an artifact's folder"""

_CHECKSUM = "checksum"
_NOT_CONTENTS = {MANIFEST, BEFORE, *OWN_FILES, "tensorboard", "wandb"}
_FINGERPRINTED = re.compile(r".+-[0-9a-f]{8}")
BYTES_PER_BYTE = 8
"""what a table takes in memory for each byte of its file, roughly"""
_DEEPEST = 2
"""folders between a file and the manifest that lists it, at most: `saes/NAME/SITE/cfg.json`"""


class Content(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: NonNegativeInt
    sha256: str | None = None
    """of the file; None where the file has checksums of its own, which `digest` covers (see `sfc.saes.shard`)"""
    digest: str | None = None


class _Manifest(BaseModel):
    """What is read of every manifest, whatever else it says."""

    model_config = ConfigDict(extra="allow")

    inputs: dict[str, Any] = {}
    contents: dict[str, Content] | None = None
    """None in a manifest of an earlier version"""
    files: dict[str, str] = {}
    study: str = ""


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A file open for reading.

    Raises:
        UserError: it is missing, is no file but a folder or the like, or cannot be read.
    """
    try:
        # A pipe would be waited for; what is opened is looked at, and not the path, which may change.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _no_file(path)
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} does not exist{_lost(path)}") from None
    except (IsADirectoryError, NotADirectoryError):
        raise _no_file(path) from None
    except (OSError, ValueError) as error:  # a path with a zero byte in it is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): it must be a file that you may read") from None


def hash_of(file: io.BufferedReader) -> str:
    """SHA-256 of what a file holds, in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """What a file holds; of a file of a finished artifact, exactly what was written.

    Raises:
        UserError: it is missing, cannot be read, is damaged, or is too large.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        check_memory(BYTES_PER_BYTE * size, f"reading {path}", "give a smaller file")
        data = file.read()
    expected = _listed(path)
    if expected is not None and (len(data) != expected.bytes or hashlib.sha256(data).hexdigest() != expected.sha256):
        raise _damaged(path)
    return data


def check(path: Path) -> str | None:
    """Compare a file of a finished artifact with what was written; of any other, see that it is a file.

    Returns:
        Its SHA-256, in hexadecimal, where that is listed.

    Raises:
        UserError: it is missing, cannot be read, or is damaged.
    """
    expected = _listed(path)
    with opened(path) as file:
        if expected is None:
            return None
        is_right = os.fstat(file.fileno()).st_size == expected.bytes
        if not is_right or (expected.sha256 is not None and hash_of(file) != expected.sha256):
            raise _damaged(path)
    return expected.sha256


def contents_of(folder: Path, known: Mapping[str, str], only: Collection[str] | None = None) -> dict[str, Any]:
    """The contents of a folder as a manifest has them, by their paths in it.

    Args:
        known: digests of files that have checksums of their own, so that they need not be read again.
        only: leave out all files but these.
    """
    contents = {}
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        if only is not None and name not in only:
            continue
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            of_file = {"digest": known[name]} if name in known else {"sha256": hash_of(file)}
        contents[name] = {"bytes": size, **of_file}
    return contents


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a checksum of all that it says."""
    told = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    return {**told, _CHECKSUM: _checksum(told)}


def parsed_manifest(data: bytes, path: Path) -> dict[str, Any]:
    """What a manifest says.

    Raises:
        UserError: it is damaged.
    """
    manifest = parsed_json(data, path)
    try:
        said = _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); {remedy(path)}") from None
    told = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    if (said.contents is not None or _CHECKSUM in manifest) and manifest.get(_CHECKSUM) != _checksum(told):
        raise UserError(f"{path} is damaged (its checksum is wrong); {remedy(path)}")
    return manifest


def parsed_json(data: bytes, path: Path) -> Any:
    """What the JSON of a file says.

    Raises:
        UserError: it is not JSON in UTF-8.
    """
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path} is not JSON that can be read (it is nested too deeply); {remedy(path)}") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise UserError(f"{path} is not JSON ({error}); {remedy(path)}") from None


def check_sizes(folder: Path) -> None:
    """See that every file of an artifact is there, with as many bytes as were written, if it is finished.

    Raises:
        UserError: one is missing, or has another size.
    """
    if not os.path.lexists(folder / MANIFEST):
        return
    contents = _contents(folder)
    if contents is None:
        _say_unverified(folder)
    for name, content in (contents or {}).items():
        path = folder / name
        try:
            found = path.stat()
        except OSError:
            raise UserError(f"{path} does not exist{_lost(path)}") from None
        if not stat.S_ISREG(found.st_mode):
            raise _no_file(path)
        if found.st_size != content.bytes:
            raise _damaged(path)


def check_contents(folder: Path) -> int | None:
    """Compare every file of a finished artifact with what was written; those with checksums of their own by size.

    Returns:
        How many files there are; None where the manifest does not list them.

    Raises:
        UserError: one is missing or damaged.
    """
    contents = _contents(folder)
    for name in contents or {}:
        check(folder / name)
    return None if contents is None else len(contents)


def digests_of(folder: Path) -> dict[str, str] | None:
    """The digests of a finished artifact's files that have checksums of their own; None where none are listed.

    Raises:
        UserError: the manifest is damaged.
    """
    contents = _contents(folder)
    return None if contents is None else {name: each.digest for name, each in contents.items() if each.digest}


def keep(folder: Path) -> None:
    """Write down what a folder of a cache holds, and since when."""
    with replacing(folder / MANIFEST) as temporary:
        times = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in _files_below(folder)}
        told = sealed({"contents": contents_of(folder, {}), "times": times})
        temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def is_kept(folder: Path) -> bool:
    """Whether a folder of a cache is finished, and says what it holds."""
    return (folder / MANIFEST).is_file()


def check_kept(folder: Path, fully: bool = False) -> int:
    """See that a folder of a cache holds what was written; how many files there are.

    Args:
        fully: read every file; else those only whose size or time of change are not as they were.

    Raises:
        UserError: a file is missing or damaged.
    """
    told = parsed_manifest(read_bytes(folder / MANIFEST), folder / MANIFEST)
    contents, times = _Manifest.model_validate(told).contents or {}, told.get("times")
    is_as_it_was = True
    for name, content in contents.items():
        path = folder / name
        try:
            found = path.stat()
            unchanged = (found.st_size, found.st_mtime_ns) == (content.bytes, times[name] if times else None)
            if fully or not unchanged:
                is_as_it_was &= unchanged
                with opened(path) as file:
                    if hash_of(file) != content.sha256:
                        raise UserError(f"{path} is damaged (it is not what was written)")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {_delete(folder)}") from None
        except UserError as error:
            raise UserError(f"{str(error).partition(';')[0]}; {_delete(folder)}") from None
    if not is_as_it_was:
        with suppress(UserError):  # others may own the cache
            keep(folder)
    return len(contents)


def _delete(folder: Path) -> str:
    return f"delete {folder} and run the same command, which makes it again"


def own_files(folder: Path) -> list[Path]:
    """What a person put into an artifact's folder: whatever a whole manifest does not list, else by name."""
    try:
        contents = _contents(folder)
    except UserError:
        contents = None
    if contents is None:
        return [folder / name for name in OWN_FILES if (folder / name).is_file()]
    files = [*_files_below(folder), *(folder / name for name in OWN_FILES if (folder / name).is_file())]
    return [path for path in files if path.relative_to(folder).as_posix() not in contents]


def remedy(path: Path) -> str:
    """What to do about a damaged file."""
    folder = _artifact_above(path)
    if folder is None:
        return "delete it, or run again with --rebuild"
    study = ""
    if path.name not in (MANIFEST, BEFORE):
        with suppress(UserError):
            study = _manifest(folder).study
    if study:
        return f"make it again: `sfc {study} --rebuild` with the same settings"
    return f"make it again with --rebuild, or delete {folder} and run the same command"


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder, in order; no links, no hidden files, and nothing that is not a result."""
    for entry in sorted(folder.iterdir()):
        if entry.name in _NOT_CONTENTS or entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            yield from _files_below(entry)
        elif entry.is_file():
            yield entry


def _checksum(manifest: Mapping[str, Any]) -> str:
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _artifact_above(path: Path) -> Path | None:
    """The artifact's folder that a file lies in."""
    return next((folder for folder in list(path.parents)[:_DEEPEST] if _FINGERPRINTED.fullmatch(folder.name)), None)


def _listed(path: Path) -> Content | None:
    """What the manifest above a file says of it; None where no manifest does."""
    folder = _artifact_above(path)
    if folder is None or path.name in (MANIFEST, BEFORE) or not os.path.lexists(folder / MANIFEST):
        return None
    return (_contents(folder) or {}).get(path.relative_to(folder).as_posix())


def _contents(folder: Path) -> dict[str, Content] | None:
    return _manifest(folder).contents


def _manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    with opened(path) as file:
        found = os.fstat(file.fileno())
        return _parsed_once(path, found.st_mtime_ns, found.st_size, found.st_ino)


@lru_cache(maxsize=256)
def _parsed_once(path: Path, mtime: int, size: int, inode: int) -> _Manifest:
    return _Manifest.model_validate(parsed_manifest(read_bytes(path), path))


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged (it is not what was written); {remedy(path)}")


def _lost(path: Path) -> str:
    try:
        return f", but was written; {remedy(path)}" if _listed(path) is not None else ": check the path"
    except UserError:
        return ": check the path"


def _no_file(path: Path) -> UserError:
    kind = "a folder" if path.is_dir() else "a pipe, socket or device"
    return UserError(f"{path} is {kind}: {remedy(path) if _artifact_above(path) else 'give an ordinary file'}")


@lru_cache(maxsize=256)
def _say_unverified(folder: Path) -> None:
    say(f"{folder} is of an earlier version and has no hashes of its files: it is read unverified")

"""Artifacts: folders named for people and by content, complete or not there at all.

A stage's result lies in a folder such as `saes/smollm2-3fa9c1d2/`. The suffix is the fingerprint of exactly what it
depends on, spelt out in `manifest.json`, which is written last: a folder without a manifest is unfinished work.
Nothing here imports torch, so that asking whether an artifact is up to date takes no time.
"""

import csv
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from sfc.core.contents import (
    BEFORE,
    MANIFEST,
    check_contents,
    check_sizes,
    contents_of,
    hash_of,
    opened,
    own_files,
    parsed_json,
    parsed_manifest,
    read_bytes,
    remedy,
    sealed,
)
from sfc.core.errors import UserError, first_problem
from sfc.core.files import locked, replacing, share, writing
from sfc.core.ranks import is_leader, wait_for_all, world_size

if TYPE_CHECKING:
    import pandas as pd

Kind = TypeVar("Kind", bound=BaseModel)

Json = Mapping[str, Any]


def fingerprint(inputs: Json) -> str:
    """Eight hexadecimal digits that change exactly when `inputs` (any JSON value) change."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Artifact:
    """Where a stage's result lies, and the inputs it is made from."""

    folder: Path
    inputs: Json

    @classmethod
    def of(cls, parent: Path, name: str, inputs: Json) -> "Artifact":
        """The artifact `parent/name-FINGERPRINT` of these inputs; it need not exist yet."""
        return cls(parent / f"{name}-{fingerprint(inputs)}", inputs)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.inputs)

    def is_complete(self) -> bool:
        """Whether the folder's manifest is there and speaks of the same inputs.

        Raises:
            UserError: the manifest is damaged, or a file that it lists is gone or has another size.
        """
        if not os.path.lexists(self.folder / MANIFEST):
            return False
        if self.manifest().get("inputs") != json.loads(json.dumps(self.inputs)):
            return False
        check_sizes(self.folder)
        return True

    def manifest(self) -> dict[str, Any]:
        """The manifest as it was written.

        Raises:
            UserError: it is missing or damaged.
        """
        return read_json(self.folder / MANIFEST)

    def described(self, **facts: Any) -> dict[str, Any]:
        """A manifest: `facts` (figures, files, times), the inputs, versions of packages and the command that runs."""
        return {
            "fingerprint": self.fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="milliseconds"),  # reports put artifacts in this order
            "command": shlex.join(["sfc", *sys.argv[1:]]),
            "versions": package_versions(),
            **facts,
            "inputs": self.inputs,
        }

    def finish(self, digests: Mapping[str, str] | None = None, **facts: Any) -> None:
        """Write the manifest (see `described`), which declares the folder complete.

        Args:
            digests: of files that have checksums of their own (see `sfc.core.contents`).
        """
        contents = contents_of(self.folder, digests or {})
        write_json(self.folder / MANIFEST, sealed(self.described(**facts, contents=contents)))

    @contextmanager
    def being_made(self, rebuild: bool = False) -> Iterator[Path]:
        """Hold the folder's lock while it is made, or while more is added to what is finished.

        With `rebuild` the folder that is there is set aside, and deleted when the new one is finished; what a person
        wrote into it is kept. Leftovers of processes that were killed are deleted. Where the block fails before
        anything is made, all is as it was before.

        Of several processes the leader does all this, before the others' blocks begin; all end when the leader's does.

        Raises:
            UserError: another process is making the same artifact, its folder is a link or has one to a folder in it,
                or what more is to be added to is damaged.
        """
        if not is_leader():
            wait_for_all()
            with locked(self._lock, shared=True):
                yield self.folder
            return wait_for_all()
        aside = self.folder.parent / _ASIDE / self.folder.name
        with writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._lock) as lock:
            with writing(self.folder):
                if rebuild and self.folder.is_dir() and not self.folder.is_symlink():
                    _set_aside(self.folder, aside)
                self.folder.mkdir(exist_ok=True)
                _check_links(self.folder)
                _sweep(self.folder)
                own, before = _keep_own_files(aside, self.folder), _reopen(self.folder)
            if world_size() > 1:
                share(lock)
            try:
                wait_for_all()
                yield self.folder
            except BaseException:
                _undo(self.folder, aside, own, before)
                raise
            if (self.folder / MANIFEST).is_file():
                self._discard_what_was_before()
        wait_for_all()

    def tidy(self) -> None:
        """Delete what a process left that was killed after it had finished the artifact."""
        aside = self.folder.parent / _ASIDE
        if (self.folder / BEFORE).exists() or any((aside / f"{dot}{self.folder.name}").exists() for dot in ("", ".")):
            with suppress(UserError), locked(self._lock):
                self._discard_what_was_before()

    @property
    def _lock(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.lock")

    def _discard_what_was_before(self) -> None:
        with writing(self.folder):
            (self.folder / BEFORE).unlink(missing_ok=True)
            _discard(self.folder.parent / _ASIDE / self.folder.name)


_ASIDE = ".replaced"
"""where the folders lie that are being made again, out of sight of whoever looks for finished ones"""
_Stamps = dict[str, tuple[int, int, int]]


@contextmanager
def amended(folder: Path, *names: str) -> Iterator[None]:
    """Hold the lock of a finished artifact while some of its files are written again.

    Until the block ends its manifest does not speak of these files, so that a kill leaves nothing that looks damaged.

    Raises:
        UserError: another process is working on it, or its manifest is damaged.
    """
    with locked(folder.with_name(f".{folder.name}.lock")):
        _sweep(folder)
        manifest = read_json(folder / MANIFEST)
        contents = manifest.get("contents")
        if contents is None:
            yield
            return
        changing = sorted({*names, *manifest.pop("amended", [])})
        others = {name: content for name, content in contents.items() if name not in changing}
        write_json(folder / MANIFEST, sealed({**manifest, "amended": changing, "contents": others}))
        try:
            yield
        finally:
            contents = {**others, **contents_of(folder, {}, only=changing)}
            write_json(folder / MANIFEST, sealed({**manifest, "contents": contents}))


def _set_aside(folder: Path, aside: Path) -> None:
    """Move a folder out of the way, unless a rebuild that was killed has done so and is to be gone on with."""
    if aside.exists():
        if not (folder / MANIFEST).exists():
            return
        _discard(aside)  # killed after it was finished
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)


def _discard(aside: Path) -> None:
    if aside.exists():
        # Under another name first: half a folder must never be taken for one that was set aside.
        gone = aside.with_name(f".{aside.name}")
        shutil.rmtree(gone, ignore_errors=True)
        aside.rename(gone)
    shutil.rmtree(aside.with_name(f".{aside.name}"), ignore_errors=True)
    with suppress(OSError):  # others may have something in it
        aside.parent.rmdir()


def _check_links(folder: Path) -> None:
    """Refuse links by which something outside the folder would be written."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() and (path == folder or path.is_dir()):
            raise UserError(f"{path} is a link to a folder: nothing is written through links; remove it")


def _sweep(folder: Path) -> None:
    """Delete what killed processes left; whoever holds the lock is the only one who writes here."""
    for path in [path for path in folder.rglob(".*") if path.name.startswith(".")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _keep_own_files(aside: Path, folder: Path) -> set[Path]:
    """Copy what a person wrote from the folder that was set aside; the files of theirs that are there now."""
    if not aside.is_dir() or (folder / MANIFEST).exists():
        return set()
    kept = {path: folder / path.relative_to(aside) for path in own_files(aside)}
    for path, target in kept.items():
        if not target.exists():
            with replacing(target) as temporary:
                shutil.copyfile(path, temporary)
    return set(kept.values())


def _reopen(folder: Path) -> _Stamps:
    """Take the manifest off a finished artifact to which more is added; when its files were changed last.

    Raises:
        UserError: one of them is damaged.
    """
    if not os.path.lexists(folder / MANIFEST):
        return {}
    stamps = _stamps(folder)
    check_contents(folder)
    (folder / MANIFEST).replace(folder / BEFORE)
    return stamps


def _stamps(folder: Path) -> _Stamps:
    """Size and times of every file of an artifact."""
    names = (MANIFEST, BEFORE)
    found = {str(path): path.lstat() for path in folder.rglob("*") if path.name not in names and not path.is_dir()}
    return {name: (of.st_size, of.st_mtime_ns, of.st_ino) for name, of in found.items()}


def _undo(folder: Path, aside: Path, own: set[Path], before: _Stamps) -> None:
    """After a failure: keep what is made, for the next run to go on with; where nothing is, all is as it was."""
    with suppress(OSError):
        if (folder / BEFORE).exists() and not (folder / MANIFEST).exists() and _stamps(folder) == before:
            (folder / BEFORE).replace(folder / MANIFEST)
        elif {path for path in folder.rglob("*") if not path.is_dir()} <= own:
            shutil.rmtree(folder)
            if aside.exists():
                aside.rename(folder)
                aside.parent.rmdir()


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: version(name) for name in ("torch", "transformers", "transformer-lens", "sae-lens", "sfc")}


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; a number that is not finite is an error, never `NaN` in the file."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, cannot be read, is damaged, or is not JSON.
    """
    data = read_bytes(path)
    return parsed_manifest(data, path) if path.name in (MANIFEST, BEFORE) else parsed_json(data, path)


def read_model(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file that describes a `kind`.

    Raises:
        UserError: the file is missing, is not JSON, or describes something else.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


def read_lines(path: Path, kind: type[Kind]) -> list[Kind]:
    """Read a file with a JSON object on every line; a last line that a kill cut short does not count.

    Raises:
        UserError: the file is missing or damaged, or a line describes something else than a `kind`.
    """
    lines = []
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], start=1):
        try:
            lines.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}, line {number}, is damaged ({first_problem(error)}); {remedy(path)}") from None
    return lines


def read_csv(path: Path, columns: Collection[str] = (), **options: Any) -> "pd.DataFrame":
    """Read a table.

    Args:
        columns: those that it must have.
        options: of `pandas.read_csv`.

    Raises:
        UserError: the file is missing, cannot be read, is damaged, or is no such table.
    """
    import pandas as pd

    data = read_bytes(path)
    try:
        table = pd.read_csv(io.BytesIO(data), **options)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a table ({' '.join(str(error).split())}); {remedy(path)}") from None
    if missing := [name for name in columns if name not in table.columns]:
        raise UserError(f"{path} lacks the column {missing[0]!r}; {remedy(path)}")
    return table


def write_csv(path: Path, table: "pd.DataFrame", digits: int | None = None) -> None:
    """Write a table whole or not at all, without its index.

    Texts are in quotes: a carriage return in a model's reply would end a row.

    Args:
        digits: significant ones that floats keep; None: all.
    """
    if digits is not None:
        table = rounded(table, digits)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)


def rounded(table: "pd.DataFrame", digits: int) -> "pd.DataFrame":
    """The table with its floats rounded to so many significant digits."""
    floats = [str(name) for name, dtype in table.dtypes.items() if dtype.kind == "f"]
    return table.assign(
        **{name: table[name].map(lambda x: float(f"{x:.{digits}g}"), na_action="ignore") for name in floats}
    )


def json_records(table: "pd.DataFrame", digits: int | None = 4) -> list[dict[str, Any]]:
    """The rows of a table for JSON, floats rounded to so many decimals (None: not at all); what is missing is None."""
    table = table if digits is None else table.round(digits)
    return table.astype(object).where(table.notna(), None).to_dict("records")  # pyright: ignore[reportReturnType]


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        UserError: it is missing, is no file, or cannot be read.
    """
    with opened(path) as file:
        return hash_of(file)

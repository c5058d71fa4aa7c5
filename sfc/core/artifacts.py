"""Artifacts: folders named for people and by content, complete or not there at all.

A stage's result lies in a folder such as `saes/smollm2-3fa9c1d2/`. The suffix is the fingerprint of exactly what it
depends on, spelt out in `manifest.json`, which is written last: a folder without a manifest is unfinished work.
Nothing here imports torch, so that asking whether an artifact is up to date takes no time.
"""

import csv
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from sfc.core.errors import UserError, first_problem
from sfc.core.reading import read_text

if TYPE_CHECKING:
    import pandas as pd

Kind = TypeVar("Kind", bound=BaseModel)

MANIFEST = "manifest.json"
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
        """Whether the folder's manifest is there and speaks of the same inputs."""
        path = self.folder / MANIFEST
        return path.is_file() and self.manifest().get("inputs") == json.loads(json.dumps(self.inputs))

    def manifest(self) -> dict[str, Any]:
        """The manifest as it was written.

        Raises:
            UserError: it is missing or is not JSON.
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

    def finish(self, **facts: Any) -> None:
        """Write the manifest (see `described`), which declares the folder complete."""
        write_json(self.folder / MANIFEST, self.described(**facts))

    @contextmanager
    def being_made(self, rebuild: bool = False) -> Iterator[Path]:
        """Hold the folder's lock while it is made; with `rebuild` what it held before is removed first.

        Where the block fails before anything is in the folder, the folder is removed again.

        Raises:
            UserError: another process is making the same artifact.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.with_name(f".{self.folder.name}.lock")):
            if rebuild and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(exist_ok=True)
            try:
                yield self.folder
            except BaseException:
                with suppress(OSError):  # a folder with finished parts in it stays, for the next run to go on with
                    self.folder.rmdir()
                raise


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: version(name) for name in ("torch", "transformers", "transformer-lens", "sae-lens", "sfc")}


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock on a file, which stays behind empty; a killed process holds nothing.

    Args:
        wait: wait for another process to let go, instead of failing.

    Raises:
        UserError: another process holds it.
    """
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            name = path.parent / path.stem.removeprefix(".")
            raise UserError(f"another process is working on {name}; wait for it to end") from None
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; when the block ends well it is fsynced and becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a ValueError
        raise UserError(f"{path} is not JSON ({error}); delete it, or run again with --rebuild") from None


def read_model(path: Path, kind: type[Kind]) -> Kind:
    """Read a JSON file that describes a `kind`.

    Raises:
        UserError: the file is missing, is not JSON, or describes something else.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


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
    records = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in record.items()} for record in records]


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

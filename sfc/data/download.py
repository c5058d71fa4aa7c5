"""Fetch OR-Bench and XSTest from the Hugging Face hub, at pinned revisions, and check that all rows arrived."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from sfc.core.errors import UserError
from sfc.core.files import below
from sfc.data.read import read_table
from sfc.data.schema import FILES

_HUB = "https://huggingface.co"


class Source(NamedTuple):
    """A file in a data set repository of the hub, and what it must hold."""

    repository: str
    revision: str
    file: str
    target: str  # where it goes, below the data folder
    columns: tuple[str, ...]
    rows: int

    def url(self, endpoint: str | None = None) -> str:
        """Where a browser finds the file."""
        return f"{endpoint or _HUB}/datasets/{self.repository}/resolve/{self.revision}/{self.file}"


class Downloaded(NamedTuple):
    """A file that is in place; `fetched` is false where it had been there already."""

    path: Path
    rows: int
    fetched: bool


def _or_bench(kind: str, rows: int) -> Source:
    revision = "e36d8b80e81837c8a8f264bbb2a49f1b32c7e272"
    return Source("bench-llm/or-bench", revision, FILES[kind], f"or-bench/{FILES[kind]}", ("prompt", "category"), rows)


# XSTest comes from its first author's own repository: copies elsewhere on the hub ask for an account or lack columns.
SOURCES = (
    _or_bench("safe_80k", 80_359),
    _or_bench("hard", 1_319),
    _or_bench("toxic", 655),
    Source(
        repository="Paul/XSTest",
        revision="f600c994b256f12867dfa5b3eb3d545a3e62f8b5",
        file="xstest_prompts.csv",
        target="xstest/xstest_prompts.csv",
        columns=("id", "prompt", "type", "label", "focus", "note"),
        rows=450,
    ),
)


def download(folder: Path, endpoint: str | None = None) -> list[Downloaded]:
    """Put every file of `SOURCES` below `folder`; files that are there and complete are left alone.

    A broken connection is resumed where it stopped; a run that was cut short goes on with the first missing file (the
    hub's client keeps no partial files between runs).

    Args:
        endpoint: another address of the hub, of a mirror or a test; None: the hub's own, or `HF_ENDPOINT`.

    Raises:
        UserError: a link leads out of the folder; or a file could not be fetched or is not what was expected, and the
            message says where to put it by hand.
    """
    return [_provide(source, folder, endpoint) for source in SOURCES]


def _provide(source: Source, folder: Path, endpoint: str | None) -> Downloaded:
    target = below(folder, source.target)
    if _problem(source, target) is None:
        return Downloaded(target, source.rows, fetched=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Fetched and checked elsewhere, so that a file under its final name is always whole, and a user's own file is
        # only ever replaced by one that passed the check.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as staging:
            fetched = _fetch(source, Path(staging), target, endpoint)
            if problem := _problem(source, fetched):
                raise UserError(f"{source.url(endpoint)} {problem}: try again, or set HF_ENDPOINT to another mirror")
            fetched.replace(target)
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent} ({error.strerror}): make room or choose another --root"
        ) from error
    return Downloaded(target, source.rows, fetched=True)


def _problem(source: Source, path: Path) -> str | None:
    try:
        rows = len(read_table(path, source.columns))
    except UserError as error:
        return f"is not the file that was expected ({error})"
    return None if rows == source.rows else f"has {rows:,} rows instead of {source.rows:,}"


def _fetch(source: Source, staging: Path, target: Path, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            source.repository,
            source.file,
            repo_type="dataset",
            revision=source.revision,
            local_dir=staging,
            endpoint=endpoint,
        )
    except Exception as error:  # errors of the hub, its HTTP library and the disk have no type in common
        raise UserError(
            f"could not fetch {source.file} ({_reason(error)}): try again when there is a network, "
            f"or get {source.url(endpoint)} with a browser and save it as {target}"
        ) from error
    return Path(path)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # the hub's client wraps what happened in several lines of general advice
        error = error.__cause__
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first_line}"[:160]

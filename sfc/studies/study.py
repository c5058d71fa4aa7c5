"""What a study is, and how it runs.

A study measures something once and keeps it: an artifact, in a folder whose name ends with the fingerprint of all that
it depends on. It has one section of the experiment (its options), says what it needs and depends on, measures, and
says what there is to show. Everything else follows from that: its command, its page, its section in the report.
Nothing here imports torch, and a module that declares a study should not either: what is up to date needs no model.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import pandas as pd
from pydantic import RootModel

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import (
    MANIFEST,
    Artifact,
    Json,
    read_csv,
    read_json,
    read_model,
    write_csv,
    write_json,
    write_text,
)
from sfc.core.errors import UserError
from sfc.core.files import below
from sfc.core.options import Options
from sfc.core.progress import say
from sfc.core.ranks import alone, dealt, in_turn, is_leader, told, wait_for_all, world_size
from sfc.core.registry import Registry
from sfc.pages.blocks import Page, records_of
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.session import Session

if TYPE_CHECKING:
    from sfc.core.work import Work
    from sfc.studies.sketch import Sketch

RESULT, PARTS = "result.json", "parts"
OwnOptions = TypeVar("OwnOptions", bound=Options)


class _Figures(RootModel[dict[str, Any]]):
    """What every `result.json` is."""


class Finished:
    """A finished artifact, as its files tell of it."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.manifest: Mapping[str, Any] = read_json(folder / MANIFEST) if manifest is None else manifest

    @cached_property
    def result(self) -> dict[str, Any]:
        """Its figures.

        Raises:
            UserError: the file is missing or damaged.
        """
        return read_model(self.folder / RESULT, _Figures).root

    @property
    def words(self) -> Words:
        """How its behavior is spoken of.

        Raises:
            UserError: the manifest does not say so.
        """
        with complete(self.folder):
            return Words(**self.manifest["words"])

    @property
    def page(self) -> Page:
        """What its study has to say of it.

        Raises:
            UserError: its study is not registered, or a file is missing or lacks a figure.
        """
        with complete(self.folder):
            return STUDIES[self.manifest.get("study", "")].page(self)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What it was made from."""
        return self.manifest.get("inputs", {})

    @property
    def name(self) -> str:
        """The folder's name without the fingerprint."""
        return self.folder.name.rpartition("-")[0]

    @property
    def files(self) -> dict[str, Path]:
        """Its files by name."""
        return {name: self.folder / file for name, file in self.manifest.get("files", {}).items()}

    def table(self, name: str) -> pd.DataFrame:
        """One of its CSV files, by the file's name; see `records` for its rows.

        Raises:
            UserError: it is missing or not a table.
        """
        return read_csv(self.folder / name)

    def records(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of its CSV files."""
        return records_of(self.table(name))

    def report(self) -> dict[str, Any]:
        """What a command ends with: the figures, the seconds they took, and the paths of the files."""
        files = {name: str(path) for name, path in self.files.items()}
        return {**self.result, "seconds": self.manifest.get("seconds"), "files": files}


@contextmanager
def complete(folder: Path) -> Iterator[None]:
    """Where a figure of an artifact is looked for.

    Raises:
        UserError: the block misses one.
    """
    try:
        yield
    except KeyError as error:
        raise UserError(
            f"{folder} lacks {error}: it is damaged or of another version; make it again with --rebuild"
        ) from None


class Made(NamedTuple):
    """What a study leaves behind when it has measured."""

    result: Json
    """its figures, written to `result.json`; a figure that cannot be measured is None"""
    files: Mapping[str, str] = MappingProxyType({})
    """the files it wrote into the folder, by name, beside those that it always writes"""
    facts: Json = MappingProxyType({})
    """what the manifest tells beside"""
    digests: Mapping[str, str] = MappingProxyType({})
    """of files that have checksums of their own (see `sfc.core.contents`)"""


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame], digits: int | None = None) -> dict[str, str]:
    """Write tables as CSV; the files by the tables' names, for `Made`.

    Args:
        digits: significant ones of floats; None: six decimals.
    """
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table if digits else table.round(6), digits)
    return {name: f"{name}.csv" for name in tables}


def made_in_parts(
    folder: Path,
    names: Sequence[str],
    make: Callable[[str], Json],
    progress: Callable[[int], None] = lambda parts: None,
) -> dict[str, Any]:
    """What is made of each of these names, for JSON: a file in the folder, made where it is missing.

    Parts in the artifact's folder `PARTS` are deleted when it is finished.

    Several processes share the parts, and all of them have all in the end. A process that is killed costs one part.
    """
    for name, is_own in dealt(names):
        path = folder / f"{name}.json"
        if is_own and not path.exists():
            write_json(path, make(name))
        progress(1)
    wait_for_all()
    parts = {name: read_json(folder / f"{name}.json") for name in names}
    wait_for_all()  # the leader may delete them next
    return parts


class Need(NamedTuple):
    """A study that has to be finished before another one."""

    study: "Study"
    run: Run


class Study(ABC, Generic[OwnOptions]):
    """A study. Its docstring is the help of its command: what it asks, and an example."""

    name: ClassVar[str]
    """of its command: `sfc NAME`"""
    options: type[OwnOptions]
    schema: ClassVar[int] = 1
    """raised by hand when the meaning of its artifact changes"""
    also: ClassVar[Sequence[tuple[type[Options], str]]] = ()
    """fields of other sections that its command offers as well"""
    files: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """the files it always writes, by name; `page` is written for it"""
    is_shared: ClassVar[bool] = False
    """whether several processes make it together (see `sfc.core.ranks`): `make` runs on all of them, and what it
    returns counts on the leader; else the leader alone makes it"""
    model_columns: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """the figures of `model_row` with the titles of their columns in a table of models; fields of `Words` stand in
    braces: `"{acted}: {positive}"`"""
    model_headline: ClassVar[Sequence[str]] = ()
    """those of them that matter most: they stand in one table with those of other studies"""

    def of(self, run: Run) -> OwnOptions:
        """The study's options in a run."""
        return self.options.of(run.experiment)

    def check(self, run: Run) -> None:
        """Check the options before anything runs.

        Raises:
            UserError: something is wrong with them.
        """

    def label(self, run: Run) -> str:
        """The name of the artifact's folder, without the fingerprint: it begins with `name`."""
        return self.name

    @abstractmethod
    def inputs(self, run: Run) -> dict[str, Any]:
        """A JSON value of all that the artifact depends on, beside the seed, the schema and the behavior."""

    def needs(self, run: Run) -> Sequence[Need]:
        """What has to be finished before."""
        return ()

    def makes(self, run: Run) -> "Sequence[Need]":
        """What is finished on the way where it is missing: plans count it before this study."""
        return ()

    def work(self, sketch: "Sketch") -> "Sequence[Work] | None":
        """What making the artifact takes, step by step, without making it; None where a study does not say so.

        Commands of studies that say it have `--dry-run`.

        Raises:
            UserError: what it would be made from cannot be read.
        """
        return None

    @abstractmethod
    def make(self, session: Session, folder: Path) -> Made:
        """Measure, and write files into the folder.

        Raises:
            UserError: what it needs is not there, or damaged.
        """

    @abstractmethod
    def page(self, finished: Finished) -> Page:
        """What there is to show of a finished artifact, from its files alone."""

    def model_row(self, finished: Finished) -> dict[str, Any]:
        """The figures that a table of models (`sfc batch`) has of a finished artifact, by the names of `model_columns`.

        What is not measured is left out or None.
        """
        return {}

    def artifact(self, run: Run) -> Artifact:
        """Where the study's result lies, and what it depends on."""
        behavior = {"name": run.behavior.name, **run.behavior.inputs(run.experiment)}
        inputs = {"schema": self.schema, "seed": run.experiment.seed, "behavior": behavior, **self.inputs(run)}
        return Artifact.of(below(run.root, "circuits", run.experiment.name), self.label(run), inputs)

    def is_current(self, run: Run, artifact: Artifact) -> bool:
        """Whether the artifact is there and needs nothing more."""
        return artifact.is_complete()

    def build(self, session: Session, artifact: Artifact, rebuild: bool) -> None:
        """Make the artifact: everything that `make` does not do."""
        with artifact.being_made(rebuild) as folder:
            made = self.make(session, folder) if self.is_shared else None
            if is_leader():
                with alone():
                    self.leave(session, artifact, made or self.make(session, folder))

    def leave(self, session: Session, artifact: Artifact, made: Made) -> None:
        """Write the result, the page and, last, the manifest, which declares the artifact finished."""
        write_json(artifact.folder / RESULT, made.result)
        facts = {
            "study": self.name,
            "words": session.run.behavior.words._asdict(),
            "files": {**self.files, **made.files, "result": RESULT},
            "seconds": session.clock.seconds,
            **made.facts,
        }
        if "page" in self.files:
            page = self.page(Finished(artifact.folder, artifact.described(**facts)))
            write_text(artifact.folder / self.files["page"], page_html(page))
        shutil.rmtree(artifact.folder / PARTS, ignore_errors=True)
        artifact.finish(made.digests, **facts)


STUDIES: Registry[Study[Any]] = Registry("study")


def ensure(study: Study[Any], run: Run, rebuild: bool = False, session: Session | None = None) -> Finished:
    """The finished artifact of a study, made unless it is up to date, after whatever it needs.

    Raises:
        UserError: as the study's `check` and `make`.
    """
    study.check(run)
    artifact = study.artifact(run)
    # Processes that work by themselves may want the same at the same time: the first one makes it.
    with nullcontext() if world_size() > 1 else in_turn(artifact.folder.name):
        if told(lambda: not rebuild and study.is_current(run, artifact)):
            if is_leader():
                artifact.tidy()
            say(f"up to date: {artifact.folder}")
        else:
            session = Session(run) if session is None else session.for_run(run)
            for need in study.needs(run):
                ensure(need.study, need.run, session=session)
            session.clock.restart()
            study.build(session, artifact, rebuild)
    return Finished(artifact.folder)

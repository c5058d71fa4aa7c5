"""`sfc batch`: the same studies of several models, each artifact kept where it is up to date, and the comparison.

The models are presets, each with its own overrides, from a list of names or a YAML file. A study that fails for a model
is listed with its reason, and the others go on. A model is loaded once for all studies, and dropped from memory before
the next.
"""

import os
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sfc.behaviors.behavior import BEHAVIORS
from sfc.core.artifacts import MANIFEST, Artifact, write_csv, write_json, write_text
from sfc.core.config import Experiment
from sfc.core.errors import CannotLoadModel, UserError, first_problem
from sfc.core.experiments import load_experiment, read_yaml
from sfc.core.progress import say
from sfc.pages.blocks import Page
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.session import Session
from sfc.studies.batch.depth import critical_table, frequencies, probe_table
from sfc.studies.batch.page import batch_page
from sfc.studies.study import RESULT, STUDIES, Finished, Study, ensure


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field(min_length=1)
    set: list[str] = []


class _Study(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[_Entry] = Field(min_length=1)

    @field_validator("models", mode="before")
    @classmethod
    def _names_are_presets(cls, entries: Any) -> Any:
        if not isinstance(entries, list):
            return entries
        return [{"preset": entry} if isinstance(entry, str) else entry for entry in entries]


def load_study(models: str | None, file: Path | None, overrides: Sequence[str]) -> list[Experiment]:
    """The experiments that `--models a,b` or a file means; overrides apply to all, after those of the file.

    A file holds `models:`, a list of preset names or of mappings with `preset` and `set` (a list of overrides).

    Raises:
        UserError: both are given, the file is malformed, a preset does not exist, or two models have one name.
    """
    if (models is None) == (file is None):
        raise UserError("name the models with --models a,b or with --file study.yaml, not with both or neither")
    entries = _read(file) if file else [_Entry(preset=name.strip()) for name in (models or "").split(",")]
    experiments = [load_experiment(entry.preset, [*entry.set, *overrides]) for entry in entries]
    twice = [name for name, count in Counter(experiment.name for experiment in experiments).items() if count > 1]
    if twice:
        raise UserError(f"two models are named {twice[0]!r}: give one another name with set: [name=…]")
    return experiments


def _read(file: Path) -> list[_Entry]:
    try:
        return _Study.model_validate(read_yaml(file)).models
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}; expected `models:`, a list of presets") from None


_FILES = {
    "page": "batch.html",
    "models": "models.csv",
    "critical": "critical.csv",
    "frequency": "frequency.csv",
    "result": RESULT,
}
_TRACEBACKS = "tracebacks.txt"
_SCHEMA = 2
"""raised by hand when the meaning of the comparison changes"""


class Failure(NamedTuple):
    """A stage of a model that came to nothing."""

    model: str
    stage: str
    reason: str
    traceback: str = ""
    """of an error that no user can correct"""


class Studied(NamedTuple):
    """What became of one model."""

    run: Run
    finished: dict[str, Finished]
    """by stage"""
    failures: list[Failure]


class Batch(NamedTuple):
    """A finished comparison."""

    report: dict[str, Any]
    """the figures, and the paths of the files"""
    page: Page


def stages_of(text: str) -> dict[str, Study[Any]]:
    """The studies that `--stages` names, separated by commas.

    Raises:
        UserError: there is no such study.
    """
    names = [name.strip() for name in text.split(",")]
    return {name: STUDIES[name] for name in names}


def make_batch(runs: Sequence[Run], stages: Mapping[str, Study[Any]], category: str | None, limit: int | None) -> Batch:
    """Run the studies of every model as far as they are missing, and write the comparison.

    The comparison is put together again each time: the studies are what costs.

    Args:
        category: for studies that take one; None: what each has of its own.
        limit: for studies that take one and have no limit of their own.

    Raises:
        UserError: nothing succeeded, for no model; the reasons are in the message.
    """
    studied = [_study(run, stages, category, limit) for run in runs]
    failures = [failure for each in studied for failure in each.failures]
    if not any(each.finished for each in studied):
        reasons = "; ".join(f"{failure.model}, {failure.stage}: {failure.reason}" for failure in failures)
        raise UserError(f"no model could be studied: {reasons}")
    rows = [_row(each, stages) for each in studied]
    by_model = {each.run.experiment.name: each.finished for each in studied}
    critical, measured = critical_table(by_model)
    frequency = frequencies(critical, measured)
    artifact = _artifact(runs, list(stages), category, limit)
    links = {
        model: {stage: _page(each, artifact.folder) for stage, each in of.items()} for model, of in by_model.items()
    }
    result = {
        "category": category,
        "stages": list(stages),
        "models": rows,
        "failures": [{"model": f.model, "stage": f.stage, "reason": f.reason} for f in failures],
    }
    words = BEHAVIORS[runs[0].experiment.behavior].words
    page = batch_page(result, stages, frequency, probe_table(by_model), links, words)
    with artifact.being_made() as folder:
        tables = {"models": pd.DataFrame(rows).convert_dtypes(), "critical": critical, "frequency": frequency}
        for name, table in tables.items():
            write_csv(folder / _FILES[name], table, digits=6)
        write_json(folder / RESULT, result)
        write_text(folder / _FILES["page"], page_html(page))
        (folder / _TRACEBACKS).unlink(missing_ok=True)
        if tracebacks := "\n".join(f"{f.model}, {f.stage}\n{f.traceback}" for f in failures if f.traceback):
            write_text(folder / _TRACEBACKS, tracebacks)
            say(f"unexpected errors: see {folder / _TRACEBACKS}")
        artifact.finish(files=_FILES, pages=links)
    return Batch({**result, "files": {name: str(artifact.folder / file) for name, file in _FILES.items()}}, page)


def _artifact(runs: Sequence[Run], stages: Sequence[str], category: str | None, limit: int | None) -> Artifact:
    inputs = {
        "schema": _SCHEMA,
        "experiments": [run.experiment.model_dump(mode="json") for run in runs],
        "data": runs[0].data,
        "stages": stages,
        "category": category,
        "limit": limit,
    }
    return Artifact.of(runs[0].root / "circuits" / "batch", category or "models", inputs)


def _study(run: Run, stages: Mapping[str, Study[Any]], category: str | None, limit: int | None) -> Studied:
    name, studied, session = run.experiment.name, Studied(run, {}, []), Session(run)
    for stage, study in stages.items():
        say(f"{name}: {stage}")
        try:
            chosen = with_options(study, run, category, limit)
            studied.finished[stage] = ensure(study, chosen, session=session)
        except UserError as error:
            studied.failures.append(Failure(name, stage, " ".join(str(error).split())))
            if isinstance(error, CannotLoadModel):
                break
        except Exception as error:  # another model's architecture may fail in any way, and must not end the others
            reason = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
            studied.failures.append(Failure(name, stage, reason, traceback.format_exc()))
    session.close()
    for failure in studied.failures:
        say(f"failed: {name}, {failure.stage}: {failure.reason}")
    return studied


def with_options(study: Study[Any], run: Run, category: str | None, limit: int | None) -> Run:
    """The run with a batch's category and limit, where the study has such options; see `make_batch`."""
    values: dict[str, Any] = {}
    if category is not None and "category" in study.options.model_fields:
        values["category"] = category
    if limit is not None and "limit" in study.options.model_fields and study.of(run).limit is None:
        values["limit"] = limit
    return run.having(study.options, **values) if values else run


def _row(studied: Studied, stages: Mapping[str, Study[Any]]) -> dict[str, Any]:
    """One model's line of the table of models; what was not measured is None."""
    experiment = studied.run.experiment
    failed = ", ".join(failure.stage for failure in studied.failures)
    row: dict[str, Any] = {"model": experiment.name, "source": experiment.model.source, "failed": failed}
    row |= dict.fromkeys(column for study in stages.values() for column in study.model_columns)
    for stage, finished in studied.finished.items():
        row |= stages[stage].model_row(finished)
    return row


def _page(finished: Finished, folder: Path) -> str:
    """The page of an artifact, or its manifest where it has none, relative to a folder."""
    page = finished.files.get("page", finished.folder / MANIFEST)
    return Path(os.path.relpath(page, folder)).as_posix()

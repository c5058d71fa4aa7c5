"""`sfc batch`: the same studies of several models, each artifact kept where it is up to date, and the comparison.

The models are presets, each with its own overrides, from a list of names or a YAML file. A study that fails for a model
is listed with its reason, and the others go on. A model is loaded once for all studies, and dropped from memory before
the next. Several processes share the models.

Critical components are compared by depth. Layer 21 of 30 and layer 8 of 12 are not the same layer, but they lie equally
deep: layers are compared by their share of the way from the first (0) to the last (1), in tenths. Heads have numbers
that mean nothing in another model, so that a model counts once per kind and tenth, however many of its heads are
critical there.
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
from sfc.core.experiments import load_experiment
from sfc.core.files import below
from sfc.core.progress import say
from sfc.core.ranks import dealt, gathered, is_leader
from sfc.core.reading import read_yaml
from sfc.pages.blocks import Page
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.session import Session
from sfc.studies.batch.page import batch_page
from sfc.studies.logits import COMPLIANCE, GUARDRAIL, MOST_FALSE
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
    own = [_study(run, stages, category, limit) for run, is_own in dealt(runs) if is_own]
    studied = _of_all(runs, own)
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
    tables = {"models": pd.DataFrame(rows).convert_dtypes(), "critical": critical, "frequency": frequency}
    tracebacks = "\n".join(f"{f.model}, {f.stage}\n{f.traceback}" for f in failures if f.traceback)
    with artifact.being_made(rebuild=True) as folder:
        if is_leader():
            for name, table in tables.items():
                write_csv(folder / _FILES[name], table, digits=6)
            write_json(folder / RESULT, result)
            write_text(folder / _FILES["page"], page_html(page))
            if tracebacks:
                write_text(folder / _TRACEBACKS, tracebacks)
                say(f"unexpected errors: see {folder / _TRACEBACKS}")
            artifact.finish(files=_FILES, pages=links)
    return Batch({**result, "files": {name: str(artifact.folder / file) for name, file in _FILES.items()}}, page)


def _of_all(runs: Sequence[Run], own: Sequence[Studied]) -> list[Studied]:
    """What became of all models, by what the processes tell each other of their own."""
    told = {
        each.run.experiment.name: [
            {stage: str(finished.folder) for stage, finished in each.finished.items()},
            [list(failure) for failure in each.failures],
        ]
        for each in own
    }
    known = {name: each for of_process in gathered(told) for name, each in of_process.items()}
    studied = []
    for run in runs:
        folders, failures = known[run.experiment.name]
        finished = {stage: Finished(Path(folder)) for stage, folder in folders.items()}
        studied.append(Studied(run, finished, [Failure(*failure) for failure in failures]))
    return studied


def _artifact(runs: Sequence[Run], stages: Sequence[str], category: str | None, limit: int | None) -> Artifact:
    inputs = {
        "schema": _SCHEMA,
        "experiments": [run.experiment.model_dump(mode="json") for run in runs],
        "data": runs[0].data,
        "stages": stages,
        "category": category,
        "limit": limit,
    }
    return Artifact.of(below(runs[0].root, "circuits", "batch"), category or "models", inputs)


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


COLUMNS = ("model", "evidence", "kind", "component", "layer", "depth", "tenth", "effect", "low", "high", "q_value")
TENTHS = 10
ByModel = Mapping[str, Mapping[str, Finished]]
"""finished artifacts, by model and study"""


def critical_table(studied: ByModel) -> tuple[pd.DataFrame, Mapping[str, list[str]]]:
    """The critical components of all models, and the models in which each kind of evidence was looked for."""
    tables, measured = [], {}
    for model, artifacts in studied.items():
        if patching := artifacts.get("patch"):
            effects = patching.table("effects.csv")
            tables.append(patched_components(model, effects, patching.result["n_layers"]))
            for direction in effects["direction"].unique():
                measured.setdefault(str(direction), []).append(model)
        if logits := artifacts.get("attribute-logits"):
            tables.append(written_components(model, logits.table("components.csv")))
            for role in (GUARDRAIL, COMPLIANCE):
                measured.setdefault(role, []).append(model)
    found = [table for table in tables if len(table)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=list(COLUMNS)), measured


def probe_table(studied: ByModel) -> pd.DataFrame:
    """The probe's figures at every layer of all models, with `model` and `depth`; empty where none was probed."""
    tables = []
    for model, artifacts in studied.items():
        if probe := artifacts.get("probe"):
            layers = probe.table("layers.csv")
            tables.append(layers.assign(model=model, depth=relative_depth(layers["layer"], len(layers))))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def patched_components(model: str, effects: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """The components of an `effect_table` with q below 0.05, evidence `denoise` or `noise`, with `COLUMNS`.

    Of several position sets the strongest counts, so that every component is there once per direction. Effects have no
    unit.
    """
    critical = effects[~effects["is_range"] & (effects["q_value"] < MOST_FALSE)].dropna(subset=["effect"])
    critical = critical.sort_values("effect", key=lambda effect: -effect.abs(), kind="stable")
    critical = critical.drop_duplicates(["direction", "component"]).rename(columns={"direction": "evidence"})
    return _placed(model, critical, n_layers)


def written_components(model: str, components: pd.DataFrame) -> pd.DataFrame:
    """The guardrail and compliance heads of a `component_table`, with `COLUMNS`; effects are nats on toxic prompts."""
    heads = components[components["role"].isin((GUARDRAIL, COMPLIANCE))]
    renamed = {"role": "evidence", "toxic_mean": "effect", "toxic_low": "low", "toxic_high": "high"}
    return _placed(model, heads.rename(columns=renamed), int(components["layer"].max()) + 1)


def frequencies(critical: pd.DataFrame, measured: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """In how many models a kind is critical at a depth, most frequent first.

    Args:
        critical: rows with `COLUMNS` of all models.
        measured: for each kind of evidence the models in which it was looked for.

    Returns:
        Columns `evidence, kind, tenth, n_models, n_measured, share, n_components, strongest` (the component of largest
        effect in each model that has one).
    """
    rows = []
    for (evidence, kind, tenth), group in critical.groupby(["evidence", "kind", "tenth"], sort=True):  # pyright: ignore
        ordered = group.sort_values("effect", key=lambda effect: -effect.abs(), kind="stable")
        best = ordered.drop_duplicates("model").sort_values("model")
        n_measured = len(measured[str(evidence)])
        rows.append(
            {
                "evidence": evidence,
                "kind": kind,
                "tenth": tenth,
                "n_models": len(best),
                "n_measured": n_measured,
                "share": len(best) / n_measured,
                "n_components": len(group),
                "strongest": "; ".join(f"{model} {name}" for model, name in best[["model", "component"]].to_numpy()),
            }
        )
    names = ["evidence", "kind", "tenth", "n_models", "n_measured", "share", "n_components", "strongest"]
    table = pd.DataFrame(rows, columns=names)
    return table.sort_values(["share", "n_components"], ascending=False, kind="stable").reset_index(drop=True)


def relative_depth(layers: pd.Series, n_layers: int) -> pd.Series:
    """The share of the way from the first layer (0) to the last (1); a model of one layer is at 1."""
    return layers.astype(float) / (n_layers - 1) if n_layers > 1 else layers.astype(float) + 1.0


def _placed(model: str, rows: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    depth = relative_depth(rows["layer"], n_layers)
    # The small number keeps 0.3 x 10 from being 2.
    tenth = (depth * TENTHS + 1e-9).astype(int).clip(upper=TENTHS - 1)
    return rows.assign(model=model, depth=depth, tenth=tenth)[list(COLUMNS)].reset_index(drop=True)

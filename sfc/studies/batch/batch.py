"""Stage: the same study of several models, each stage's artifact kept where it is up to date, and the comparison.

A model or a stage that fails is listed with its reason, and the others go on.
"""

import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sfc.core.artifacts import Artifact, write_csv, write_json, write_text
from sfc.core.errors import CannotLoadModel, UserError, suggestion
from sfc.core.progress import say
from sfc.pipeline import ensure_circuit
from sfc.pipeline_study import batch_artifact, ensure_behaviour, ensure_logit_attribution, ensure_patching
from sfc.run import Run
from sfc.studies.batch.depth import frequencies
from sfc.studies.batch.page import write_batch_page
from sfc.studies.batch.tables import critical_table, model_row, probe_table
from sfc.studies.probe.study import ProbeOptions
from sfc.studies.study import STUDIES, ensure

FILES = {
    "page": "batch.html",
    "models": "models.csv",
    "critical": "critical.csv",
    "frequency": "frequency.csv",
    "result": "result.json",
}
_TRACEBACKS = "tracebacks.txt"

STAGES: dict[str, Callable[[Run, str, int | None], Artifact]] = {
    "behaviour": lambda run, _category, limit: ensure_behaviour(run, None, "test", limit),
    "probe": lambda run, category, _limit: _probed(run, category),
    "logits": lambda run, category, _limit: ensure_logit_attribution(run, category),
    "patching": lambda run, _category, _limit: ensure_patching(run),
    "circuit": lambda run, category, _limit: ensure_circuit(run, category),
}


def _probed(run: Run, category: str) -> Artifact:
    run = run.having(ProbeOptions, category=category)
    ensure(STUDIES["probe"], run)
    return STUDIES["probe"].artifact(run)


class Failure(NamedTuple):
    """A stage of a model that came to nothing."""

    model: str
    stage: str
    reason: str
    traceback: str = ""
    """of an error that is no user's: for whoever mends it"""


class Studied(NamedTuple):
    """What became of one model."""

    run: Run
    artifacts: dict[str, Artifact]
    """by stage"""
    failures: list[Failure]


def check_stages(stages: Iterable[str]) -> None:
    """Raise a `UserError` if a stage is none of `STAGES`."""
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"no stage {stage!r} in a batch: {suggestion(stage, STAGES)}")


def make_batch(
    runs: Sequence[Run], stages: Sequence[str], category: str, limit: int | None, rebuild: bool = False
) -> Artifact:
    """Run the stages of every model as far as they are missing, and write the comparison.

    Raises:
        UserError: nothing succeeded, for no model; the reasons are in the message.
    """
    studied = [_study(run, stages, category, limit) for run in runs]
    failures = [failure for each in studied for failure in each.failures]
    if not any(each.artifacts for each in studied):
        reasons = "; ".join(f"{failure.model}, {failure.stage}: {failure.reason}" for failure in failures)
        raise UserError(f"no model could be studied: {reasons}")
    artifact = batch_artifact(runs, stages, category, limit)
    with artifact.being_made(rebuild) as folder:
        rows = [model_row(each.run.experiment, each.artifacts, [f.stage for f in each.failures]) for each in studied]
        models = pd.DataFrame(rows).convert_dtypes()
        by_name = {each.run.experiment.name: each.artifacts for each in studied}
        critical, measured = critical_table(by_name)
        frequency = frequencies(critical, measured)
        for name, table in {"models": models, "critical": critical, "frequency": frequency}.items():
            write_csv(folder / FILES[name], table, digits=6)
        result = {
            "category": category,
            "stages": list(stages),
            "models": rows,
            "failures": [{"model": f.model, "stage": f.stage, "reason": f.reason} for f in failures],
            "files": FILES,
        }
        write_json(folder / FILES["result"], result)
        if tracebacks := "\n".join(f"{f.model}, {f.stage}\n{f.traceback}" for f in failures if f.traceback):
            write_text(folder / _TRACEBACKS, tracebacks)
            say(f"unexpected errors: see {folder / _TRACEBACKS}")
        links = {name: {stage: _page(each) for stage, each in artifacts.items()} for name, artifacts in by_name.items()}
        write_batch_page(folder / FILES["page"], result, frequency, probe_table(by_name), links)
        artifact.finish(result=result, pages=links)
    return artifact


def _study(run: Run, stages: Sequence[str], category: str, limit: int | None) -> Studied:
    name = run.experiment.name
    studied = Studied(run, {}, [])
    for stage in stages:
        say(f"{name}: {stage}")
        try:
            studied.artifacts[stage] = STAGES[stage](run, category, limit)
        except UserError as error:
            studied.failures.append(Failure(name, stage, " ".join(str(error).split())))
            if isinstance(error, CannotLoadModel):
                break
        except Exception as error:  # another model's architecture may fail in any way, and must not end the others
            reason = " ".join([f"{type(error).__name__}:", *str(error).split()])[:300]
            studied.failures.append(Failure(name, stage, reason, traceback.format_exc()))
    for failure in studied.failures:
        say(f"failed: {name}, {failure.stage}: {failure.reason}")
    return studied


def _page(artifact: Artifact) -> str:
    """The page of a stage's artifact, relative to the folder of a batch, which lies beside those of the presets."""
    manifest = artifact.manifest()
    files = manifest.get("files") or manifest["result"]["files"]
    return str(
        Path("..", "..", artifact.folder.parent.name, artifact.folder.name, files.get("page", files.get("chart")))
    )

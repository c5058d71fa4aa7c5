"""What the model did with some prompts, judged once and kept: contrasts of behaviour need to know before they start."""

import pandas as pd

from sfc.artifacts import Artifact
from sfc.evaluation.behaviour import measure_behaviour
from sfc.models.identity import model_identity
from sfc.models.loading import Model
from sfc.pipeline_study import BEHAVIOUR_SCHEMA
from sfc.prompts.prepare import prompts_fingerprint
from sfc.run import Run
from sfc.stages.behaviour import FILES, finish_behaviour, labelled


def judged(run: Run, model: Model, prompts: pd.DataFrame, name: str) -> pd.DataFrame:
    """The prompts with a column `refused`, from greedy replies that are generated only if they lie in no artifact yet.

    Args:
        prompts: rows of the prepared table.
        name: of the artifact, `behaviour-NAME`.
    """
    inputs = {
        "schema": BEHAVIOUR_SCHEMA,
        "model": model_identity(run.experiment.model),
        "prompts": prompts_fingerprint(prompts),
        "seed": run.experiment.seed,
    }
    artifact = Artifact.of(run.root / "circuits" / run.experiment.name, f"behaviour-{name}", inputs)
    if not artifact.is_complete():
        with artifact.being_made() as folder:
            finish_behaviour(artifact, folder, measure_behaviour(model, labelled(prompts)), run.experiment.name)
    replies = pd.read_csv(artifact.folder / FILES["replies"], keep_default_na=False)
    refused = dict(zip(replies["prompt"], replies["refused"], strict=True))
    return prompts.assign(refused=prompts["prompt"].map(refused).astype(bool))

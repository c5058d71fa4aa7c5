"""Stage: what the model does with prompts: replies, judged, beside its refusal scores."""

from pathlib import Path

import pandas as pd

from sfc.artifacts import Artifact, write_csv, write_text
from sfc.evaluation.behaviour import Behaviour, measure_behaviour
from sfc.models.loading import choose_device, load_model
from sfc.offline import PLOTLY_CONFIG
from sfc.prompts.anyfile import load_prompt_file
from sfc.prompts.keyed import keyed_ranks
from sfc.run import Run
from sfc.viewer.behaviour import rates_chart

FILES = {"replies": "replies.csv", "groups": "groups.csv", "chart": "behaviour.html"}
_LABELS = {"toxic": "toxic", "hard": "hard", "safe_80k": "safe"}


def make_behaviour(
    run: Run, artifact: Artifact, prompts: Path | None, split: str, limit: int | None, rebuild: bool = False
) -> None:
    """Generate, judge, and write every reply, the rates and the chart.

    Raises:
        UserError: the prompt file is malformed, or no prompt is short enough.
    """
    frame = load_prompt_file(prompts) if prompts else _of_split(run, split)
    if limit is not None:
        frame = frame[keyed_ranks(frame, ["label"], f"limit {run.experiment.seed}") < limit].reset_index(drop=True)
    model = load_model(run.experiment.model, choose_device(run.device))
    with artifact.being_made(rebuild) as folder:
        behaviour = measure_behaviour(model, frame)
        finish_behaviour(artifact, folder, behaviour, run.experiment.name)


def finish_behaviour(artifact: Artifact, folder: Path, behaviour: Behaviour, preset: str) -> None:
    """Write everything there is to say of a behaviour; then the artifact is complete."""
    write_behaviour(folder, behaviour)
    groups = behaviour.groups.to_dict("records")
    artifact.finish(result={"preset": preset, "auroc": behaviour.auroc, "groups": groups}, files=FILES)


def write_behaviour(folder: Path, behaviour: Behaviour) -> None:
    """Write every reply, the rates of each group, and a chart of them."""
    replies, groups = behaviour.replies, behaviour.groups
    write_csv(folder / FILES["replies"], replies, digits=5)
    write_csv(folder / FILES["groups"], groups, digits=5)
    write_text(folder / FILES["chart"], rates_chart(behaviour).to_html(config=PLOTLY_CONFIG, include_plotlyjs=True))


def _of_split(run: Run, split: str) -> pd.DataFrame:
    frame = run.prompts.frame
    if split != "all":
        frame = frame[frame["split"] == split]
    return labelled(frame).reset_index(drop=True)


def labelled(prompts: pd.DataFrame) -> pd.DataFrame:
    """Rows of the prepared table with the `label` that replies are grouped by: toxic, hard or safe."""
    return prompts.assign(label=prompts["dataset_type"].map(_LABELS))

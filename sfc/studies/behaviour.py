"""The chart of refusal rates.

Stage: what the model does with prompts: replies, judged, beside its refusal scores.

What the model did with some prompts, judged once and kept: contrasts of behaviour need to know before they start.
"""

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from sfc.circuits.replies import Behaviour, measure_behaviour
from sfc.core.artifacts import Artifact, write_csv, write_text
from sfc.data.prepare import prompts_fingerprint
from sfc.data.read import UNLABELLED, load_prompt_file
from sfc.data.schema import keyed_ranks, looked_up
from sfc.models.identity import model_identity
from sfc.models.loading import Model, choose_device, load_model
from sfc.pages.style import PLOTLY_CONFIG
from sfc.pages.text import hover_text
from sfc.pipeline_study import BEHAVIOUR_SCHEMA
from sfc.run import Run

_COLOURS = {"toxic": "#b2182b", "hard": "#ef8a62", "safe": "#4393c3", UNLABELLED: "#878787"}


def rates_chart(behaviour: Behaviour) -> go.Figure:
    """Grouped bars: the refusal rate of each category, one bar per label, with its 95 % interval."""
    figure = go.Figure()
    for label, group in behaviour.groups.groupby("label", sort=False):
        names = [hover_text(str(name)) for name in group["category"]]
        figure.add_bar(
            name=str(label),
            x=names,
            y=100 * group["rate"],
            marker_color=_COLOURS[str(label)],
            error_y={
                "type": "data",
                "array": 100 * (group["high"] - group["rate"]),
                "arrayminus": 100 * (group["rate"] - group["low"]),
                "thickness": 1,
                "width": 3,
            },
            customdata=group[["refusals", "n", "low", "high"]].assign(low=100 * group["low"], high=100 * group["high"]),
            hovertemplate=f"%{{x}}, {label}<br>%{{customdata[0]}} of %{{customdata[1]}} refused: %{{y:.1f}} %"
            "<br>95 % interval %{customdata[2]:.1f} to %{customdata[3]:.1f} %<extra></extra>",
        )
    agreement = "not measurable" if behaviour.auroc is None else f"{behaviour.auroc:.3f}"
    figure.update_layout(
        title={
            "text": f"Refusals of {len(behaviour.replies):,} prompts<br>"
            f"<sup>judged from greedy replies; AUROC of the refusal score against them: {agreement}</sup>"
        },
        barmode="group",
        xaxis_title="category",
        yaxis={"title": "refused (%)", "range": [0, 100]},
        legend_title="prompts",
        template="plotly_white",
    )
    return figure


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
    return prompts.assign(refused=looked_up(prompts["id"], replies, "refused").astype(bool))

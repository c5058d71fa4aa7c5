"""Does a circuit decide? What its figures on prompts of both sides allow to say, and the picture that shows it."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.pages.blocks import Block, Figure, Paragraph, Section, Table, cell
from sfc.pages.style import AMBER, BLUE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import hover_text

LARGE_PROMPT_FREE = 0.1
"""share of the faithfulness left without the prompt above which a page warns"""


def verdict(result: Mapping[str, Any]) -> list[Block]:
    """What the figures of both sides allow to say, and a warning where the prompt is not what a circuit goes by."""
    if not result.get("says"):
        return []
    told = result["says"]
    blocks: list[Block] = [Paragraph(f"**What the figures say.** {told[:1].upper()}{told[1:]}.")]
    if (free := result.get("prompt_free")) is not None and free > LARGE_PROMPT_FREE:
        blocks.append(
            Paragraph(
                f"**Warning.** With every node of the first site ablated, so that nothing of the prompt can enter,"
                f" {cell(free)} of the faithfulness is left: it is not the prompt's doing."
            )
        )
    return blocks


def both_sides(scores: pd.DataFrame | None, words: Words) -> list[Section]:
    """The scores of prompts of both sides, in the model and with the circuit alone."""
    if scores is None or scores.empty:
        return []
    means = scores.groupby("kind", sort=False)[["model", "circuit"]].agg(["count", "mean"])
    rows = [
        (str(kind), cell(int(row["model", "count"])), cell(row["model", "mean"]), cell(row["circuit", "mean"]))
        for kind, row in means.iterrows()
    ]
    table = Table("Mean scores by side", ("prompts", "n", "model", "the circuit alone"), rows)
    return [Section("", [Figure("both-sides", lambda: both_sides_figure(scores, words), table)])]


def both_sides_figure(scores: pd.DataFrame, words: Words) -> go.Figure:
    """A dot per test prompt: its score in the model and with the circuit alone, coloured by side, with the diagonal."""
    figure = styled_figure(f"Does the circuit decide? The {words.score} of test prompts of both sides", 460)
    ends = [float(scores[["model", "circuit"]].min().min()), float(scores[["model", "circuit"]].max().max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": QUIET, "dash": "dot"}, name="as the model", hoverinfo="skip"
    )
    colours = {words.positive: VERMILION, "hard": AMBER, words.negative: BLUE}
    for kind, of_kind in scores.groupby("kind", sort=False):
        figure.add_scatter(
            x=of_kind["model"].tolist(),
            y=of_kind["circuit"].tolist(),
            mode="markers",
            marker={"color": colours.get(str(kind), QUIET), "size": 7, "opacity": 0.7},
            name=hover_text(f"{kind} prompts"),
            customdata=[hover_text(str(name)) for name in of_kind["id"]],
            hovertemplate="%{customdata}<br>model %{x:.2f}, circuit %{y:.2f}<extra></extra>",
        )
    return figure.update_layout(
        showlegend=True,
        xaxis=axis(f"{words.score} of the model, nats", zeroline=True),
        yaxis=axis("with the circuit alone, nats", zeroline=True),
    )

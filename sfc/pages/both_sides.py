"""Does a circuit decide? The picture that shows it, what its figures allow to say, and how it fares beside nulls."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.circuits.options import LARGE_PROMPT_FREE
from sfc.pages.blocks import Block, Figure, Paragraph, Section, Table, cell, figure_cell
from sfc.pages.style import AMBER, BLUE, GREEN, INK, QUIET, VERMILION, axis, styled_figure
from sfc.pages.text import hover_text


def verdict(result: Mapping[str, Any]) -> list[Block]:
    """What the figures of both sides allow to say, and a warning where the prompt is not what a circuit goes by."""
    if not result.get("says"):
        return []
    told = result["says"]
    blocks: list[Block] = [Paragraph(f"**What the figures say.** {told[:1].upper()}{told[1:]}.")]
    if (free := result.get("prompt_free")) is not None and free > LARGE_PROMPT_FREE:
        blocks.append(
            Paragraph(
                f"**Warning.** Under mean ablation {cell(free)} of the faithfulness is left with every node of the"
                " first site ablated, where nothing of the prompt can enter: that much is not the prompt's doing."
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
    """A dot per test prompt, or pair: its score in the model and with the circuit alone, coloured by side."""
    figure = styled_figure(f"Does the circuit decide? The {words.score} of test prompts of both sides", 460)
    ends = [float(scores[["model", "circuit"]].min().min()), float(scores[["model", "circuit"]].max().max())]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": QUIET, "dash": "dot"}, name="as the model", hoverinfo="skip"
    )
    colours = {words.positive: VERMILION, "hard": AMBER, words.negative: BLUE}
    against = scores["counterfactual"] if "counterfactual" in scores else pd.Series("", index=scores.index)
    names = scores["id"].astype(str) + against.map(lambda other: f", ablated to {other}" if other else "")
    for kind, of_kind in scores.groupby("kind", sort=False):
        figure.add_scatter(
            x=of_kind["model"].tolist(),
            y=of_kind["circuit"].tolist(),
            mode="markers",
            marker={"color": colours.get(str(kind), QUIET), "size": 7, "opacity": 0.7},
            name=hover_text(f"{kind} prompts"),
            customdata=[hover_text(name) for name in names.loc[of_kind.index]],
            hovertemplate="%{customdata}<br>model %{x:.2f}, circuit %{y:.2f}<extra></extra>",
        )
    return figure.update_layout(
        showlegend=True,
        xaxis=axis(f"{words.score} of the model, nats", zeroline=True),
        yaxis=axis("with the circuit alone, nats", zeroline=True),
    )


_LINES = {
    "agreement": ("agreement", GREEN, "solid"),
    "recovered_toxic": ("recovered on {positive} prompts", VERMILION, "solid"),
    "recovered_safe": ("recovered on {negative} prompts", BLUE, "solid"),
    "null_agreement": ("agreement, random dictionaries", QUIET, "dash"),
    "rotated_agreement": ("agreement, rotated dictionaries", QUIET, "dot"),
}


def proof_by_size(curve: pd.DataFrame, reported: int, words: Words) -> list[Section]:
    """What circuits of each size restore under counterfactual ablation, beside those of null dictionaries."""
    if "agreement" not in curve:
        return []
    shown = [name for name in _LINES if name in curve]
    sides = {"positive": words.positive, "negative": words.negative}
    titles = {name: _LINES[name][0].format(**sides) for name in shown}
    records = [{str(name): value for name, value in row.items()} for row in curve.to_dict("records")]
    rows = [(cell(int(row["size"])), *(figure_cell(row, name) for name in shown)) for row in records]
    table = Table("Under counterfactual ablation, test pairs", ("nodes", *titles.values()), rows)
    return [Section("", [Figure("proof", lambda: _proof_figure(curve, reported, titles), table)])]


def _proof_figure(curve: pd.DataFrame, reported: int, titles: Mapping[str, str]) -> go.Figure:
    figure = styled_figure("What circuits restore of the difference between prompts and counterfactuals", 430)
    for name, title in titles.items():
        _, colour, dash = _LINES[name]
        ends = {"symmetric": False, "thickness": 1, "width": 3}
        if f"{name}_high" in curve:
            high, low = (curve[f"{name}{end}"] - curve[name] for end in ("_high", "_low"))
            ends |= {"array": high.tolist(), "arrayminus": (-low).tolist()}
        figure.add_scatter(
            x=curve["size"].tolist(),
            y=[None if np.isnan(value) else value for value in curve[name].tolist()],
            error_y=ends,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            name=hover_text(title),
            hovertemplate=f"{hover_text(title)}: <b>%{{y:.2f}}</b><br>%{{x:,}} nodes<extra></extra>",
        )
    figure.add_vline(reported, line={"color": INK, "width": 1, "dash": "dot"})
    return figure.update_layout(
        showlegend=True,
        xaxis=axis("nodes in the circuit", type="log", dtick=1),
        yaxis=axis("share restored", range=[-0.3, 1.05], zeroline=True),
    )

"""The page of a direct logit attribution: heads, layers, and the components that tell the two sides apart best."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import json_records
from sfc.pages.blocks import (
    Figure,
    Formula,
    Page,
    Section,
    Tile,
    Tiles,
    cell,
    estimate_cell,
    grid_table,
    interval_cell,
    records_table,
)
from sfc.pages.style import GREEN, INK, PINK, axis, error_bars, heat_map, styled_figure
from sfc.pages.text import hover_text, tokens_text
from sfc.studies.logits.roles import COMPLIANCE, GUARDRAIL, strongest
from sfc.studies.study import Finished

_MARKS = {GUARDRAIL: "G", COMPLIANCE: "C"}
_LISTED = 20


def page(finished: Finished) -> Page:
    """The page of a finished attribution."""
    result, words = finished.result, finished.words
    components, layers = finished.table("components.csv"), finished.table("layers.csv")
    heads = components[components["kind"] == "head"].astype({"layer": int, "head": int})
    others = strongest(components[components["kind"] != "head"])[:_LISTED]
    cells = {(row["layer"], row["head"]): row["difference"] for row in json_records(heads, digits=None)}
    differences = grid_table(f"Heads: {words.positive} − {words.negative}, nats", "layer \\ head", cells)
    title = f"The heads that tell {words.positive} from {words.negative} prompts best"
    columns = {
        "component": "component", f"{words.positive}, nats (95 %)": "toxic", words.negative: "safe_mean",
        f"{words.positive} − {words.negative}": "difference",
    }  # fmt: skip
    of_heads = {**columns, "q": "q_value", "role": "role"}
    of_others = _contributions(json_records(others, digits=None))
    return Page(
        title=f"Direct logit attribution · {result['category']} · {result['preset']}",
        sentence=_sentence(result, words),
        summary=[
            _tiles(result, words),
            records_table(title, of_heads, _contributions(result["heads"]), texts=("role",)),
        ],
        sections=[
            Section("", [Figure("heads", lambda: heads_figure(heads, words), differences)]),
            Section("", [Figure("layers", lambda: layers_figure(layers, words))]),
            Section("", [records_table("Other parts, the largest differences first", columns, of_others)]),
        ],
        guide=_guide(result, words),
        findings=_findings(result),
        methods=_methods(words),
        limits=["Direct logit attribution sees what a part writes itself, not what it makes later parts write."],
    )


def _contributions(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records with their mean contribution to positive prompts, and its interval, under `toxic`."""
    ends = ("toxic_mean", "toxic_low", "toxic_high")
    return [{**record, "toxic": estimate_cell(*(record[end] for end in ends))} for record in records]


def heads_figure(heads: pd.DataFrame, words: Words) -> go.Figure:
    """Two heat maps of the heads, layers upwards: contributions to positive prompts, and positive - negative."""
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    figure = make_subplots(
        cols=2,
        subplot_titles=(f"{words.positive} prompts", f"{words.positive} − {words.negative}"),
        horizontal_spacing=0.14,
        figure=styled_figure("Heads", max(360, 150 + 16 * n_layers)),
    )
    cells = heads.assign(
        mark=heads["role"].map(_MARKS).fillna(""),
        hover=[
            f"{hover_text(row['component'])}: <b>{hover_text(row['role'])}</b><br>"
            f"{words.positive} {row['toxic_mean']:.4f} ({row['toxic_low']:.4f} to {row['toxic_high']:.4f})<br>"
            f"{words.negative} {row['safe_mean']:.4f}, q {row['q_value']:.2g}"
            for row in json_records(heads, digits=None)
        ],
    )
    for column, (quantity, bar) in enumerate((("toxic_mean", 0.435), ("difference", 1.005)), start=1):
        # One extreme head must not make all others pale.
        most = float(np.quantile(cells[quantity].abs(), 0.995)) or 1.0
        trace = heat_map(cells, quantity, "head", range(n_heads), most, "nats")
        figure.add_trace(trace.update(colorbar={"x": bar}), 1, column)
        figure.update_xaxes(axis("head", dtick=1 + (n_heads - 1) // 12, showgrid=False), col=column)
        figure.update_yaxes(axis("layer", dtick=1 + n_layers // 12, showgrid=False), col=column)
    return figure


def layers_figure(layers: pd.DataFrame, words: Words) -> go.Figure:
    """Bars of each layer's attention and MLP on positive prompts with intervals, and a dot for negative ones."""
    figure = styled_figure("Layers", 400)
    for kind, colour in (("attention", GREEN), ("mlp", PINK)):
        rows = layers[layers["kind"] == kind]
        hover = f"{kind} of layer %{{x}}: <b>%{{y:.3f}}</b> nats<extra>%{{fullData.name}}</extra>"
        figure.add_bar(
            x=rows["layer"].astype(int).tolist(),
            y=rows["toxic_mean"].tolist(),
            error_y=error_bars(rows["toxic_mean"], rows["toxic_low"], rows["toxic_high"], width=2),
            marker_color=colour,
            offsetgroup=kind,
            name=f"{kind}, {words.positive}",
            hovertemplate=hover,
        )
        figure.add_scatter(
            x=rows["layer"].astype(int).tolist(),
            y=rows["safe_mean"].tolist(),
            mode="markers",
            marker={"color": "white", "size": 7, "line": {"color": colour, "width": 2}},
            offsetgroup=kind,
            name=f"{kind}, {words.negative}",
            hovertemplate=hover,
        )
    return figure.update_layout(
        barmode="group",
        scattermode="group",
        xaxis=axis("layer", showgrid=False),
        yaxis=axis("contribution (nats)", zeroline=True, zerolinecolor=INK),
        showlegend=True,
    )


def _sentence(result: Mapping[str, Any], words: Words) -> str:
    return (
        f"What every part of the model writes into the logit difference of {result['n_toxic']} {words.positive} and "
        f"{result['n_safe']} {words.negative} test prompts: the mean logit of {_tokens(result, 'refusal')} minus the "
        f"mean logit of {_tokens(result, 'against')}."
    )


def _tokens(result: Mapping[str, Any], side: str) -> str:
    tokens = result["tokens"][side]
    return tokens_text(tokens, len(tokens))


def _tiles(result: Mapping[str, Any], words: Words) -> Tiles:
    sides = {words.positive: "toxic", words.negative: "safe"}
    means = {name: result["logit_difference"][side] for name, side in sides.items()}
    return Tiles(
        [
            *(
                Tile(
                    f"logit difference, {name}", cell(mean["mean"]), f"nats, {interval_cell(mean['low'], mean['high'])}"
                )
                for name, mean in means.items()
            ),
            Tile("AUROC", cell(result["auroc"]), f"{words.positive} against {words.negative}"),
            Tile("correlation", cell(result["score_correlation"]), f"with the {words.score}"),
            Tile("heads", cell(result["n_heads"]), ", ".join(f"{cell(len(result[role]))} {role}" for role in _MARKS)),
        ]
    )


def _findings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("AUROC of the logit difference", cell(result["auroc"])),
        ("correlation with the score", cell(result["score_correlation"])),
        ("heads", cell(result["n_heads"])),
        *((f"{role} heads", cell(len(result[role]))) for role in _MARKS),
    ]


def _guide(result: Mapping[str, Any], words: Words) -> tuple[str, ...]:
    return (
        "**Contributions.** With the final norm's scale held at its value in the run, the logit difference is the sum "
        "of what heads, MLPs, embeddings and biases write at the last position; the sum misses the model's own "
        f"difference by {cell(result['reconstruction_error'])} of the absolute terms at most. Only what is written "
        "directly counts, not what a head makes later parts write.",
        f"**Roles.** G, guardrail: the head raises the logit difference of {words.positive} prompts (its 95 % interval"
        f" is above zero), and more than that of {words.negative} ones (q < 0.05, false discovery rate over all heads)"
        ". C, compliance: the mirror image. This says that an effect is there, not that it is large.",
        f"**The logit difference** stands in for the {words.score}, a log-odds, which is not a sum of parts. It is a "
        "fair stand-in as far as the two correlate.",
    )


def _methods(words: Words) -> tuple[Formula, ...]:
    return (
        Formula(
            "Direct logit attribution (Elhage et al. 2021)",
            "contribution = (output / norm scale, held) . (mean W_U of the score's tokens - mean W_U of tokens"
            " against); all contributions sum to the logit difference",
        ),
        Formula(
            "Guardrail head",
            f"contribution to {words.positive} prompts above 0 (95 %) and larger than to {words.negative} ones (Welch's"
            " t, q < 0.05); compliance head: the mirror image",
        ),
    )

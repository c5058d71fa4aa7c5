"""What a circuit proves, in pictures: whether it decides, beside nulls, and how faithful its best n nodes are."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.circuits.options import LARGE_PROMPT_FREE
from sfc.pages.blocks import Block, Figure, Paragraph, Section, Table, cell, figure_cell, records_of
from sfc.pages.style import AMBER, BLUE, GREEN, INK, QUIET, VERMILION, axis, remark, styled_figure
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
    rows = [(cell(int(row["size"])), *(figure_cell(row, name) for name in shown)) for row in records_of(curve)]
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
            y=_gapped(curve[name].to_numpy()),
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


# Not the colours of the signs, which mean something else on the same page.
_GREEN, _PURPLE, _GREY = "#00795a", "#a2418f", "#7a828c"
_HEIGHT = 430
_VISIBLE = (-0.5, 1.5)
_LABELLED_DECADES = 3.2
_TEST = ("faithfulness", "completeness_normalised", "completeness")
_BANDS = ("faithfulness_low", "faithfulness_high", "random_low", "random_high")
_OTHERS = ("size", "on_discovery", "random_faithfulness", *_BANDS)

Numbers = dict[str, np.ndarray]


def curve_figure(curve: pd.DataFrame, reported_size: int) -> go.Figure:
    """Faithfulness, with its 95 % interval, and completeness against the circuit's size; beside them random circuits.

    Ratios outside -0.5 to 1.5 are out of sight at first; a double click shows them. Figures that are not measurable are
    gaps.

    Args:
        curve: columns `size, faithfulness, completeness, completeness_normalised, random_faithfulness, random_low,
            random_high, faithfulness_low, faithfulness_high` of the test split, and `on_discovery`, by which sizes are
            chosen.
        reported_size: the size of the circuit that is reported; its place is marked.
    """
    numbers = _numbers(curve)
    figure = styled_figure("Faithfulness and completeness by circuit size", _HEIGHT)
    figure.add_traces(list(_random(numbers)))
    figure.add_traces(list(_band(numbers, "faithfulness_low", "faithfulness_high", "rgba(0,121,90,0.16)")))
    figure.add_traces(list(_lines(numbers)))
    _mark(figure, numbers, reported_size)
    figure.add_trace(_shown(numbers, reported_size))
    _set_axes(figure, numbers["size"])
    if all(np.isnan(numbers[column]).all() for column in _TEST):
        remark(figure, "Not measurable: F(M) − F(0) is too small to divide by.")
    return figure


def _numbers(curve: pd.DataFrame) -> Numbers:
    """The columns as floats in the order of the sizes; what is not measurable is NaN."""
    missing = pd.Series(np.nan, index=curve.index)
    columns = {name: np.array(pd.to_numeric(curve.get(name, missing)), dtype=float) for name in _TEST + _OTHERS}
    order = np.argsort(columns["size"], kind="stable")
    # A circuit without nodes has no place on a logarithmic axis.
    order = order[columns["size"][order] >= 1]
    return {name: np.where(np.isfinite(values), values, np.nan)[order] for name, values in columns.items()}


def _lines(numbers: Numbers) -> Iterator[go.Scatter]:
    styles = [
        ("completeness", "completeness, as published", {"color": _PURPLE, "width": 1.5, "dash": "dot"}, ""),
        ("completeness_normalised", "completeness, normalised", {"color": _PURPLE, "width": 2.5}, "square"),
        (
            "on_discovery",
            "by what the size was chosen, discovery split",
            {"color": _GREEN, "width": 1.5, "dash": "dash"},
            "",
        ),
        ("faithfulness", "faithfulness", {"color": _GREEN, "width": 2.5}, "circle"),
    ]
    for column, name, line, symbol in styles:
        yield go.Scatter(
            x=numbers["size"].tolist(),
            y=_gapped(numbers[column]),
            # Small markers between the dashes: a value between two gaps would not show otherwise.
            mode="lines+markers",
            line=line,
            marker={"size": 7 if symbol else 3, "symbol": symbol or "circle"},
            name=name,
            hovertemplate=f"{name}: <b>%{{y:.3f}}</b><br>%{{x:,}} nodes<extra></extra>",
        )


def _band(numbers: Numbers, low: str, high: str, colour: str) -> Iterator[go.Scatter]:
    """A polygon between two columns for each unbroken run of sizes."""
    sizes, lower, upper = numbers["size"], numbers[low], numbers[high]
    measured = np.flatnonzero(~np.isnan(lower + upper))
    runs = np.split(measured, np.flatnonzero(np.diff(measured) > 1) + 1)
    for run in filter(len, runs):
        yield go.Scatter(
            x=[*sizes[run].tolist(), *sizes[run][::-1].tolist()],
            y=[*upper[run].tolist(), *lower[run][::-1].tolist()],
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=colour,
            hoverinfo="skip",
            showlegend=False,
        )


def _random(numbers: Numbers) -> Iterator[go.Scatter]:
    """The means of random circuits, and their intervals."""
    low, high = numbers["random_low"], numbers["random_high"]
    yield from _band(numbers, "random_low", "random_high", "rgba(122,130,140,0.22)")
    yield go.Scatter(
        x=numbers["size"].tolist(),
        y=_gapped(numbers["random_faithfulness"]),
        customdata=[
            "" if math.isnan(least + most) else f"{least:.3f} to {most:.3f}".replace("-", "−")
            for least, most in zip(low, high, strict=True)
        ],
        mode="lines+markers",
        line={"color": _GREY, "width": 1.5},
        marker={"size": 4},
        name="faithfulness of random circuits",
        hovertemplate="random circuits of that size: <b>%{y:.3f}</b><br>%{customdata}<br>%{x:,} nodes<extra></extra>",
    )


def _mark(figure: go.Figure, numbers: Numbers, reported_size: int) -> None:
    """Lines at 0 and 1, and the reported circuit."""
    for y in (0, 1):
        figure.add_hline(y, line={"color": QUIET, "width": 1}, layer="below")
    if reported_size < 1:
        return
    figure.add_vline(reported_size, line={"color": INK, "width": 1, "dash": "dot"}, layer="below")
    sizes = numbers["size"]
    is_left = len(sizes) > 0 and reported_size**2 <= sizes.min() * sizes.max()
    figure.add_annotation(
        # Annotations, unlike shapes, count in decades on a logarithmic axis.
        x=math.log10(reported_size),
        y=1,
        yref="paper",
        text=f"reported: {reported_size:,}",
        showarrow=False,
        xanchor="left" if is_left else "right",
        yanchor="top",
        font={"size": 12, "color": INK},
        bgcolor="rgba(255,255,255,0.8)",
    )
    reported = numbers["faithfulness"][sizes == reported_size]
    reported = reported[~np.isnan(reported)]
    figure.add_trace(
        go.Scatter(
            x=[reported_size] * len(reported),
            y=reported.tolist(),
            mode="markers",
            marker={"size": 16, "symbol": "circle-open", "color": INK, "line": {"width": 2}},
            hoverinfo="skip",
            showlegend=False,
        )
    )


def _shown(numbers: Numbers, size: int) -> go.Scatter:
    """The size that the graph shows: `circuit.js` moves it with the slider."""
    faithfulness = numbers["faithfulness"][numbers["size"] == size]
    middle = [None if math.isnan(value) else value for value in faithfulness[:1].tolist()] or [None]
    return go.Scatter(
        x=[size] * 3 if size >= 1 else [None] * 3,
        y=[_VISIBLE[0], *middle, _VISIBLE[1]],
        mode="lines+markers",
        line={"color": INK, "width": 2},
        marker={"size": [0, 13, 0], "color": INK, "opacity": 1},
        connectgaps=True,
        hoverinfo="skip",
        showlegend=False,
        meta={"part": "shown"},
    )


def _set_axes(figure: go.Figure, sizes: np.ndarray) -> None:
    smallest, largest = (sizes.min(), sizes.max()) if len(sizes) else (1, 10)
    decades = math.log10(smallest), math.log10(largest)
    steps = (1, 2, 5) if decades[1] - decades[0] <= _LABELLED_DECADES else (1,)
    ticks = [step * 10**power for power in range(math.floor(decades[0]), math.ceil(decades[1]) + 1) for step in steps]
    pad = max(0.08, 0.03 * (decades[1] - decades[0]))
    figure.update_layout(
        margin={"t": 96},
        legend={"traceorder": "reversed", "itemwidth": 44, "itemsizing": "trace"},
        xaxis=axis(
            "nodes in the circuit",
            type="log",
            range=[decades[0] - pad, decades[1] + pad],
            tickvals=ticks,
            ticktext=[f"{tick:,}" for tick in ticks],
        ),
        yaxis=axis("ratio", range=list(_VISIBLE), tickformat=".1f"),
    )


def _gapped(values: np.ndarray) -> Sequence[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]

"""The curve of a circuit: how faithful and how complete its best n nodes are, for many n."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sfc.pages.style import INK, QUIET, axis, remark, styled_figure

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
    """Faithfulness, with its 95 % interval, and completeness against the circuit's size; random circuits as a band.

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
    """The range of the random circuits, and the line of their means."""
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

"""The figures of a run's dictionaries by site: reconstruction for each role, and what splicing them in costs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.viewer.columns import Columns, columns_of_sites
from sfc.viewer.style import BLUE, INK, PINK, QUIET, ROLE_COLOURS, VERMILION, axis, styled_figure
from sfc.viewer.text import hover_text

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_ALL = "all"
_MOST_LABELS = 12


class _Panel(NamedTuple):
    column: str
    title: str
    unit: str
    digits: str


class _Line(NamedTuple):
    column: str
    name: str
    colour: str
    symbol: str
    dash: str


_FIGURES = (
    _Panel("fvu", "Variance unexplained", "share of variance", ".3f"),
    _Panel("cosine", "Cosine of x and its reconstruction", "cosine", ".3f"),
    _Panel("l0", "Active features (L0)", "features per row", ",.1f"),
    _Panel("dead_share", "Dead features", "share of features", ".1%"),
    _Panel("dense_share", "Dense features", "share of features", ".2%"),
)
_RUNS = (
    _Line("{}", "as it is", INK, "circle", "dash"),
    _Line("{}_spliced", "SAE spliced in", BLUE, "circle", "solid"),
    _Line("{}_mean_ablated", "mean-ablated", VERMILION, "square", "solid"),
    _Line("{}_zero_ablated", "zero-ablated", PINK, "diamond", "solid"),
)
_RECOVERED = (
    _Line("{}_recovered", "recovered of mean-ablation", VERMILION, "square", "dot"),
    _Line("{}_recovered_zero", "recovered of zero-ablation", PINK, "diamond", "dot"),
)


def reconstruction_figure(quality: pd.DataFrame) -> go.Figure:
    """Small multiples: one figure per panel, sites from left to right, a line for each role.

    Args:
        quality: `quality.csv` as `write_quality_page` takes it.
    """
    figure = styled_figure("Reconstruction of held-out rows, by site and role of the token", 560)
    make_subplots(
        rows=2, cols=3, figure=figure, subplot_titles=_headings([panel.title for panel in _FIGURES]),
        horizontal_spacing=0.07, vertical_spacing=0.2,
    )  # fmt: skip
    columns = columns_of_sites(_sites(quality))
    for number, panel in enumerate(_FIGURES):
        row, column = divmod(number, 3)
        for rank, role in enumerate(quality["role"].unique()):
            values = _by_site(quality[quality["role"] == role], panel.column, columns)
            line = _Line(
                panel.column, role, ROLE_COLOURS[rank % len(_SYMBOLS)], _SYMBOLS[rank % len(_SYMBOLS)], "solid"
            )
            hover = f"{role}: <b>%{{y:{panel.digits}}}</b> {panel.unit}"
            figure.add_trace(_line(line, values, columns, hover, number == 0), row + 1, column + 1)
        # Cosines lie close together, far from 0.
        ticks = {"rangemode": "normal" if panel.column == "cosine" else "tozero"}
        if panel.digits.endswith("%"):
            ticks["tickformat"] = ".0%"
        figure.update_yaxes(axis(panel.unit, **ticks), row=row + 1, col=column + 1)
        figure.update_xaxes(_site_axis(columns), row=row + 1, col=column + 1)
    # The sixth place is the legend's.
    figure.update_layout(legend={"orientation": "v", "x": 0.72, "y": 0.34, "yanchor": "top", "title": "rows"})
    return figure


def splicing_figure(quality: pd.DataFrame) -> go.Figure:
    """Cross-entropy and refusal score of the model with each site replaced, above the shares that are recovered."""
    quality = quality[quality["role"] == _ALL]
    columns = columns_of_sites(_sites(quality))
    figure = styled_figure("The model with one site replaced, on held-out prompts", 640)
    headings = (
        "Cross-entropy of the next token", "Refusal score after the prompt",
        "Loss recovered by the SAE", "Refusal score recovered by the SAE",
    )  # fmt: skip
    make_subplots(
        rows=2,
        cols=2,
        figure=figure,
        subplot_titles=_headings(headings),
        horizontal_spacing=0.08,
        vertical_spacing=0.18,
    )
    for column, (level, recovered) in enumerate((("cross_entropy", "loss"), ("score", "score")), start=1):
        for row, lines, prefix, unit in ((1, _RUNS, level, "nats"), (2, _RECOVERED, recovered, "share recovered")):
            for line in lines:
                values = _by_site(quality, line.column.format(prefix), columns)
                hover = f"{line.name}: <b>%{{y:.3f}}</b>{' nats' if row == 1 else ''}"
                figure.add_trace(_line(line, values, columns, hover, column == 1), row, column)
            figure.update_yaxes(axis(unit), row=row, col=column)
            figure.update_xaxes(_site_axis(columns), row=row, col=column)
        figure.add_hline(1, line={"color": QUIET, "width": 1}, row=2, col=column)  # pyright: ignore[reportArgumentType]
    figure.update_layout(margin={"t": 118}, legend={"y": 1.06})
    return figure


def _headings(titles: Sequence[str]) -> list[str]:
    return [f"<span style='font-size:13px'><b>{title}</b></span>" for title in titles]


def _sites(quality: pd.DataFrame) -> list[str]:
    return list(quality["site"].unique())


def _by_site(quality: pd.DataFrame, column: str, columns: Columns) -> list[float | None]:
    """A value for each site; None, a gap in the line, where there is none or it is not measurable."""
    values = dict(zip(quality["site"], quality[column], strict=True))
    return [float(values[site]) if np.isfinite(values.get(site, np.nan)) else None for site in columns.sites]


def _line(line: _Line, values: list[float | None], columns: Columns, hover: str, in_legend: bool) -> go.Scatter:
    return go.Scatter(
        x=list(range(len(values))),
        y=values,
        mode="lines+markers",
        line={"color": line.colour, "width": 2, "dash": line.dash},
        marker={"color": line.colour, "size": 7, "symbol": line.symbol},
        name=line.name,
        legendgroup=line.name,
        showlegend=in_legend,
        customdata=[hover_text(site) for site in columns.sites],
        hovertemplate=f"{hover}<br>%{{customdata}}<extra></extra>",
    )


def _site_axis(columns: Columns) -> dict:
    places = list(range(len(columns.sites)))
    step = -(-len(places) // _MOST_LABELS) or 1
    return axis(columns.title, tickvals=places[::step], ticktext=columns.labels[::step], tickangle=0, showgrid=False)

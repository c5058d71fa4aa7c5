"""The page of a comparison of prompt formats: violins of the scores, standardised and as they are."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.evaluation.repeated_measures import Friedman
from sfc.viewer.style import INK, axis, styled_figure
from sfc.viewer.text import hover_text, number_text

_COLOURS = {"toxic": "#d55e00", "safe": "#0072b2"}
_NAMES = {"toxic": "harmful", "safe": "harmless"}
_HEIGHT = 1000


def formats_figure(scores: pd.DataFrame, test: Friedman, pairs: pd.DataFrame, preset: str) -> go.Figure:
    """Violins per format, harmful beside harmless instructions, and a table of the tests between formats.

    Args:
        scores: a row per instruction and format: `label` (`toxic` or `safe`), `format`, `logit_difference`, `z`.
        pairs: as `pairwise_wilcoxon` gives it.
    """
    figure = make_subplots(
        rows=3,
        cols=1,
        specs=[[{}], [{}], [{"type": "table"}]],
        subplot_titles=("Standardised within each format", "Logit differences", ""),
        row_heights=[0.42, 0.38, 0.2],
        vertical_spacing=0.09,
        figure=styled_figure(
            f"Prompt formats · {hover_text(preset)}<br><sup>harmful instructions, standardised: "
            f"Friedman χ²({test.degrees}) = {number_text(test.chi2)}, p = {number_text(test.p_value)}, "
            f"Kendall's W = {number_text(test.kendall_w)}</sup>",
            _HEIGHT,
        ),
    )
    for row, (column, title) in enumerate((("z", "z"), ("logit_difference", "refuse − comply (nats)")), start=1):
        for label, of_label in scores.groupby("label", sort=False):
            figure.add_trace(_violins(of_label, column, str(label), shown=row == 1), row, 1)
        figure.update_xaxes(axis("", showgrid=False), row=row, col=1)
        figure.update_yaxes(axis(title, zeroline=True, zerolinecolor=INK), row=row, col=1)
    figure.add_trace(_table(pairs), 3, 1)
    return figure.update_layout(violinmode="group", margin={"t": 120}, showlegend=True)


def _violins(scores: pd.DataFrame, column: str, label: str, shown: bool) -> go.Violin:
    return go.Violin(
        x=[hover_text(name) for name in scores["format"]],
        y=scores[column].tolist(),
        name=_NAMES[label],
        legendgroup=label,
        showlegend=shown,
        line={"color": _COLOURS[label], "width": 1},
        box={"visible": True},
        meanline={"visible": True},
        points="all",
        pointpos=0,
        jitter=0.3,
        marker={"size": 2, "opacity": 0.5},
        spanmode="hard",
        scalemode="width",
        offsetgroup=label,
        hoveron="violins+points",
    )


def _table(pairs: pd.DataFrame) -> go.Table:
    numbers = {
        "mean difference of z": "mean_difference",
        "p": "p_value",
        "p, Holm": "p_holm",
        "rank-biserial r": "rank_biserial",
    }
    columns = {
        "first": [hover_text(name) for name in pairs["first"]],
        "second": [hover_text(name) for name in pairs["second"]],
        "n": pairs["n"].tolist(),
        **{title: [number_text(value) for value in pairs[column]] for title, column in numbers.items()},
    }
    return go.Table(
        header={"values": list(columns), "align": "left", "fill_color": "#eef1f4"},
        cells={"values": list(columns.values()), "align": "left", "height": 24, "fill_color": "white"},
    )

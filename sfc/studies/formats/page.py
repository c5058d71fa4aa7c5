"""The page of a comparison of prompt formats: the scores, standardised and as they are, and the tests."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sfc.pages.blocks import Figure, Formula, Page, Section, Tile, Tiles, cell, estimate_cell, records_table
from sfc.pages.style import BLUE, INK, VERMILION, axis, styled_figure
from sfc.pages.text import hover_text
from sfc.studies.study import Finished

_SIDES = {"toxic": ("harmful", VERMILION), "safe": ("harmless", BLUE)}


def page(finished: Finished) -> Page:
    """The page of a finished comparison."""
    result, scores = finished.result, finished.table("scores.csv")
    test = result["friedman"]
    rows = [
        {
            **row,
            "mean": estimate_cell(row["mean"], row["low"], row["high"]),
            "order_effect": "" if row["order_effect"] is None else cell(row["order_effect"]),
        }
        for row in result["formats"]
    ]
    return Page(
        title=f"Prompt formats · {result['prompts']} · {result['preset']}",
        sentence=_sentence(result),
        summary=[
            Tiles(
                [
                    Tile("Friedman's p", cell(test["p_value"]), f"χ²({test['degrees']}) = {cell(test['chi2'])}"),
                    Tile("Kendall's W", cell(test["kendall_w"]), "1: all instructions order the formats alike"),
                ]
            ),
            records_table("Harmful instructions by format, in nats (95 %)", _FORMATS, rows),
            records_table("Pairs of formats, standardised (Wilcoxon)", _PAIRS, result["pairs"], texts=("second",)),
        ],
        sections=[
            Section("", [Figure("z", lambda: violins(scores, "z", "Standardised within each format", "z"))]),
            Section("", [Figure("raw", lambda: violins(scores, "logit_difference", "Logit differences", "nats"))]),
        ],
        guide=_GUIDE,
        findings=[("Friedman's p", cell(test["p_value"])), ("Kendall's W", cell(test["kendall_w"]))],
        methods=_METHODS,
    )


def violins(scores: pd.DataFrame, column: str, title: str, unit: str) -> go.Figure:
    """A violin per format and side, equally wide, with quartiles, mean and every instruction."""
    figure = styled_figure(title, 440)
    for label, (name, colour) in _SIDES.items():
        of_label = scores[scores["label"] == label]
        figure.add_violin(
            x=[hover_text(name) for name in of_label["format"]],
            y=of_label[column].tolist(),
            name=name,
            line={"color": colour, "width": 1},
            box={"visible": True},
            meanline={"visible": True},
            points="all",
            pointpos=0,
            jitter=0.3,
            marker={"size": 2, "opacity": 0.5},
            spanmode="hard",
            scalemode="width",
        )
    return figure.update_layout(
        violinmode="group",
        xaxis=axis("", showgrid=False),
        yaxis=axis(unit, zeroline=True, zerolinecolor=INK),
        showlegend=True,
    )


def _sentence(result: Mapping[str, Any]) -> str:
    return (
        f"{result['n_harmful']} harmful and {result['n_harmless']} harmless instructions, each in"
        f" {len(result['formats'])} formats: does the format change how strongly the model refuses?"
    )


_FORMATS = {
    "format": "format", "refuse − comply": "mean", "harmless": "harmless_mean", "share refused": "refused",
    "AUROC": "auroc", "mean z": "z_mean", "order effect": "order_effect",
}  # fmt: skip
_PAIRS = {
    "first": "first", "second": "second", "z: first − second": "mean_difference", "p": "p_value", "p, Holm": "p_holm",
    "r": "rank_biserial",
}  # fmt: skip
_GUIDE = (
    "**Scores.** The logit of the answer that refuses minus that of the answer that complies, where the model gives "
    "its answer. Of a format with two versions the mean is taken, so that a liking for a letter cancels out; the order "
    "effect is how far the first version lies above that mean.",
    "**Why standardised.** Raw differences say as much about two answer tokens as about the instruction, so they are "
    "not comparable between formats. z is the score minus the format's mean over all instructions asked, harmful and "
    "harmless, in units of their standard deviation.",
    "**Tests** compare the z of the harmful instructions. Friedman's asks whether any format differs; Kendall's W is 1 "
    "where all instructions order the formats alike, 0 where they do not agree at all. Wilcoxon's signed-rank tests "
    "compare pairs of formats, with Holm's correction; r, the matched-pairs rank-biserial correlation, runs from −1 to "
    "1.",
)
_METHODS = (
    Formula(
        "z",
        "(logit difference - mean of its format) / standard deviation of its format, over harmful and harmless"
        " instructions",
    ),
    Formula("Tests", "Friedman 1937 over formats; Wilcoxon signed-rank between pairs of formats, Holm 1979"),
)

"""The page of a comparison of prompt formats: violins of the scores, standardised and as they are, and the tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import INK, axis, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import hover_text, number_text, printable

_SIDES = {"toxic": ("harmful", "#d55e00"), "safe": ("harmless", "#0072b2")}
_GUIDE = (
    "<b>Scores.</b> The logit of the answer that refuses minus that of the answer that complies, where the model gives "
    "its answer. Of a format with two versions the mean is taken, so that a liking for a letter cancels out.",
    "<b>Why standardised.</b> Raw differences say as much about two answer tokens as about the instruction, so they "
    "are not comparable between formats. z is the score minus the format's mean over all instructions asked, harmful "
    "and harmless, in units of their standard deviation.",
    "<b>Tests</b> compare the z of the harmful instructions. Friedman's asks whether any format differs; Kendall's W "
    "is 1 where all instructions order the formats alike, 0 where they do not agree at all. Wilcoxon's signed-rank "
    "tests compare pairs of formats, with Holm's correction; r, the matched-pairs rank-biserial correlation, runs from "
    "−1 to 1.",
)


def write_formats_page(path: Path, scores: pd.DataFrame, result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        scores: a row per instruction and format: `label` (`toxic` or `safe`), `format`, `logit_difference`, `z`.
        result: what `formats --json` prints.
    """
    title = f"Prompt formats · {result['prompts']} · {result['preset']}"
    standardised = violins(scores, "z", "Standardised within each format", "z")
    raw = violins(scores, "logit_difference", "Logit differences", "nats")
    body = f"""{header_html(title, _sentence(result))}
<section class="card graph">{figure_html("z", standardised)}</section>
<section class="card graph">{figure_html("raw", raw)}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>
<section class="card scroll"><h2>Formats: harmful instructions, in nats</h2>{_formats_table(result)}</section>
<section class="card scroll"><h2>Pairs of formats</h2>{_pairs_table(result)}</section>"""
    write_document(path, title, body)


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
    test = result["friedman"]
    return (
        f"{result['n_harmful']} harmful and {result['n_harmless']} harmless instructions, each in "
        f"{len(result['formats'])} formats. Harmful ones, standardised within format: Friedman's "
        f"χ²({test['degrees']}) = {number_text(test['chi2'])}, p = {number_text(test['p_value'])}, "
        f"Kendall's W = {number_text(test['kendall_w'])}."
    )


def _formats_table(result: Mapping[str, Any]) -> str:
    columns = {
        "refuse − comply": "mean",
        "low": "low",
        "high": "high",
        "harmless": "harmless_mean",
        "share refused": "refused",
        "AUROC": "auroc",
        "mean z": "z_mean",
        "order effect": "order_effect",
    }
    rows = [(printable(row["format"]), *(_text(row[key]) for key in columns.values())) for row in result["formats"]]
    return figures_table(("format", *columns), rows)


def _pairs_table(result: Mapping[str, Any]) -> str:
    columns = {"z: first − second": "mean_difference", "p": "p_value", "p, Holm": "p_holm", "r": "rank_biserial"}
    rows = [
        (printable(f"{row['first']} − {row['second']}"), *(number_text(row[key]) for key in columns.values()))
        for row in result["pairs"]
    ]
    return figures_table(("pair", *columns), rows)


def _text(value: float | None) -> str:
    return "" if value is None else number_text(value)

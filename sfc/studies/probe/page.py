"""The page of the refusal direction and the probe: layers against separation, accuracy and the shuffled control."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import BLUE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import number_text

_HEIGHT = 420
_BAND = "rgba(122,130,140,0.22)"


def write_probe_page(path: Path, layers: pd.DataFrame, result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        layers: as `probe_table` gives it.
        result: what `probe --json` prints.
    """
    title = f"Refusal direction and probe · {result['category']} · {result['preset']}"
    body = f"""{header_html(title, _sentence(result))}
<section class="card">{figure_html("separation", separation_figure(layers))}</section>
<section class="card">{figure_html("accuracy", accuracy_figure(layers))}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_guide(result))}</section>
<section class="card scroll"><h2>Every layer</h2>{_table(layers)}</section>"""
    write_document(path, title, body)


def separation_figure(layers: pd.DataFrame) -> go.Figure:
    """Separation along the refusal direction on test prompts, layer by layer, with its interval."""
    figure = styled_figure("Separation along the refusal direction, test prompts", _HEIGHT)
    known = layers.dropna(subset=["separation"])
    figure.add_scatter(
        x=known["layer"].tolist(),
        y=known["separation"].tolist(),
        error_y=_error_bars(known, "separation"),
        mode="lines+markers",
        line={"color": VERMILION},
        customdata=known[["separation_low", "separation_high", "auroc"]].to_numpy().tolist(),
        hovertemplate="layer %{x}: <b>%{y:.2f}</b> (%{customdata[0]:.2f} to %{customdata[1]:.2f})<br>"
        "AUROC %{customdata[2]:.3f}<extra></extra>",
    )
    return figure.update_layout(
        xaxis=axis("layer", tickformat="d", showgrid=False),
        yaxis=axis("pooled standard deviations", zeroline=True, rangemode="tozero"),
    )


def accuracy_figure(layers: pd.DataFrame) -> go.Figure:
    """Accuracy of the probe on held-out prompts, layer by layer, above that of probes with shuffled labels."""
    figure = styled_figure("Linear probe, held-out prompts", _HEIGHT)
    places = layers["layer"].tolist()
    figure.add_scatter(
        x=[*places, *places[::-1]],
        y=[*layers["control_high"].tolist(), *layers["control"].tolist()[::-1]],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=_BAND,
        name="shuffled labels, up to the 95th percentile",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=places,
        y=layers["control"].tolist(),
        mode="lines+markers",
        line={"color": QUIET, "dash": "dot"},
        marker={"size": 4},
        name="shuffled labels, mean",
        hovertemplate="layer %{x}, shuffled: <b>%{y:.1%}</b><extra></extra>",
    )
    figure.add_scatter(
        x=places,
        y=layers["accuracy"].tolist(),
        error_y=_error_bars(layers, "accuracy"),
        mode="lines+markers",
        line={"color": BLUE},
        name="probe",
        customdata=layers[["accuracy_low", "accuracy_high", "p_value"]].to_numpy().tolist(),
        hovertemplate="layer %{x}: <b>%{y:.1%}</b> (%{customdata[0]:.1%} to %{customdata[1]:.1%})<br>"
        "p %{customdata[2]:.2g}<extra></extra>",
    )
    return figure.update_layout(
        showlegend=True,
        xaxis=axis("layer", tickformat="d", showgrid=False),
        yaxis=axis("accuracy", tickformat=".0%", range=[min(0.4, float(layers["accuracy_low"].min())), 1.02]),
    )


def _error_bars(layers: pd.DataFrame, name: str) -> dict[str, Any]:
    above, below = layers[f"{name}_high"] - layers[name], layers[name] - layers[f"{name}_low"]
    return {"type": "data", "array": above.tolist(), "arrayminus": below.tolist(), "thickness": 1, "width": 0}


def _sentence(result: Mapping[str, Any]) -> str:
    return (
        f"At which layers can {result['n_prompts']} toxic and safe prompts be told apart, from the residual stream at "
        f"the last position? The direction comes from {result['n_discovery']} discovery prompts and is held against "
        f"{result['n_test']} test prompts; the probe is judged by {result['n_folds']}-fold cross-validation over all."
    )


def _guide(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "<b>Direction.</b> The difference of the means over toxic and over safe discovery prompts. Separation = "
        "(mean of toxic − mean of safe projections on it) / pooled standard deviation, on test prompts. AUROC is the "
        "chance that a toxic prompt lies further along it than a safe one.",
        "<b>Probe.</b> Ridge regression on the standardised residual stream, fitted to all folds but one and judged on "
        "that one: no prompt is judged by a probe that was fitted to it.",
        f"<b>Control.</b> The same with labels shuffled within folds, {result['n_shuffles']} times. What lies within "
        "the grey band, the procedure would find where there is nothing; p is the share of shuffles that do as well.",
        "<b>What it does not say.</b> That a layer can be read does not mean that the model reads it. Labels are the "
        "data set's (toxic or safe), not what the model did. Activation patching asks what is used.",
    )


def _table(layers: pd.DataFrame) -> str:
    titles = ("layer", "norm", "of mean norm", "separation", "95 %", "AUROC", "probe", "95 %", "shuffled", "95th", "p")
    rows = [
        (
            str(row["layer"]),
            number_text(row["norm"]),
            number_text(row["relative_norm"]),
            number_text(row["separation"]),
            f"{number_text(row['separation_low'])} to {number_text(row['separation_high'])}",
            number_text(row["auroc"]),
            number_text(row["accuracy"]),
            f"{number_text(row['accuracy_low'])} to {number_text(row['accuracy_high'])}",
            number_text(row["control"]),
            number_text(row["control_high"]),
            number_text(row["p_value"]),
        )
        for row in layers.to_dict("records")
    ]
    return figures_table(titles, rows)

"""The page of a direct logit attribution: heads, layers, and the components that tell toxic from safe prompts best."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import INK, axis, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import number_text, printable, tokens_text
from sfc.studies.logits.roles import COMPLIANCE, GUARDRAIL

_RAISES, _LOWERS = "#d55e00", "#0072b2"
_SCALE = [[0, _LOWERS], [0.5, "#ffffff"], [1, _RAISES]]
_MARKS = {GUARDRAIL: "G", COMPLIANCE: "C"}
_LISTED = 30


def write_logits_page(path: Path, components: pd.DataFrame, layers: pd.DataFrame, result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        components: as `component_table` gives it.
        layers: the same of the attribution joined `by_layer`.
        result: what `attribute-logits --json` prints.
    """
    title = f"Direct logit attribution · {result['category']} · {result['preset']}"
    body = f"""{header_html(title, _sentence(result))}
<section class="card graph">{figure_html("heads", heads_figure(components))}</section>
<section class="card graph">{figure_html("layers", layers_figure(layers))}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_guide(result))}</section>
<section class="card scroll"><h2>The components that differ most between toxic and safe prompts</h2>
{_table(components)}</section>"""
    write_document(path, title, body)


def heads_figure(components: pd.DataFrame) -> go.Figure:
    """Two heat maps of the heads, layers upwards: contributions to toxic prompts, and toxic - safe."""
    heads = components[components["kind"] == "head"]
    layers = int(heads["layer"].max()) + 1
    figure = make_subplots(
        cols=2,
        subplot_titles=("toxic prompts", "toxic − safe"),
        horizontal_spacing=0.14,
        figure=styled_figure("Heads", max(360, 150 + 16 * layers)),
    )
    for column, (quantity, bar) in enumerate((("toxic_mean", 0.435), ("difference", 1.005)), start=1):
        figure.add_trace(_heat_map(heads, quantity, bar), 1, column)
        figure.update_xaxes(axis("head", dtick=1 + int(heads["head"].max()) // 12, showgrid=False), col=column)
        figure.update_yaxes(axis("layer", dtick=1 + layers // 12, showgrid=False), col=column)
    return figure


def _heat_map(heads: pd.DataFrame, quantity: str, bar: float) -> go.Heatmap:
    """The colour's zero is white, and one extreme head may not fade the others."""

    def grid(column: str) -> pd.DataFrame:
        return heads.pivot(index="layer", columns="head", values=column)

    values = grid(quantity).to_numpy(dtype=float)
    facts = ("toxic_mean", "toxic_low", "toxic_high", "safe_mean", "q_value", "role")
    most = float(np.quantile(np.abs(values), 0.995)) or 1.0
    return go.Heatmap(
        z=values.tolist(),
        x=grid(quantity).columns.tolist(),
        y=grid(quantity).index.tolist(),
        text=[[_MARKS.get(role, "") for role in row] for row in grid("role").to_numpy()],
        texttemplate="%{text}",
        textfont={"size": 9},
        customdata=np.stack([grid(fact).to_numpy(dtype=object) for fact in facts], -1).tolist(),
        zmin=-most,
        zmax=most,
        colorscale=_SCALE,
        colorbar={"title": "nats", "x": bar, "thickness": 12},
        hovertemplate="head %{y}.%{x}: <b>%{customdata[5]}</b><br>toxic %{customdata[0]:.4f} "
        "(%{customdata[1]:.4f} to %{customdata[2]:.4f})<br>safe %{customdata[3]:.4f}, q %{customdata[4]:.2g}"
        "<extra></extra>",
    )


def layers_figure(layers: pd.DataFrame) -> go.Figure:
    """Bars of each layer's attention and MLP on toxic prompts with their intervals, and a dot for safe ones."""
    figure = styled_figure("Layers", 400)
    for kind, colour in (("attention", "#009e73"), ("mlp", "#cc79a7")):
        rows = layers[layers["kind"] == kind]
        hover = f"{kind} of layer %{{x}}: <b>%{{y:.3f}}</b> nats<extra>%{{fullData.name}}</extra>"
        figure.add_bar(
            x=rows["layer"].astype(int).tolist(),
            y=rows["toxic_mean"].tolist(),
            error_y={
                "type": "data",
                "array": (rows["toxic_high"] - rows["toxic_mean"]).tolist(),
                "arrayminus": (rows["toxic_mean"] - rows["toxic_low"]).tolist(),
                "thickness": 1,
                "width": 2,
            },
            marker_color=colour,
            offsetgroup=kind,
            name=f"{kind}, toxic",
            hovertemplate=hover,
        )
        figure.add_scatter(
            x=rows["layer"].astype(int).tolist(),
            y=rows["safe_mean"].tolist(),
            mode="markers",
            marker={"color": "white", "size": 7, "line": {"color": colour, "width": 2}},
            offsetgroup=kind,
            name=f"{kind}, safe",
            hovertemplate=hover,
        )
    return figure.update_layout(
        barmode="group",
        scattermode="group",
        xaxis=axis("layer", showgrid=False),
        yaxis=axis("contribution (nats)", zeroline=True, zerolinecolor=INK),
        showlegend=True,
    )


def _sentence(result: Mapping[str, Any]) -> str:
    difference = result["logit_difference"]
    means = " and ".join(f"{number_text(difference[side]['mean'])} on {side}" for side in ("toxic", "safe"))
    return (
        f"What every part of the model writes into the refusal logit difference of {result['n_toxic']} toxic and "
        f"{result['n_safe']} safe test prompts: the mean logit of {_tokens(result, 'refusal')} minus the mean logit of "
        f"{_tokens(result, 'against')}, which is {means} prompts."
    )


def _tokens(result: Mapping[str, Any], side: str) -> str:
    tokens = result["tokens"][side]
    return tokens_text(tokens, len(tokens))


def _guide(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "<b>Contributions.</b> With the final norm's scale held at its value in the run, the logit difference is the "
        "sum of what heads, MLPs, embeddings and biases write at the last position; the sum misses the model's own "
        f"difference by {number_text(result['reconstruction_error'])} of the absolute terms at most. Only what is "
        "written directly counts, not what a head makes later parts write.",
        "<b>Roles.</b> G, guardrail: the head pushes toxic prompts towards refusal (95 % interval above zero), and "
        "more so than safe ones (q &lt; 0.05, false discovery rate over all heads). C, compliance: the mirror image. "
        f"This says that an effect is there, not that it is large: {len(result[GUARDRAIL])} heads are guardrail and "
        f"{len(result[COMPLIANCE])} compliance heads of {result['n_heads']}.",
        "<b>The logit difference</b> stands in for the refusal score, a log-odds, which is no sum of parts. Their "
        f"correlation over these prompts is {number_text(result['score_correlation'])}; the difference tells toxic "
        f"from safe prompts with AUROC {number_text(result['auroc'])}.",
    )


def _table(components: pd.DataFrame) -> str:
    listed = components.sort_values("difference", key=lambda values: -values.abs(), kind="stable").head(_LISTED)
    titles = ("component", "toxic (nats)", "low", "high", "safe", "toxic − safe", "q", "role")
    numbers = ("toxic_mean", "toxic_low", "toxic_high", "safe_mean", "difference")
    rows = [
        (
            printable(row["component"]),
            *(number_text(row[name], signed=True) for name in numbers),
            "" if pd.isna(row["q_value"]) else number_text(row["q_value"]),
            "" if pd.isna(row["role"]) else row["role"],
        )
        for row in listed.to_dict("records")
    ]
    return figures_table(titles, rows)

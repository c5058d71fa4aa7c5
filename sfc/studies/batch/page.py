"""The page of several models: a line each, critical components by depth, and where toxic prompts stand out."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import BLUE, ROLE_COLOURS, axis, remark, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import NOT_MEASURABLE, count_text, hover_text, number_text, printable

_TENTHS = [f"{10 * tenth}–{10 * tenth + 10} %" for tenth in range(10)]
_LISTED = 30
_GROUPS = {
    "behaviour": {"refused_toxic": "refuses toxic", "refused_hard": "hard", "refused_safe": "safe",
                  "score_auroc": "score AUROC"},
    "probe": {"n_layers": "layers", "best_layer": "best layer", "separation": "separation",
              "probe_accuracy": "probe", "probe_control": "shuffled"},
    "logits": {"n_heads": "heads", "n_guardrail": "guardrail", "n_compliance": "compliance",
               "strongest_head": "strongest"},
    "patching": {"n_pairs": "pairs", "n_components": "components", "n_critical": "critical",
                 "strongest_denoise": "denoising", "strongest_noise": "noising"},
    "circuit": {"n_nodes": "nodes", "faithfulness": "faithfulness", "completeness_normalised": "completeness"},
}  # fmt: skip
_TITLES = {
    "behaviour": "Behaviour: share of test prompts refused",
    "probe": "Refusal direction and probe, at the layer of largest separation",
    "logits": "Direct logit attribution",
    "patching": "Activation patching, and the strongest critical head either way",
    "circuit": "Circuit of sparse features",
}


def write_batch_page(
    path: Path,
    result: Mapping[str, Any],
    frequency: pd.DataFrame,
    layers: pd.DataFrame,
    links: Mapping[str, Mapping[str, str]],
) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        result: what `batch --json` prints.
        frequency: as `frequencies` gives it.
        layers: of each model and layer `model, depth, separation, accuracy`; empty where none was probed.
        links: addresses of pages, by model and stage.
    """
    names = [row["model"] for row in result["models"]]
    tables = "".join(
        f'<section class="card scroll"><h2>{escape(_TITLES[stage])}</h2>{_models_table(result, stage)}</section>\n'
        for stage in result["stages"]
    )
    body = f"""{header_html(f"{count_text(len(names), 'model')} · {result['category']}", _sentence(result))}
{tables}<section class="card scroll"><h2>What failed</h2>{_failures(result["failures"])}</section>
<section class="card graph">{figure_html("frequency", frequency_figure(frequency))}</section>
<section class="card graph">{figure_html("layers", layers_figure(layers))}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>
<section class="card scroll"><h2>Critical components by frequency</h2>{_frequency_table(frequency)}</section>
<section class="card"><h2>Each model's pages</h2>{_links(links)}</section>"""
    write_document(path, f"{count_text(len(names), 'model')} · {result['category']}", body)


def frequency_figure(frequency: pd.DataFrame) -> go.Figure:
    """A heat map: the share of models in which a kind of component is critical, by tenth of the depth."""
    rows = sorted({(str(row["evidence"]), str(row["kind"])) for row in frequency.to_dict("records")}, reverse=True)
    figure = styled_figure("Share of models with a critical component, by relative depth", 150 + 34 * max(len(rows), 3))
    cells = {(row["evidence"], row["kind"], row["tenth"]): row for row in frequency.to_dict("records")}
    grid = [[cells.get((*row, tenth)) for tenth in range(10)] for row in rows]
    figure.add_trace(
        go.Heatmap(
            x=_TENTHS,
            y=[f"{evidence}, {kind}" for evidence, kind in rows],
            z=[[cell["share"] if cell else 0.0 for cell in line] for line in grid],
            customdata=[[_hover(cell) for cell in line] for line in grid],
            hovertemplate="%{y} at %{x} of the depth<br>%{customdata}<extra></extra>",
            colorscale=[[0, "#ffffff"], [1, BLUE]],
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "models"}, "tickformat": ".0%", "thickness": 12},
            xgap=1,
            ygap=1,
        )
    )
    if not rows:
        remark(figure, "No component is critical in any model.")
    return figure.update_layout(
        margin={"l": 150},
        xaxis=axis("from the first layer to the last", showgrid=False),
        yaxis=axis("", showgrid=False),
    )


def layers_figure(layers: pd.DataFrame) -> go.Figure:
    """Separation and probe accuracy by relative depth, a line per model."""
    titles = ("separation (pooled standard deviations)", "probe accuracy, held-out prompts")
    figure = make_subplots(
        cols=2, subplot_titles=titles, figure=styled_figure("Where toxic prompts can be told from safe ones", 460)
    )
    if layers.empty:
        remark(figure, "No model was probed.")
        return figure
    for number, (model, rows) in enumerate(layers.groupby("model", sort=False)):
        for column, quantity in enumerate(("separation", "accuracy"), start=1):
            line = go.Scatter(
                x=rows["depth"].tolist(),
                y=rows[quantity].astype(object).where(rows[quantity].notna(), None).tolist(),
                mode="lines+markers",
                marker={"size": 5, "symbol": number},
                line={"color": ROLE_COLOURS[number % len(ROLE_COLOURS)]},
                name=hover_text(str(model)),
                legendgroup=str(number),
                showlegend=column == 1,
                customdata=rows["layer"].tolist(),
                hovertemplate="layer %{customdata}: <b>%{y:.3f}</b>",
            )
            figure.add_trace(line, 1, column)
    figure.update_xaxes(axis("relative depth", tickformat=".0%", showgrid=False))
    figure.update_yaxes(axis("", rangemode="tozero"), col=1)
    figure.update_yaxes(axis("", tickformat=".0%"), col=2)
    return figure.update_layout(margin={"t": 100}, showlegend=True, legend={"y": 1.08})


def _models_table(result: Mapping[str, Any], stage: str) -> str:
    columns = _GROUPS[stage]
    rows = [(row["model"], *(_cell(name, row[name]) for name in columns)) for row in result["models"]]
    return figures_table(("model", *columns.values()), [[printable(cell) for cell in row] for row in rows])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "–" if name.startswith(("n_", "strongest", "best")) else NOT_MEASURABLE
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else number_text(value)


def _failures(failures: Sequence[Mapping[str, str]]) -> str:
    if not failures:
        return "<p>Nothing.</p>"
    rows = [[printable(failure[key]) for key in ("model", "stage", "reason")] for failure in failures]
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f'<th scope="col">{name}</th>' for name in ("model", "stage", "reason"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _frequency_table(frequency: pd.DataFrame) -> str:
    if frequency.empty:
        return "<p>None: no component is critical in any model.</p>"
    titles = ("evidence", "kind", "depth", "models", "of", "components", "strongest in each model")
    rows = [
        (
            row["evidence"],
            row["kind"],
            _TENTHS[row["tenth"]],
            str(row["n_models"]),
            str(row["n_measured"]),
            str(row["n_components"]),
            printable(row["strongest"]),
        )
        for row in frequency.head(_LISTED).to_dict("records")
    ]
    return figures_table(titles, rows)


def _links(links: Mapping[str, Mapping[str, str]]) -> str:
    items = "".join(
        f"<p>{escape(printable(model))}: "
        + (", ".join(f'<a href="{escape(page)}">{escape(stage)}</a>' for stage, page in pages.items()) or "none")
        + "</p>"
        for model, pages in links.items()
    )
    return items or "<p>None.</p>"


def _hover(cell: Mapping[Any, Any] | None) -> str:
    if cell is None:
        return "in no model"
    strongest = "<br>".join(hover_text(part) for part in cell["strongest"].split("; "))
    return f"<b>{cell['n_models']} of {cell['n_measured']}</b> models<br>{strongest}"


def _sentence(result: Mapping[str, Any]) -> str:
    failed = {failure["model"] for failure in result["failures"]}
    models = ", ".join(row["model"] for row in result["models"])
    return (
        f"The same study of {models}: {', '.join(result['stages'])}; category {result['category']} where a stage takes"
        f" one. {count_text(len(result['failures']), 'stage')} failed, in {count_text(len(failed), 'model')}."
    )


_GUIDE = (
    "<b>Critical.</b> Denoise and noise: the component is told from chance in activation patching (q &lt; 0.05). "
    "Guardrail and compliance: heads that write refusal, or its opposite, into the logits of toxic prompts. The first "
    "says what is used by way of everything after it, the second what is written directly.",
    "<b>Depth.</b> Layers are compared by their share of the way from the first to the last, in tenths. A model counts "
    "once per kind and tenth. Head numbers of different models have nothing to do with each other.",
    "<b>Best layer.</b> The layer of largest separation is chosen on the test prompts that give the figure, so that it "
    "flatters a little; the lines show all layers.",
    "<b>What fails</b> is left out, and shares are of the models in which the evidence was looked for. A model that "
    "never refuses has no pairs to patch: that is a finding, and no defect.",
)

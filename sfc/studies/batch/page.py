"""The page of several models: a line each, critical components by depth, and where toxic prompts stand out."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfc.behaviors.behavior import Words
from sfc.pages.blocks import Block, Figure, Links, Page, Section, Table, cell
from sfc.pages.style import BLUE, ROLE_COLOURS, axis, grid, remark, shades, styled_figure
from sfc.pages.text import count_text, hover_text
from sfc.studies.study import Study

_TENTHS = [f"{10 * tenth}–{10 * tenth + 10} %" for tenth in range(10)]
_LISTED = 30


def batch_page(
    result: Mapping[str, Any],
    stages: Mapping[str, Study[Any]],
    frequency: pd.DataFrame,
    layers: pd.DataFrame,
    links: Mapping[str, Mapping[str, str]],
    words: Words,
) -> Page:
    """What there is to show of a batch.

    Args:
        result: what `batch --json` prints.
        stages: the studies that were run, by name.
        frequency: as `frequencies` gives it.
        layers: of each model and layer `model, depth, separation, accuracy`; empty where none was probed.
        links: addresses of pages, by model and stage.
    """
    rows, failures = result["models"], result["failures"]

    def models_table(columns: Mapping[str, Sequence[str]]) -> Table:
        """A line per model, with some columns of each study; a dash where the study came to nothing."""
        titles = [stages[stage].model_columns[column] for stage, of in columns.items() for column in of]
        cells = [
            [
                cell(row[column]) if stage in links[row["model"]] else "–"
                for stage, of in columns.items()
                for column in of
            ]
            for row in rows
        ]
        spoken = [title.format_map(words._asdict()) for title in titles]
        return Table("", ("model", *spoken), [[row["model"], *of] for row, of in zip(rows, cells, strict=True)])

    summary: list[Block] = [models_table({stage: study.model_headline for stage, study in stages.items()})]
    if failures:
        columns = ("model", "stage", "reason")
        cells = [[failure[column] for column in columns] for failure in failures]
        summary.append(Table("What failed", columns, cells, texts=("stage", "reason")))
    sections = [
        Section(stage, [models_table({stage: list(study.model_columns)})])
        for stage, study in stages.items()
        if study.model_columns
    ]
    if {"patch", "attribute-logits"} & set(stages):
        figure = Figure("frequency", lambda: frequency_figure(frequency))
        sections.append(Section("", [figure, *([] if frequency.empty else [_frequency_table(frequency)])]))
    if "probe" in stages:
        sections.append(Section("", [Figure("layers", lambda: layers_figure(layers, words))]))
    pages = [Links(model, [*of_model.items()]) for model, of_model in links.items()]
    return Page(
        title=count_text(len(rows), "model") + (f" · {result['category']}" if result["category"] else ""),
        sentence=_sentence(result),
        summary=summary,
        sections=[*sections, Section("Each model's pages", pages)],
        guide=_guide(words),
    )


def frequency_figure(frequency: pd.DataFrame) -> go.Figure:
    """A heat map: the share of models in which a kind of component is critical, by tenth of the depth."""
    rows = sorted({(str(row["evidence"]), str(row["kind"])) for row in frequency.to_dict("records")}, reverse=True)
    figure = styled_figure("Share of models with a critical component, by relative depth", 150 + 34 * max(len(rows), 3))
    cells = {(row["evidence"], row["kind"], row["tenth"]): row for row in frequency.to_dict("records")}
    lines = [[cells.get((*row, tenth)) for tenth in range(10)] for row in rows]
    figure.add_trace(
        grid(
            _TENTHS,
            [f"{evidence}, {kind}" for evidence, kind in rows],
            pd.DataFrame([[cell["share"] if cell else 0.0 for cell in line] for line in lines]),
            customdata=[[_hover(cell) for cell in line] for line in lines],
            hovertemplate="%{y} at %{x} of the depth<br>%{customdata}<extra></extra>",
            colorscale=shades(BLUE),
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "models"}, "tickformat": ".0%", "thickness": 12},
        )
    )
    if not rows:
        remark(figure, "No component is critical in any model.")
    return figure.update_layout(
        margin={"l": 150},
        xaxis=axis("from the first layer to the last", showgrid=False),
        yaxis=axis("", showgrid=False),
    )


def layers_figure(layers: pd.DataFrame, words: Words) -> go.Figure:
    """Separation and probe accuracy by relative depth, a line per model."""
    titles = ("separation (pooled standard deviations)", "probe accuracy, held-out prompts")
    figure = make_subplots(
        cols=2,
        subplot_titles=titles,
        figure=styled_figure(f"Where {words.positive} prompts can be told from {words.negative} ones", 460),
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


def _frequency_table(frequency: pd.DataFrame) -> Table:
    titles = ("evidence", "kind", "depth", "models", "of", "components", "strongest in each model")
    rows = [
        [
            *(str(row[field]) for field in ("evidence", "kind")),
            _TENTHS[row["tenth"]],
            *(str(row[field]) for field in ("n_models", "n_measured", "n_components", "strongest")),
        ]
        for row in frequency.head(_LISTED).to_dict("records")
    ]
    return Table("Critical components by frequency", titles, rows, texts=("kind", "strongest in each model"))


def _hover(cell: Mapping[Any, Any] | None) -> str:
    if cell is None:
        return "in no model"
    strongest = "<br>".join(hover_text(part) for part in cell["strongest"].split("; "))
    return f"<b>{cell['n_models']} of {cell['n_measured']}</b> models<br>{strongest}"


def _sentence(result: Mapping[str, Any]) -> str:
    failed = {failure["model"] for failure in result["failures"]}
    models = ", ".join(row["model"] for row in result["models"])
    category = f" category {result['category']} where a study takes one." if result["category"] else ""
    return (
        f"The same studies of {models}: {', '.join(result['stages'])}.{category}"
        f" {count_text(len(result['failures']), 'stage')} failed, in {count_text(len(failed), 'model')}."
    )


def _guide(words: Words) -> Sequence[str]:
    return (
        "**Critical.** Denoise and noise: the component is told from chance in activation patching (q < 0.05)."
        f" Guardrail and compliance: heads that write for or against the {words.score} into the logits of"
        f" {words.positive} prompts. The first says what is used by way of everything after it, the second what is"
        " written directly.",
        "**Depth.** Layers are compared by their share of the way from the first to the last, in tenths. A model"
        " counts once per kind and tenth. Head numbers of different models have nothing to do with each other.",
        "**Best layer.** The layer of largest separation is chosen on the test prompts that give the figure, which"
        " flatters it a little; the lines show all layers.",
        "**What fails** is left out, and shares are of the models in which the evidence was looked for. That no"
        f" prompt is {words.acted} by a model, so that it has no pairs to patch, is a finding and not a defect.",
    )

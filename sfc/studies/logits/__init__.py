"""`sfc attribute-logits`: what does each part of the model write into the logits that the score reads?

A head is a *guardrail* head if it pushes toxic prompts towards refusal (the interval of its mean contribution lies
above zero) and more so than safe ones (the difference toxic - safe is positive with q < 0.05). A *compliance* head is
its mirror image: below zero on toxic prompts, and lower there than on safe ones. All others are neither, among them
those that push every prompt alike. q-values control the false discovery rate over all heads of the model.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool
from scipy.stats import false_discovery_control

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import json_records
from sfc.core.options import Options, option
from sfc.core.registry import imported_when_called
from sfc.pages.blocks import (
    Figure,
    Formula,
    Page,
    Section,
    Tile,
    Tiles,
    cell,
    estimate_cell,
    grid_table,
    interval_cell,
    records_table,
)
from sfc.pages.style import GREEN, INK, PINK, Panel, axis, error_bars, heat_map, panels_figure, styled_figure
from sfc.pages.text import hover_text, tokens_text
from sfc.run import Run
from sfc.stats import bootstrap_means, welch
from sfc.studies.study import STUDIES, Finished, Study

if TYPE_CHECKING:
    from sfc.studies.logits.measure import LogitAttribution

GUARDRAIL, COMPLIANCE, NEITHER = "guardrail", "compliance", "neither"
MOST_FALSE = 0.05


def component_table(attribution: "LogitAttribution", toxic: Bool[np.ndarray, " prompts"], seed: int) -> pd.DataFrame:
    """One row per component, in the order of `attribution.components`, contributions in nats.

    Columns: `component`, `kind`, `layer`, `head` (missing where it has none), `toxic_mean`, `toxic_low`, `toxic_high`,
    `safe_mean`, `safe_low`, `safe_high` (95 % bootstrap intervals), `difference` (toxic - safe), and for heads
    `p_value` (Welch's t-test, two-sided), `q_value` and `role`.

    Raises:
        ValueError: there are no toxic or no safe prompts.
    """
    table = pd.DataFrame(attribution.components).rename(columns={"name": "component"})
    table = table.astype({"layer": "Int64", "head": "Int64"})
    sides = {"toxic": attribution.contributions[toxic], "safe": attribution.contributions[~toxic]}
    for side, contributions in sides.items():
        for name, values in bootstrap_means(contributions, seed)._asdict().items():
            table[f"{side}_{name}"] = values
    table["difference"] = table["toxic_mean"] - table["safe_mean"]
    is_head = (table["kind"] == "head").to_numpy(dtype=bool)
    p_values = welch(sides["toxic"][:, is_head], sides["safe"][:, is_head])
    table.loc[is_head, "p_value"] = p_values
    table.loc[is_head, "q_value"] = false_discovery_control(p_values)
    table.loc[is_head, "role"] = _roles(table[is_head])
    return table


def strongest(components: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `component_table`, those first whose contributions differ most between toxic and safe prompts."""
    return components.sort_values("difference", key=lambda values: -values.abs(), kind="stable")


def group_table(attribution: "LogitAttribution", prompts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Mean contributions of each category and label (columns `category` and `label` of `prompts`, one row a prompt).

    Columns: `category`, `label`, `n`, `component`, `mean`, `low`, `high` (95 % bootstrap intervals), in nats.
    """
    names = [component.name for component in attribution.components]
    tables = []
    for (category, label), rows in prompts.groupby(["category", "label"]).indices.items():  # pyright: ignore
        means = bootstrap_means(attribution.contributions[rows], seed)
        facts = {"category": category, "label": label, "n": len(rows), "component": names}
        tables.append(pd.DataFrame(facts | means._asdict()))
    return pd.concat(tables, ignore_index=True)


def _roles(heads: pd.DataFrame) -> list[str]:
    discovered = heads["q_value"] < MOST_FALSE
    guardrail = discovered & (heads["toxic_low"] > 0) & (heads["difference"] > 0)
    compliance = discovered & (heads["toxic_high"] < 0) & (heads["difference"] < 0)
    return np.select([guardrail, compliance], [GUARDRAIL, COMPLIANCE], NEITHER).tolist()


class LogitsOptions(Options):
    """Whose prompts are attributed."""

    section = "attribute-logits"
    category: str | None = option(
        None, description="group of prompts, such as an OR-Bench category, or all; by default violence"
    )


class LogitAttributions(Study[LogitsOptions]):
    """Split the refusal logit difference into what each head, MLP, embedding and bias writes; classify the heads.

    Example: sfc attribute-logits --category all
    """

    name = "attribute-logits"
    options = LogitsOptions
    schema = 2
    files: ClassVar = {
        "page": "logits.html",
        "components": "components.csv",
        "layers": "layers.csv",
        "groups": "groups.csv",
        "prompts": "prompts.csv",
    }
    model_columns: ClassVar = {
        "n_heads": "heads",
        "n_guardrail": "guardrail heads",
        "n_compliance": "compliance heads",
        "strongest_head": "strongest head",
    }
    model_headline: ClassVar = ("n_guardrail",)

    def label(self, run: Run) -> str:
        return f"logits-{run.group(self.of(run).category)}"

    def inputs(self, run: Run) -> dict[str, Any]:
        return {**run.identity, "category": run.group(self.of(run).category)}

    make = imported_when_called(f"{__name__}.measure:measure")

    def page(self, finished: Finished) -> Page:
        result, words = finished.result, finished.words
        components, layers = finished.table("components.csv"), finished.table("layers.csv")
        heads = components[components["kind"] == "head"].astype({"layer": int, "head": int})
        others = strongest(components[components["kind"] != "head"])[:_LISTED]
        cells = {(row["layer"], row["head"]): row["difference"] for row in json_records(heads, digits=None)}
        differences = grid_table(f"Heads: {words.positive} − {words.negative}, nats", "layer \\ head", cells)
        title = f"The heads that tell {words.positive} from {words.negative} prompts best"
        columns = {
            "component": "component", f"{words.positive}, nats (95 %)": "toxic", words.negative: "safe_mean",
            f"{words.positive} − {words.negative}": "difference",
        }  # fmt: skip
        of_heads = {**columns, "q": "q_value", "role": "role"}
        of_others = _contributions(json_records(others, digits=None))
        return Page(
            title=f"Direct logit attribution · {result['category']} · {result['preset']}",
            sentence=(
                f"What every part of the model writes into the logit difference of {result['n_toxic']} {words.positive}"
                f" and {result['n_safe']} {words.negative} test prompts: the mean logit of"
                f" {_tokens(result, 'refusal')} minus the mean logit of {_tokens(result, 'against')}."
            ),
            summary=[
                _tiles(result, words),
                records_table(title, of_heads, _contributions(result["heads"]), texts=("role",)),
            ],
            sections=[
                Section("", [Figure("heads", lambda: heads_figure(heads, words), differences)]),
                Section("", [Figure("layers", lambda: layers_figure(layers, words))]),
                Section("", [records_table("Other parts, the largest differences first", columns, of_others)]),
            ],
            guide=_guide(result, words),
            findings=[
                ("AUROC of the logit difference", cell(result["auroc"])),
                ("correlation with the score", cell(result["score_correlation"])),
                ("heads", cell(result["n_heads"])),
                *((f"{role} heads", cell(len(result[role]))) for role in _MARKS),
            ],
            methods=_methods(words),
            limits=["Direct logit attribution sees what a part writes itself, not what it makes later parts write."],
        )

    def model_row(self, finished: Finished) -> dict[str, Any]:
        result = finished.result
        counts = {f"n_{role}": len(result[role]) for role in ("guardrail", "compliance")}
        return {"n_heads": result["n_heads"], **counts, "strongest_head": result["heads"][0]["component"]}


_MARKS = {GUARDRAIL: "G", COMPLIANCE: "C"}
_LISTED = 20


def _contributions(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records with their mean contribution to positive prompts, and its interval, under `toxic`."""
    ends = ("toxic_mean", "toxic_low", "toxic_high")
    return [{**record, "toxic": estimate_cell(*(record[end] for end in ends))} for record in records]


def heads_figure(heads: pd.DataFrame, words: Words) -> go.Figure:
    """Two heat maps of the heads, layers upwards: contributions to positive prompts, and positive - negative."""
    n_layers, n_heads = int(heads["layer"].max()) + 1, int(heads["head"].max()) + 1
    cells = heads.assign(
        mark=heads["role"].map(_MARKS).fillna(""),
        hover=[
            f"{hover_text(row['component'])}: <b>{hover_text(row['role'])}</b><br>"
            f"{words.positive} {row['toxic_mean']:.4f} ({row['toxic_low']:.4f} to {row['toxic_high']:.4f})<br>"
            f"{words.negative} {row['safe_mean']:.4f}, q {row['q_value']:.2g}"
            for row in json_records(heads, digits=None)
        ],
    )
    panels = []
    for title, quantity, bar in (
        (f"{words.positive} prompts", "toxic_mean", 0.435),
        (f"{words.positive} − {words.negative}", "difference", 1.005),
    ):
        # One extreme head must not make all others pale.
        most = float(np.quantile(cells[quantity].abs(), 0.995)) or 1.0
        trace = heat_map(cells, quantity, "head", range(n_heads), most, "nats").update(colorbar={"x": bar})
        x_axis = axis("head", dtick=1 + (n_heads - 1) // 12, showgrid=False)
        panels.append(Panel(title, x_axis, axis("layer", dtick=1 + n_layers // 12, showgrid=False), [trace]))
    return panels_figure(styled_figure("Heads", max(360, 150 + 16 * n_layers)), panels, horizontal_spacing=0.14)


def layers_figure(layers: pd.DataFrame, words: Words) -> go.Figure:
    """Bars of each layer's attention and MLP on positive prompts with intervals, and a dot for negative ones."""
    figure = styled_figure("Layers", 400)
    for kind, colour in (("attention", GREEN), ("mlp", PINK)):
        rows = layers[layers["kind"] == kind]
        hover = f"{kind} of layer %{{x}}: <b>%{{y:.3f}}</b> nats<extra>%{{fullData.name}}</extra>"
        figure.add_bar(
            x=rows["layer"].astype(int).tolist(),
            y=rows["toxic_mean"].tolist(),
            error_y=error_bars(rows["toxic_mean"], rows["toxic_low"], rows["toxic_high"], width=2),
            marker_color=colour,
            offsetgroup=kind,
            name=f"{kind}, {words.positive}",
            hovertemplate=hover,
        )
        figure.add_scatter(
            x=rows["layer"].astype(int).tolist(),
            y=rows["safe_mean"].tolist(),
            mode="markers",
            marker={"color": "white", "size": 7, "line": {"color": colour, "width": 2}},
            offsetgroup=kind,
            name=f"{kind}, {words.negative}",
            hovertemplate=hover,
        )
    return figure.update_layout(
        barmode="group",
        scattermode="group",
        xaxis=axis("layer", showgrid=False),
        yaxis=axis("contribution (nats)", zeroline=True, zerolinecolor=INK),
        showlegend=True,
    )


def _tokens(result: Mapping[str, Any], side: str) -> str:
    tokens = result["tokens"][side]
    return tokens_text(tokens, len(tokens))


def _tiles(result: Mapping[str, Any], words: Words) -> Tiles:
    sides = {words.positive: "toxic", words.negative: "safe"}
    means = {name: result["logit_difference"][side] for name, side in sides.items()}
    return Tiles(
        [
            *(
                Tile(
                    f"logit difference, {name}", cell(mean["mean"]), f"nats, {interval_cell(mean['low'], mean['high'])}"
                )
                for name, mean in means.items()
            ),
            Tile("AUROC", cell(result["auroc"]), f"{words.positive} against {words.negative}"),
            Tile("correlation", cell(result["score_correlation"]), f"with the {words.score}"),
            Tile("heads", cell(result["n_heads"]), ", ".join(f"{cell(len(result[role]))} {role}" for role in _MARKS)),
        ]
    )


def _guide(result: Mapping[str, Any], words: Words) -> tuple[str, ...]:
    return (
        "**Contributions.** With the final norm's scale held at its value in the run, the logit difference is the sum "
        "of what heads, MLPs, embeddings and biases write at the last position; the sum misses the model's own "
        f"difference by {cell(result['reconstruction_error'])} of the absolute terms at most. Only what is written "
        "directly counts, not what a head makes later parts write.",
        f"**Roles.** G, guardrail: the head raises the logit difference of {words.positive} prompts (its 95 % interval"
        f" is above zero), and more than that of {words.negative} ones (q < 0.05, false discovery rate over all heads)"
        ". C, compliance: the mirror image. This says that an effect is there, not that it is large.",
        f"**The logit difference** stands in for the {words.score}, a log-odds, which is not a sum of parts. It is a "
        "fair stand-in as far as the two correlate.",
    )


def _methods(words: Words) -> tuple[Formula, ...]:
    return (
        Formula(
            "Direct logit attribution (Elhage et al. 2021)",
            "contribution = (output / norm scale, held) . (mean W_U of the score's tokens - mean W_U of tokens"
            " against); all contributions sum to the logit difference",
        ),
        Formula(
            "Guardrail head",
            f"contribution to {words.positive} prompts above 0 (95 %) and larger than to {words.negative} ones (Welch's"
            " t, q < 0.05); compliance head: the mirror image",
        ),
    )


STUDIES.register(LogitAttributions())

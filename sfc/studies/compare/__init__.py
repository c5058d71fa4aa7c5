"""`sfc compare`: how alike are the circuits of several categories, and do they work on each other's prompts?"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from pydantic import Field
from scipy.cluster.hierarchy import dendrogram

from sfc.behaviors.behavior import Words
from sfc.circuits.methods import METHODS
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions, discovery_identity
from sfc.core.artifacts import json_records
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.core.registry import imported_when_called
from sfc.data.schema import ALL
from sfc.pages.blocks import Figure, Formula, Page, Paragraph, Section, Table, cell, figure_cell
from sfc.pages.style import INK, QUIET, axis, styled_figure
from sfc.pages.text import hover_text
from sfc.run import Run
from sfc.studies.compare.overlap import (
    OVERLAP_MEASURES,
    TRANSFER_MEASURES,
    between_halves,
    by_category,
    cluster,
    with_recovered,
)
from sfc.studies.discover import DISCOVER
from sfc.studies.nulls import circuit_inputs, needs_of_circuits
from sfc.studies.study import STUDIES, Finished, Need, Study


class ComparisonOptions(Options):
    """How the circuits of categories are compared: a protocol of its own, with few sizes and draws."""

    section = "comparison"

    categories: list[str] = option([ALL], description="categories among the ten, or all")
    size: int = option(200, ge=1, description="nodes of each circuit; the overlap depends on it")
    shuffles: int = Field(5, ge=0, description="shuffled pools of two categories, as a yardstick")
    edges: int = Field(500, ge=0, description="strongest edges of each circuit, whose overlap is measured as well")
    replies: int = Field(20, ge=0, description="test prompts per category that are answered with nodes ablated")
    reply_tokens: int = Field(16, ge=1, description="length of those replies, which are judged")


class Compare(Study[ComparisonOptions]):
    """How alike are the circuits of categories? Their overlap, what each does on the others' prompts, and their core.

    Example: sfc compare --categories violence,privacy,illegal
    """

    name = "compare"
    options = ComparisonOptions
    is_shared = True
    schema = 4
    also = ((DiscoveryOptions, "method"), (DiscoveryOptions, "contrast"))
    files: ClassVar = {
        "page": "comparison.html",
        "overlap": "overlap.csv",
        "transfer": "transfer.csv",
        "core": "core.csv",
    }

    def categories(self, run: Run) -> list[str]:
        """The categories by their canonical names, each once, in alphabetical order.

        Raises:
            UserError: there is no such category.
        """
        names = self.of(run).categories
        known = run.prompts.frame["category"].unique() if names == [ALL] else map(run.group, names)
        return sorted(set(known))

    def check(self, run: Run) -> None:
        if len(self.categories(run)) < 2:
            raise UserError("compare needs at least two categories, for example --categories violence,privacy")
        discovery = DiscoveryOptions.of(run.experiment)
        if discovery.baseline_choice in ("paired", "base", "complied-mean"):
            raise UserError(
                f"compare pools prompts of categories, whose baseline {discovery.baseline_choice!r} is not the same"
            )
        if not METHODS[discovery.method].per_prompt:
            possible = [method.name for method in METHODS if method.per_prompt]
            raise UserError(f"compare needs a method that halves of the prompts can be given to: {', '.join(possible)}")

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        return f"comparison{run.behavior.words.said(discovery.name_of_prompts)}-{discovery.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        experiment, options = run.experiment, self.of(run)
        return {
            **circuit_inputs(run),
            "circuit": DISCOVER.schema,
            "categories": self.categories(run),
            "discovery": discovery_identity(experiment),
            "evaluation": EvaluationOptions.of(experiment).model_dump(include={"error_mode", "min_denominator"}),
            "comparison": options.model_dump(exclude={"categories"}),
        }

    def needs(self, run: Run) -> list[Need]:
        return needs_of_circuits(run)

    make = imported_when_called(f"{__name__}.measure:measure")
    work = imported_when_called(f"{__name__}.measure:work")

    def page(self, finished: Finished) -> Page:
        result, words = finished.result, finished.words
        in_order = [result["categories"][number] for number in result["order"]]
        between = between_halves(finished.table("overlap.csv"), result["categories"])
        tables = transfer_tables(finished.table("transfer.csv"), in_order, list(result["transfer"]))
        overlaps = pd.DataFrame(between, result["categories"], result["categories"]).loc[in_order, in_order]
        nodes = result["overlap"]["jaccard"]
        pictures = [
            Figure("overlap", lambda: overlap_figure(result, between), _matrix(_OVERLAP, "", overlaps)),
            *(
                Figure(
                    "transfer",
                    partial(transfer_figure, table, name),
                    _matrix(f"{_TRANSFER}: {TRANSFER_MEASURES[name]}", "circuit", table),
                )
                for name, table in tables.items()
            ),
        ]
        return Page(
            title=f"Circuits of {len(in_order)} categories · {result['preset']}",
            sentence=(
                f"How alike are the circuits of {len(in_order)} categories, and what does each do on the others'"
                f" prompts? Circuits of {result['size']} nodes, found by {result['method']}."
            ),
            summary=[_overlap_table(result), _transfer_table(result), Paragraph(result["verdict"])],
            sections=[
                *(Section("", [picture]) for picture in pictures),
                Section(
                    "The shared core and the rest, on test prompts", [_core_table(finished.table("core.csv"), words)]
                ),
            ],
            guide=_guide(words),
            findings=[
                ("overlap of nodes (Jaccard), two halves of one category", cell(nodes["within"])),
                ("overlap of nodes (Jaccard), halves of two categories", cell(nodes["between"])),
                ("their difference", figure_cell(nodes, "difference")),
                *(
                    (f"{TRANSFER_MEASURES[name]}, {whose} prompts", cell(found[key]))
                    for name, found in result["transfer"].items()
                    for key, whose in (("own", "its own category's"), ("other", "other categories'"))
                ),
                ("nodes of the shared core", cell(len(result["core_nodes"]))),
            ],
            methods=_METHODS,
            limits=[
                "Overlap says that circuits are alike, not that the model treats the categories alike: circuits that"
                " give every prompt the same score are alike in any case.",
                f"How far circuits overlap depends on their size: all have {result['size']} nodes, whatever size each"
                " category's discovery would choose.",
            ],
        )


_CELL, _FRAME = 44, 190
_OVERLAP = "Overlap of circuits found on half of the prompts"
_TRANSFER = "A category's circuit on another's test prompts"


def overlap_figure(result: Mapping[str, Any], between: Float[np.ndarray, "categories categories"]) -> go.Figure:
    """The heat map in the order of the clustering, its tree above it.

    Args:
        between: overlaps by Jaccard's index, in the order of `result["categories"]`.
    """
    names = [hover_text(result["categories"][i]) for i in result["order"]]
    table = between[np.ix_(result["order"], result["order"])]
    figure = make_subplots(2, 1, shared_xaxes=True, row_heights=[0.2, 0.8], vertical_spacing=0.01)
    height = round(_CELL * len(names) * 1.25) + _FRAME
    figure.update_layout(styled_figure(_OVERLAP, height).layout)
    tree = dendrogram(cluster(between), no_plot=True)
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):
        # scipy sets leaves at 5, 15, 25 …
        line = {"color": QUIET, "width": 1.5}
        figure.add_scatter(
            x=[(value - 5) / 10 for value in x],
            y=y,
            mode="lines",
            line=line,
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=1,
        )
    figure.add_trace(
        _heat_map(list(range(len(names))), names, table, "Jaccard's index", 0, float(np.nanmax(table))), 2, 1
    )
    figure.update_xaxes(axis("", showgrid=False, showticklabels=False), row=1, col=1)
    figure.update_yaxes(axis("1 − overlap", showgrid=False), row=1, col=1)
    figure.update_xaxes(
        axis("", showgrid=False, tickvals=list(range(len(names))), ticktext=names, tickangle=-40), row=2, col=1
    )
    figure.update_yaxes(axis("", showgrid=False, autorange="reversed"), row=2, col=1)
    return figure.update_layout(margin={"l": 110, "b": 100})


def transfer_tables(transfer: pd.DataFrame, categories: list[str], figures: list[str]) -> dict[str, pd.DataFrame]:
    """Figures of each category's circuit (rows) on the prompts of each category (columns), in this order."""
    return {name: by_category(transfer, name).loc[categories, categories] for name in figures}


def transfer_figure(table: pd.DataFrame, name: str) -> go.Figure:
    """The heat map of one of the `transfer_tables`."""
    names = [hover_text(category) for category in table.index]
    measure = TRANSFER_MEASURES[name]
    figure = styled_figure(f"{_TRANSFER}: {measure}", _CELL * len(names) + _FRAME)
    low = 0.5 if name == "separation" else 0
    figure.add_trace(_heat_map(names, names, table.to_numpy(), name.replace("_", " "), low, 1 if low else 1.2))
    figure.update_xaxes(axis("prompts of", showgrid=False, tickangle=-40))
    figure.update_yaxes(axis("circuit of", showgrid=False, autorange="reversed"))
    return figure.update_layout(margin={"l": 110, "b": 120})


def _heat_map(x: list, y: list[str], table: np.ndarray, name: str, low: float, high: float) -> go.Heatmap:
    hovers = [[f"{a} and {b}" for b in y] for a in y]
    return go.Heatmap(
        x=x,
        y=y,
        z=[[None if np.isnan(value) else float(value) for value in row] for row in table],
        customdata=hovers,
        texttemplate="%{z:.2f}",
        colorscale="Cividis",
        zmin=low,
        zmax=high,
        colorbar={"title": {"text": name}, "outlinewidth": 0, "tickfont": {"color": INK}},
        hovertemplate=f"%{{customdata}}<br>{name} <b>%{{z:.3f}}</b><extra></extra>",
    )


def _matrix(title: str, corner: str, values: pd.DataFrame) -> Table:
    """A heat map as a table."""
    rows = [[str(name), *map(cell, row)] for name, row in zip(values.index, values.to_numpy().tolist(), strict=True)]
    return Table(title, [corner, *map(str, values.columns)], rows)


def _overlap_table(result: Mapping[str, Any]) -> Table:
    heads = (
        "overlap of", "halves of one category", "of two categories", "of shuffled pools", "random circuits",
        "first less second",
    )  # fmt: skip
    rows = [
        (
            OVERLAP_MEASURES[name].title,
            cell(found["within"]),
            cell(found["between"]),
            "" if found["shuffled"] is None else cell(found["shuffled"]),
            "" if found["chance"] is None else cell(found["chance"]),
            figure_cell(found, "difference"),
        )
        for name, found in result["overlap"].items()
    ]
    return Table(f"Circuits of {result['size']} nodes, found on half of the prompts", heads, rows)


def _transfer_table(result: Mapping[str, Any]) -> Table:
    rows = [
        (TRANSFER_MEASURES[name], cell(found["own"]), cell(found["other"]), figure_cell(found, "difference"))
        for name, found in result["transfer"].items()
    ]
    return Table(_TRANSFER, ("figure", "its own category's", "another's", "difference"), rows)


_CORE = {
    "recovered": "recovered", "agreement": "agreement", "gap_kept": "gap kept", "separation": "separation",
    "separation_model": "the model's", "prompt_free": "prompt-free", "faithfulness": "faithfulness",
    "completeness_normalised": "ablated: left",
}  # fmt: skip


def _core_table(core: pd.DataFrame, words: Words) -> Table:
    heads = {name: head for name, head in _CORE.items() if name == "recovered" or core[name].notna().any()}
    heads |= {
        name: title
        for name, title in (
            ("refused", f"{words.acted}, {words.positive}: as it is"),
            ("refused_ablated", "ablated"),
            ("refused_safe", f"{words.acted}, {words.negative}: as it is"),
            ("refused_safe_alone", "kept alone"),
        )
        if name in core
    }
    rows = [
        [str(row["prompts"]), str(row["circuit"]), f"{row['nodes']:,}", *(figure_cell(row, name) for name in heads)]
        for row in json_records(with_recovered(core), 6)
    ]
    return Table("", ["prompts", "nodes kept or ablated", "nodes", *heads.values()], rows, ["nodes kept or ablated"])


def _guide(words: Words) -> tuple[str, ...]:
    return (
        "**Overlap** is Jaccard's index of the nodes of two circuits of equal size: shared nodes over all nodes of"
        " both. Off the diagonal it is the mean over the halves of two categories, on the diagonal that of the two"
        " halves of one: the most that can be expected, since all circuits are found on as many prompts.",
        "**The tree** joins categories whose circuits are most alike first (average linkage of 1 − overlap).",
        "**Transfer** is what the circuit of one category (rows) restores on the test prompts of another (columns)."
        " **Recovered** is the share of the difference between a prompt and an equally long one of the other side, in"
        " the direction in which less comes back; **gap kept** is what is left, by means, of the difference between the"
        " sides' mean scores. A circuit that scores high whatever it is asked has 0 of both, and a faithfulness of 1.",
        "**The shared core** holds the nodes of more than half of the circuits. Kept alone it has the figures of the"
        " first columns; ablated it leaves the share in the column “left”, 0 where nothing works without it. Where"
        f" replies were judged, the last columns are the shares of test prompts {words.acted}: {words.positive} ones as"
        f" the model is and with these nodes ablated, {words.negative} ones as it is and with these nodes alone.",
        "**Edges** are the strongest by attribution between a circuit's nodes, as many in each circuit. Two circuits"
        " can only share an edge if they share its two ends.",
    )


_METHODS = (
    Formula(
        "Overlap (Jaccard; weighted: Ruzicka 1958)",
        "shared / all of two circuits; weighted: sum of the smaller / sum of the larger shares of |effect|",
    ),
    Formula(
        "Overlap of categories",
        "circuits of equal size, each found on half of a category's discovery prompts; halves of one category are the"
        " yardstick, 95 % interval of the difference by a bootstrap over categories",
    ),
)


STUDIES.register(Compare())

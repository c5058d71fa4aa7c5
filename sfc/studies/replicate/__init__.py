"""`sfc replicate`: does the circuit depend on the seed that its SAEs were trained from, or on their prompts?"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.core.artifacts import json_records
from sfc.core.errors import UserError
from sfc.core.options import Options, option
from sfc.core.registry import imported_when_called
from sfc.core.sites import short_site
from sfc.pages.blocks import Figure, Formula, Page, Paragraph, Section, Table, cell, figure_cell, records_table
from sfc.pages.style import BLUE, LINE, QUIET, VERMILION, axis, remark, styled_figure
from sfc.pages.text import hover_text
from sfc.run import Run
from sfc.studies.discover import DISCOVER
from sfc.studies.study import STUDIES, Finished, Need, Study
from sfc.studies.train import TRAIN

BOTH, ORIGINAL, REPLICATION = "both", "original", "replication"
"""which of the two circuits a node is in: that of the experiment's own SAEs (or the first half's), and that of the
others"""


class ReplicationOptions(Options):
    """With which other SAEs the circuit is discovered."""

    section = "replicate"

    sae_seed: int = option(1, ge=0, description="seed that the other SAEs are trained from")
    halves: bool = option(
        False, description="instead of two seeds, train on two disjoint halves of the prompts: saes.half"
    )


class Replicate(Study[ReplicationOptions]):
    """Is the circuit the same with SAEs trained from another seed, or on other prompts? Trains and discovers if needed.

    Example: sfc replicate --category violence --sae-seed 2
    """

    name = "replicate"
    options = ReplicationOptions
    schema = 3
    also = ((DiscoveryOptions, "category"), (DiscoveryOptions, "method"))
    files: ClassVar = {"page": "replication.html", "nodes": "nodes.csv", "cosines": "cosines.csv"}

    def check(self, run: Run) -> None:
        nodes, saes, sae_seed = DiscoveryOptions.of(run.experiment).nodes, run.experiment.saes, self.of(run).sae_seed
        if not NODES[nodes].needs_saes:
            raise UserError(f"replicate needs circuits of SAE features: nodes {nodes!r} have no SAEs")
        if saes.source is not None:
            raise UserError("replicate trains SAEs of its own, so that none can be given: --set saes.source=null")
        if self.of(run).halves and saes.half:
            raise UserError(f"--halves trains SAEs on both halves: leave saes.half={saes.half} out")
        if not self.of(run).halves and sae_seed == run.experiment.sae_seed:
            raise UserError(f"--sae-seed {sae_seed} is the seed of the experiment's own SAEs: give another one")

    def both(self, run: Run) -> tuple[Run, Run]:
        """The runs whose circuits are compared: they differ in their SAEs' seed, or in what these learned from."""
        experiment, seed = run.experiment, self.of(run).sae_seed
        if self.of(run).halves:
            updates = [{"half": "first"}, {"half": "second"}]
        else:
            # The experiment's own seed is not written down as one of the SAEs: they would have a second name.
            updates = [{}, {"seed": None if seed == experiment.seed else seed}]
        first, second = (
            replace(run, experiment=experiment.model_copy(update={"saes": experiment.saes.model_copy(update=update)}))
            for update in updates
        )
        # Null dictionaries have the shape of the trained ones and nothing else: those of the first say it for both.
        return first, second.having(EvaluationOptions, null_draws=0)

    def label(self, run: Run) -> str:
        discovery = DiscoveryOptions.of(run.experiment)
        of_prompts = run.behavior.words.said(discovery.name_of_prompts)
        halves = "-halves" if self.of(run).halves else ""
        return f"replication{halves}-{run.group(discovery.category)}{of_prompts}-{discovery.method}"

    def inputs(self, run: Run) -> dict[str, Any]:
        first, second = (DISCOVER.artifact(each).inputs for each in self.both(run))
        return {"prompts": run.store.inputs, "original": first, "replication": second}

    def needs(self, run: Run) -> list[Need]:
        # SAEs as well: a circuit that is there may have outlived those that it was found with.
        return [Need(study, each) for each in self.both(run) for study in (DISCOVER, TRAIN)]

    make = imported_when_called(f"{__name__}.measure:measure")

    def page(self, finished: Finished) -> Page:
        result, counts = finished.result, finished.table("cosines.csv")
        nodes = finished.table("nodes.csv")
        kind, how = (
            ("Halves of the prompts", "on another half of the prompts")
            if result[ORIGINAL]["half"]
            else ("SAE-seed robustness", "from another seed, on the same activations, prompts and splits")
        )
        return Page(
            title=f"{kind} · {result['category']} · {result['preset']}",
            sentence=(
                f"Is the circuit the same when the SAEs are trained {how}? Circuits found by {result['method']};"
                " figures are from the test split."
            ),
            summary=[_circuits_table(result, finished.words), _agreement_table(result), *map(Paragraph, _told(result))],
            sections=[
                Section("", [Figure("cosines", lambda: cosines_figure(counts, result), _cosines_table(counts))]),
                Section("", [Figure("effects", lambda: effects_figure(nodes, result))]),
                Section("Every site", [_sites_table(result)]),
            ],
            guide=_guide(result),
            findings=[
                ("Jaccard, nodes of both circuits", cell(result["jaccard"])),
                ("by chance", cell(result["chance"])),
            ],
            methods=[
                Formula(
                    "The same feature (after Paulo and Belrose 2025)",
                    "mutual nearest neighbours by the cosine of decoder directions, of at least"
                    f" {result['same_from_cosine']:g}",
                )
            ],
            limits=[
                "A circuit may restore as much with other SAEs and consist of other features: no single feature should"
                " then be taken for the model's own."
            ],
        )


_HEIGHT = 420
_COLOURS = {"feature": BLUE, "error": VERMILION}
_COSINES = "Cosine with the nearest feature of the other dictionary"


def cosines_figure(counts: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """How near the nearest feature of the other dictionary is: all features, and those of the original circuit.

    Args:
        counts: as `cosine_counts` gives them.
    """
    figure = styled_figure(_COSINES, _HEIGHT)
    for name, column, colour in (("all features", "features", LINE), ("the circuit's features", "in_circuit", BLUE)):
        total = int(counts[column].sum())
        figure.add_bar(
            x=((counts["low"] + counts["high"]) / 2).tolist(),
            y=(counts[column] / max(total, 1)).tolist(),
            width=float(counts["high"][0]),
            name=f"{name} ({total:,})",
            marker={"color": colour, "opacity": 0.55 if colour == BLUE else 1},
            hovertemplate=f"{name}: <b>%{{y:.1%}}</b> near %{{x:.2f}}<extra></extra>",
        )
    figure.add_vline(result["same_from_cosine"], line={"color": QUIET, "dash": "dot"})
    return figure.update_layout(
        barmode="overlay",
        showlegend=True,
        xaxis=axis("cosine", showgrid=False, range=[0, 1]),
        yaxis=axis("share of features", tickformat=".0%", rangemode="tozero"),
    )


def effects_figure(nodes: pd.DataFrame, result: Mapping[str, Any]) -> go.Figure:
    """The effects of the nodes that are in both circuits, in the one and in the other."""
    figure = styled_figure("Effects of the nodes in both circuits", _HEIGHT)
    shared = nodes[nodes["circuit"] == BOTH]
    if shared.empty:
        remark(figure, "No node is in both circuits.")
    else:
        ends = shared[["effect", "replication_effect"]].to_numpy()
        ends = [float(ends.min()), float(ends.max())]
        line = {"color": QUIET, "dash": "dot", "width": 1}
        figure.add_scatter(x=ends, y=ends, mode="lines", line=line, showlegend=False, hoverinfo="skip")
    for kind, of_kind in shared.groupby("kind"):
        pairs = zip(of_kind["node"].map(hover_text), of_kind["partner"].map(hover_text), strict=True)
        figure.add_scatter(
            x=of_kind["effect"].tolist(),
            y=of_kind["replication_effect"].tolist(),
            mode="markers",
            marker={"color": _COLOURS[str(kind)], "size": 6, "opacity": 0.7},
            name=f"{kind} nodes",
            text=[f"{node}, there {partner}" for node, partner in pairs],
            hovertemplate="%{text}<br>%{x:.3g}, there <b>%{y:.3g}</b><extra></extra>",
        )
    unit, (first, second) = hover_text(result["effect_unit"]), _names(result)
    return figure.update_layout(
        showlegend=True,
        xaxis=axis(f"{first}, {unit}", zeroline=True, zerolinecolor=LINE),
        yaxis=axis(f"{second}, {unit}", zeroline=True, zerolinecolor=LINE),
    )


def _names(result: Mapping[str, Any]) -> list[str]:
    """What the two circuits are called."""
    circuits = [result[name] for name in (ORIGINAL, REPLICATION)]
    return [f"{each['half']} half" if each["half"] else f"SAE seed {each['sae_seed']}" for each in circuits]


def _told(result: Mapping[str, Any]) -> list[str]:
    circuits = zip(_names(result), (result[name]["says"] for name in (ORIGINAL, REPLICATION)), strict=True)
    return [
        *(f"**{name[:1].upper()}{name[1:]}.** {told[:1].upper()}{told[1:]}." for name, told in circuits if told),
        f"{result['says']}.",
    ]


def _circuits_table(result: Mapping[str, Any], words: Words) -> Table:
    circuits = [result[name] for name in (ORIGINAL, REPLICATION)]
    figures = {
        "nodes": "n_nodes",
        "errors among them": "n_errors",
        f"recovered, {words.positive}": "recovered_toxic",
        f"recovered, {words.negative}": "recovered_safe",
        "agreement": "agreement",
        "agreement of random features": "null_agreement",
        "gap kept": "gap_kept",
        "separation": "separation",
        "the model's": "separation_model",
        "prompt-free": "prompt_free",
        "faithfulness": "faithfulness",
        "completeness, as published": "completeness",
        "completeness, normalised": "completeness_normalised",
        "faithfulness of random circuits": "random_faithfulness",
        "share of features with a partner": "share_with_partner",
        "circuit": "circuit",
    }
    rows = [
        [title, *(figure_cell(circuit, name) for circuit in circuits)]
        for title, name in figures.items()
        if any(circuit.get(name) is not None for circuit in circuits)
    ]
    return Table("Both circuits, test prompts", ["figure", *_names(result)], rows)


def _agreement_table(result: Mapping[str, Any]) -> Table:
    rows = [
        ["nodes in both circuits", cell(result["n_shared"]), ""],
        ["Jaccard, all nodes", cell(result["jaccard"]), cell(result["chance"])],
        ["Jaccard, nodes with a partner", cell(result["matched_jaccard"]), cell(result["matched_chance"])],
        ["rank correlation of shared effects", cell(result["rank_correlation"]), ""],
        ["equal signs of shared effects", cell(result["sign_agreement"]), ""],
        ["share of all features with a partner", cell(result["matched_share"]), cell(result["matched_share_chance"])],
    ]
    return Table("How far they agree", ["agreement", "value", "by chance"], rows)


def _cosines_table(counts: pd.DataFrame) -> Table:
    rows = [
        [f"{row['low']:.2f} to {row['high']:.2f}", cell(row["features"]), cell(row["in_circuit"])]
        for row in json_records(counts)
    ]
    return Table(_COSINES, ["cosine", "features", "the circuit's features"], rows)


def _sites_table(result: Mapping[str, Any]) -> Table:
    first, second = _names(result)
    columns = {
        "site": "site", "features": "features", "with a partner": "matched", "share": "share",
        "median cosine": "median_cosine", "by chance": "median_cosine_chance", first: ORIGINAL, second: REPLICATION,
        "shared nodes": "shared",
    }  # fmt: skip
    rows = [
        {**row, "site": short_site(row["site"]), "share": row["matched"] / row["features"]} for row in result["sites"]
    ]
    return records_table("", columns, rows)


def _guide(result: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "**The same feature.** Two features of a site's dictionaries count as the same if each is the other's nearest"
        f" neighbour by the cosine of their decoder directions, and the cosine is at least"
        f" {result['same_from_cosine']:g} (dotted line). The error nodes of a site are the same. Every other node"
        " exists with its own dictionaries only.",
        "**Two questions.** Do both dictionaries have the circuit's features? Compare the share of the circuit's"
        " features with a partner to that of all features. And where both have them, does discovery find them both"
        " times? See Jaccard's index of the nodes with a partner.",
        "**Chance.** Of circuits: what random ones would give that have as many features at each site and the same"
        " error nodes. Of features: what there is where the other dictionary is turned by a random rotation."
        " Each circuit has the size that its own discovery chose; where these differ much, Jaccard's index is small"
        " whatever they share.",
        f"**Effects.** Correlation is Spearman's. Signs are compared for the {result['n_signed']:,} shared nodes whose"
        " effect is not about zero.",
        "**What it does not say.** A circuit may restore as much as the other and be made of other features: then the"
        " behavior is explained in two ways, and no single feature should be taken for the model's own.",
    )


STUDIES.register(Replicate())

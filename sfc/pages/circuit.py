"""The page of a circuit: its picture to explore, its figures, and how to read them."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import networkx as nx
import pandas as pd

from sfc.behaviors.behavior import Words
from sfc.features.claims import CLEAR
from sfc.features.labels import NO_CARDS, said
from sfc.pages.blocks import (
    Block,
    Figure,
    Formula,
    Page,
    Pair,
    Section,
    Table,
    Tile,
    Tiles,
    Widget,
    cell,
    figure_cell,
    interval_cell,
    records_of,
    records_table,
)
from sfc.pages.explorable import explorable_html, nodes_html
from sfc.pages.graph import circuit_figure, layers_figure, strongest_nodes
from sfc.pages.html import figure_html
from sfc.pages.proof import both_sides, curve_figure, proof_by_size, verdict
from sfc.pages.roles import role_blocks
from sfc.pages.style import signs, words_of
from sfc.pages.text import count_text, number_text, tokens_text

_LISTED_NODES, _DRAWN_NODES, _TOKENS = 30, 300, 5


def circuit_page(
    graph: nx.DiGraph,
    curve: pd.DataFrame,
    result: Mapping[str, Any],
    cards: Mapping[str, Any] = NO_CARDS,
    marked: Collection[str] = (),
    scores: pd.DataFrame | None = None,
    replies: pd.DataFrame | None = None,
) -> Page:
    """What there is to show of a circuit.

    Args:
        graph: the circuit; of the facts about it (`graph.graph`) `sites`, `method` and `effect_unit` are used, and
            where they are given `words`, `population`, `edge_weight`, `approximation`, `roles`, `fingerprint`,
            `created`, `command` and `versions`.
        curve: as `curve_figure` takes it.
        result: what `discover --json` prints: `preset`, `category`, `method` and the figures of the circuit.
        cards: what its features mean, as `sfc.features.cards` describes it.
        marked: nodes that are ringed: those that another circuit has as well.
        scores: of test prompts of both sides, in the `model` and with the `circuit` alone, and their `kind`.
        replies: see `sfc.circuits.proof.REPLY_COLUMNS`.
    """
    words, features = words_of(graph), cards["features"]
    listed = min(_LISTED_NODES, len(graph))
    nodes = _nodes_table(graph, features)
    picture = Widget(lambda: _picture(graph, curve, cards, marked), ("circuit.js",))
    checks = [block for block in (_approximation(graph), _roles(graph)) if block is not None]
    return Page(
        title=" · ".join(str(result[key]) for key in ("category", "method", "preset")),
        sentence=_sentence(graph, result, words),
        summary=[*verdict(result), _tiles(result, words)],
        sections=[
            *both_sides(scores, words),
            *proof_by_size(curve, len(graph), words),
            Section("", [picture]),
            Section("", role_blocks(graph, features)),
            Section("", [Pair(
                Figure("curve", lambda: curve_figure(curve, len(graph)), _curve_table(curve)),
                Figure("layers", lambda: layers_figure(graph, features), _layers_table(graph)),
            )]),
            Section("", [Pair(*checks)] if len(checks) == 2 else checks),
            Section("Every figure, test prompts", [
                _figures_table(result), *_replies(replies, words), *_sites(result),
            ]),
            Section(
                f"The {count_text(listed, 'node')} with the largest |effect|",
                [Widget(lambda: nodes_html(nodes), (), nodes)],
            ),
        ],
        guide=guide(graph, bool(features), words),
        findings=[
            ("nodes", cell(result.get("n_nodes"))),
            ("agreement", figure_cell(result, "agreement")),
            ("agreement, random dictionaries", cell(result.get("null_agreement"))),
            ("gap kept", figure_cell(result, "gap_kept")),
            ("faithfulness, means", figure_cell(result, "faithfulness")),
            ("completeness, normalised", figure_cell(result, "completeness_normalised")),
        ],
        methods=methods(words),
        limits=_limits(result),
        foot=_foot(graph, result),
    )  # fmt: skip


def _picture(graph: nx.DiGraph, curve: pd.DataFrame, cards: Mapping[str, Any], marked: Collection[str]) -> str:
    drawn = strongest_nodes(graph, _DRAWN_NODES)
    figure = figure_html("circuit", circuit_figure(graph, _DRAWN_NODES, cards["features"], marked))
    return explorable_html(figure, graph, drawn, curve, cards)


def _sentence(graph: nx.DiGraph, result: Mapping[str, Any], words: Words) -> str:
    kinds = pd.Series([data["kind"] for _, data in graph.nodes(data=True)], dtype=str).value_counts()
    named = {"feature": "SAE feature", "error": "error node", "skip": "skip connection", "head": "head", "mlp": "MLP"}
    parts = (
        " and ".join(count_text(int(count), named.get(str(kind), str(kind))) for kind, count in kinds.items())
        or "no node"
    )
    against = f" against {graph.graph['baseline']}" if graph.graph.get("baseline") else ""
    return (
        f"{parts}, joined by {count_text(graph.number_of_edges(), 'edge')}: the circuit that {result['method']} found"
        f" behind {words.behind} ({words.group} {result['category']},"
        f" {graph.graph.get('population', words.positive)} prompts{against}, preset {result['preset']})."
        " All scores are from the test split, which discovery never saw."
    )


def _tiles(result: Mapping[str, Any], words: Words) -> Tiles:
    """The figures that matter most, each with its interval; what was not measured is left out."""

    def tile(title: str, name: str, text: str) -> Tile:
        low, high = result.get(f"{name}_low"), result.get(f"{name}_high")
        told = text if low is None or high is None else f"{interval_cell(low, high)} · {text}"
        return Tile(title, cell(result.get(name)), told)

    chance = "" if result.get("p_value") is None else f" · p = {result['p_value']:.2g}"
    by_pairs = [
        tile("agreement", "agreement", "with the model, pair by pair"),
        tile(f"recovered, {words.positive}", "recovered_toxic", "of what sets prompts and counterfactuals apart"),
        tile(f"recovered, {words.negative}", "recovered_safe", "the other way round"),
        tile("random dictionaries", "null_agreement", f"agreement by the same method{chance}"),
        tile("all features", "all_features_recovered", "recovered, the errors ablated: the limit"),
    ]
    by_sides = [
        tile("gap kept", "gap_kept", "between the sides, means ablated"),
        tile("separation", "separation", f"of the sides; the model's is {cell(result.get('separation_model'))}"),
        tile("prompt-free", "prompt_free", "faithfulness left where no prompt can enter"),
    ]
    return Tiles(
        [
            *(by_pairs if result.get("agreement") is not None else []),
            *(by_sides if result.get("separation") is not None else []),
            tile("faithfulness", "faithfulness", "score restored"),
            tile("completeness, normalised", "completeness_normalised", "score left without it"),
            Tile("nodes", cell(result.get("n_nodes")), f"{cell(result.get('n_errors', 0))} of them errors"),
            Tile("edges", cell(result.get("n_edges")), "between its nodes"),
        ]
    )


_FIGURES = {
    "F(M), mean score of the model": "f_model",
    "F(C), the circuit alone": "f_circuit",
    "F(M\\C), all but the circuit": "f_complement",
    "F(0), everything ablated": "f_empty",
    "completeness, as published": "completeness",
    "faithfulness of random circuits": "random_faithfulness",
    "completeness, normalised, of random circuits": "random_completeness_normalised",
    "KL recovered, positive side": "kl_recovered_toxic",
    "KL recovered, negative side": "kl_recovered_safe",
    "KL(M to M\\C) on the negative side, nats": "kl_without_safe",
    "agreement, rotated dictionaries": "rotated_agreement",
    "p, against null dictionaries": "p_value",
    "share of effects that flow through errors": "error_share",
    "CPR": "cpr",
    "CPR, sizes on a logarithmic axis": "cpr_log",
    "CMD": "cmd",
    "CMD, sizes on a logarithmic axis": "cmd_log",
    "overlap of two halves of the prompts": "halves_jaccard",
    "overlap of halves, by chance": "halves_chance",
    "faithfulness of the edges drawn": "edge_faithfulness",
}
_BASE_FIGURES = {
    "F(base)": "f_base", "F(base with the circuit)": "f_base_with_circuit", "F(base with all nodes)": "f_base_with_all",
}  # fmt: skip


def _figures_table(result: Mapping[str, Any]) -> Table:
    """What the tiles do not show."""
    rows = [(name, figure_cell(result, field)) for name, field in _FIGURES.items() if result.get(field) is not None]
    if base := result.get("base"):
        rows += [(name, cell(base[field])) for name, field in _BASE_FIGURES.items()]
        rows += [(f"nodes: {change}", cell(count)) for change, count in base["changes"].items()]
    return Table("", ("figure", "value (95 %)"), rows)


def _replies(replies: pd.DataFrame | None, words: Words) -> list[Block]:
    """How many replies show the behavior, by kind of prompt and by what is ablated."""
    if replies is None or replies.empty:
        return []
    counts = replies.pivot(index="kind", columns="under", values="refused").reindex(replies["kind"].unique())
    n = replies.groupby("kind")["n"].first()
    columns = ("model", "circuit", "without", "everything ablated")
    rows = [(str(kind), cell(int(n[kind])), *(cell(int(counts[c][kind])) for c in columns)) for kind in counts.index]
    titles = ("prompts", "answered", "the model", "the circuit alone", "without the circuit", "everything ablated")
    return [Table(f"Replies that {words.acts}", titles, rows)]


def _sites(result: Mapping[str, Any]) -> list[Block]:
    """What each site is worth alone, where that was measured."""
    alone, nodes = result.get("single_site_faithfulness", {}), result.get("nodes_per_site", {})
    rows = [(site, cell(nodes.get(site)), cell(value)) for site, value in alone.items()]
    columns = ("site", "nodes of the circuit", "faithfulness of as many nodes there")
    return [Table("One site alone", columns, rows)] if rows else []


def _curve_table(curve: pd.DataFrame) -> Table:
    fields = {
        "nodes": "size", "faithfulness": "faithfulness", "from": "faithfulness_low", "to": "faithfulness_high",
        "on discovery prompts": "on_discovery", "completeness, normalised": "completeness_normalised",
        "random circuits": "random_faithfulness", "random from": "random_low", "random to": "random_high",
    }  # fmt: skip
    present = {title: field for title, field in fields.items() if field in curve}
    return records_table("Evaluation by circuit size", present, records_of(curve))


def _layers_table(graph: nx.DiGraph) -> Table:
    layers = pd.Series([data["layer"] for _, data in graph.nodes(data=True)], dtype=int).value_counts().sort_index()
    return Table("Nodes per layer", ("layer", "nodes"), [(str(layer), cell(int(n))) for layer, n in layers.items()])


def _approximation(graph: nx.DiGraph) -> Table | None:
    """How the method's effects compare with exact ones, one node at a time."""
    check = graph.graph.get("approximation_check")
    if not check:
        return None
    rows = []
    for group, name in (("top", "nodes of largest |effect|"), ("random", "random active nodes")):
        figures = check[group]
        signs_text = (
            f"{number_text(figures['sign_agreement'])} of {figures['n_signed']:,}"
            if figures["n_signed"]
            else "none to compare"
        )
        correlation = number_text(figures["rank_correlation"], signed=True)
        rows.append((f"{figures['n_nodes']:,} {name}", correlation, signs_text))
    rows += [
        (f"worst: {miss['node']}", number_text(miss["fast"], signed=True), number_text(miss["exact"], signed=True))
        for miss in check["worst_misses"]
    ]
    title = (
        f"Effects against exact ablation of single nodes, means over {check['n_prompts']:,} discovery prompts; signs"
        f" are compared where the exact effect exceeds {number_text(check['noise_floor'])} nats"
    )
    return Table(title, ("measured", "rank correlation, or effect", "equal signs, or exact effect"), rows)


def _roles(graph: nx.DiGraph) -> Table | None:
    """Where in the prompt the circuit's nodes matter; None where its method does not say."""
    roles = graph.graph.get("roles")
    if not roles:
        return None
    parts = {key: [data[key] for _, data in graph.nodes(data=True) if key in data] for key in roles}
    # fsum, so that the order of the nodes does not matter.
    sizes = {key: math.fsum(map(abs, values)) for key, values in parts.items()}
    total = math.fsum(sizes.values())
    rows = [
        (
            name,
            number_text(math.fsum(parts[key]), signed=True),
            f"{100 * sizes[key] / total:.0f} %" if total > 0 else cell(None),
        )
        for key, name in roles.items()
    ]
    return Table("Where in the prompt", ("tokens", "sum of effects", "share of |effects|"), rows)


def _nodes_table(graph: nx.DiGraph, cards: Mapping[str, Any]) -> Table:
    """The nodes with the largest |effect|, a row each; columns that no node has are left out."""
    names = strongest_nodes(graph, _LISTED_NODES)
    nodes = {name: {**graph.nodes[name], **said(cards.get(name, {}))} for name in names}
    columns = {
        "label": ("label", str),
        "its AUROC": ("score", cell),
        "explanation": ("explanation", str),
        "layer": ("layer", str),
        "effect": ("effect", lambda value: number_text(value, signed=True)),
        "mean |effect|": ("absolute_effect", number_text),
        "p": ("p_value", number_text),
        "q": ("q_value", number_text),
        "raises the tokens": ("raises", lambda tokens: tokens_text(tokens, _TOKENS)),
        "lowers the tokens": ("lowers", lambda tokens: tokens_text(tokens, _TOKENS)),
    }
    columns = {title: what for title, what in columns.items() if any(what[0] in node for node in nodes.values())}
    rows = [
        [name, *(text(node[key]) if key in node else "" for key, text in columns.values())]
        for name, node in nodes.items()
    ]
    return Table("", ["node", *columns], rows, ("label", "explanation", "raises the tokens", "lowers the tokens"))


def _limits(result: Mapping[str, Any]) -> Sequence[str]:
    where, limits = f"The circuit of {result.get('category')} ({result.get('method')})", []
    if result.get("faithfulness") is None:
        limits.append(f"{where}: F(M) - F(0) is too small to divide by, so that nothing is said of its faithfulness.")
    if (share := result.get("error_share")) is not None:
        limits.append(
            f"{where}: {cell(share)} of the absolute effects flow through what the autoencoders miss, which no feature"
            " explains."
        )
    return limits


def _foot(graph: nx.DiGraph, result: Mapping[str, Any]) -> Sequence[str]:
    """Where the circuit comes from, as far as the circuit or else the result says."""
    facts = {**result, **graph.graph}
    lines = [f"{key}: `{facts[key]}`" for key in ("fingerprint", "created", "command") if facts.get(key)]
    if facts.get("versions"):
        lines.append("made with " + ", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    return lines


def guide(graph: nx.DiGraph, has_cards: bool, words: Words) -> Sequence[str]:
    """A paragraph for each thing on the page of a circuit, in the page's own Markdown."""
    positive, negative, _ = signs(graph)
    unit = graph.graph.get("effect_unit") or "no unit given"
    weight = f" ({graph.graph['edge_weight']})" if graph.graph.get("edge_weight") else ""
    colours = (
        f"Colours say what a feature fires on: orange, peaks on average twice as high on the {words.group}'s"
        f" {words.positive} prompts as on its {words.negative} ones; blue, the reverse; grey, neither."
        if has_cards
        else f"Orange: {positive.words}. Blue: {negative.words}."
    )
    return (
        f"**Nodes.** A column is a layer. Circles are features of its sparse autoencoder (SAE), diamonds stand for "
        f"what the SAE misses. The area is the size of the effect ({unit}). Above the line: "
        f"{positive.words}. Below it: {negative.words}. The strongest stand next to the line. {colours}",
        f"**Edges.** A line joins two nodes, drawn thicker and darker with its weight{weight}, green where it is "
        "positive and purple where it is negative. Point half-way along a line to see what it joins.",
        "**Positions.** Where effects are known by position, a second picture has a row for the prompt's own tokens "
        "and one for each token of the template after it, counted from the end. A circle is what the circuit's nodes "
        "of a layer do there; a line what passes along the edges drawn from the one's tokens to the other's. Nothing "
        "passes back: attention looks at earlier tokens only.",
        "**Exploring.** The slider shows the circuit's best n nodes, and moves the marker on the curve. Click on a "
        "node, or walk with the arrow keys, to see what it is joined to and its card: the prompts on which it fires "
        "most, shaded by its value, and the tokens it raises and lowers. Search for a node, a label or a token; click "
        "on the legend to hide a group; drag to zoom, double-click to return; Escape closes the card.",
        "**Labels** claim on what a feature fires: at one token of the template after the prompt, or at tokens of the "
        "text, the stronger, the more of what + joins holds. They are made on half of the prompts. The number behind a "
        "label is from the other half: how often the claim ranks a context in which the feature is strong above one in "
        f"which it is quiet (AUROC; 0.5 is chance). Below {CLEAR} a label is unclear. A reader's own have no number.",
        "**Does it decide?** A dot is a test prompt, at its score in the model and with the circuit alone: a circuit "
        "that decides as the model does lies on the diagonal, one that answers every prompt alike on a level line. An "
        "ablated node has the value that it has in the run of an equally long prompt of the other side, its "
        "*counterfactual*. **Recovered** is the share of the difference of scores that the circuit restores, 0 for any "
        "circuit that cannot hear the prompt; **agreement**, 1 − Σ(s_C − s_M)² / Σ(s_0 − s_M)², counts every pair. "
        "**Null dictionaries** are random or turned about: the same method finds a circuit in them that is worth as "
        "much as the method makes of nothing.",
        "**Faithfulness** = (F(C) − F(0)) / (F(M) − F(0)), as published, by mean ablation. F is the mean score: of the "
        "full model M, of the circuit C alone, of the model without it (M\\C), and with everything ablated (0). 1 "
        f"means that the mean score of {words.positive} prompts comes back in full. A circuit that gives every prompt "
        "that score has 1 as well, whatever the prompt says: **gap kept** and **separation** compare the sides, and "
        "**prompt-free** is the faithfulness that is left where nothing of the prompt can enter.",
        "**Completeness**, normalised = (F(M\\C) − F(0)) / (F(M) − F(0)). 0 means that without the circuit nothing "
        "is left of the behaviour. As published it is F(M\\C) / F(M), which depends on where the score's zero lies. "
        "Where a denominator is too small to divide by, a figure is not measurable.",
    )


def methods(words: Words) -> Sequence[Formula]:
    """The formulas."""
    return (
        Formula(words.score[:1].upper() + words.score[1:] + " s", words.score_formula),
        Formula(
            "Ablation",
            "x <- sum over kept features f_i d_i + sum over the others f_i(c) d_i + b + e(c), c the counterfactual"
            " (by means: f_ref and e_ref, averaged over reference prompts at the same place of the template)",
        ),
        Formula("Agreement", "1 - sum (s_C - s_M)^2 / sum (s_0 - s_M)^2 over test pairs, both directions"),
        Formula("Effect of a feature by attribution", "sum over positions (ds/dx . d_i)(f_i - f_ref_i)"),
        Formula(
            "F(M), F(C), F(M\\C), F(0)",
            "mean s of the full model; with all but the circuit ablated; with the circuit ablated; with everything"
            " ablated",
        ),
        Formula("Faithfulness (Marks et al. 2024)", "(F(C) - F(0)) / (F(M) - F(0))"),
        Formula(
            "CPR, CMD (Mueller et al. 2025)",
            "area under the curve of faithfulness by size, nodes ranked by effect; area between it and 1, by |effect|",
        ),
        Formula("Completeness, normalised", "(F(M\\C) - F(0)) / (F(M) - F(0)); as published, F(M\\C) / F(M)"),
    )

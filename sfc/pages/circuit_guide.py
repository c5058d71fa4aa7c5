"""How to read a circuit's page: what each thing on it is, and the formulas behind the figures."""

from collections.abc import Sequence

import networkx as nx

from sfc.behaviors.behavior import Words
from sfc.features.claims import CLEAR
from sfc.pages.blocks import Formula
from sfc.pages.style import signs


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

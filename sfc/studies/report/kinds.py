"""What there is to say of a kind of artifact.

Circuits with their evaluation, and the autoencoders that they are made of.

Activation patching and direct logit attribution: heat maps of layers and heads, and components with intervals.

Behaviour, the refusal direction with its probe, prompt formats, and whatever else left figures behind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx
import pandas as pd

from sfc.core.artifacts import read_json
from sfc.pages import blocks
from sfc.pages.blocks import Block, Formula, Paragraph, Table, cell, interval_cell
from sfc.pages.curve import curve_figure
from sfc.pages.graph import circuit_figure, layers_figure, strongest_nodes
from sfc.pages.text import tokens_text
from sfc.studies.formats.page import violins
from sfc.studies.logits.page import heads_figure as written_heads_figure
from sfc.studies.patch.page import agreement_figure, cumulative_figure, heads_figure, positions_figure
from sfc.studies.probe.page import accuracy_figure, separation_figure
from sfc.studies.report.found import Found


def Figure(figure, table=None):
    return blocks.Figure("figure", lambda: figure, table)


class Kind(NamedTuple):
    """How artifacts of one kind are reported."""

    title: Callable[[Found], str]
    summary: Callable[[Found], list[tuple[str, str]]]
    """lines of the summary table: a figure's name and its value"""
    blocks: Callable[[Found], list[Block]]
    methods: Sequence[Formula] = ()
    limits: Callable[[Found], list[str]] = lambda found: []


def records_table(title: str, columns: dict[str, str], records: Sequence[dict[str, Any]]) -> Table:
    """A table of some fields of records.

    Args:
        columns: for each title the field under it.
    """
    return Table(title, list(columns), [[cell(record.get(field)) for field in columns.values()] for record in records])


def grid_cell(value: float) -> str:
    """A value in a heat map, to three decimals, so that columns line up."""
    return cell(value) if value != value else f"{value + 0.0:.3f}".replace("-", "−").replace("−0.000", "0.000")


def grid_table(title: str, corner: str, cells: dict[tuple[int, Any], str]) -> Table:
    """A heat map as a table, layers downwards; what a cell has not is blank.

    Args:
        cells: text by layer and column.
    """
    layers, across = sorted({layer for layer, _ in cells}), list(dict.fromkeys(column for _, column in cells))
    rows = [[str(layer), *(cells.get((layer, column), "") for column in across)] for layer in layers]
    return Table(title, [corner, *map(str, across)], rows)


_NODES, _TOKENS = 20, 5
_FIGURES = {
    "nodes": "n_nodes",
    "edges": "n_edges",
    "faithfulness": "faithfulness",
    "completeness, as published": "completeness",
    "completeness, normalised": "completeness_normalised",
    "faithfulness of random circuits": "random_faithfulness",
    "F(M), nats": "f_model",
    "F(C), nats": "f_circuit",
    "F(M\\C), nats": "f_complement",
    "F(0), nats": "f_empty",
    "error share": "error_share",
    "replies that refuse": "refused_model",
    "replies that refuse, the circuit alone": "refused_circuit",
    "replies that refuse, without the circuit": "refused_complement",
    "p, against random circuits": "p_value",
    "faithfulness of the last site alone": "last_site_faithfulness",
    "CPR": "cpr",
    "CPR, sizes on a logarithmic axis": "cpr_log",
    "CMD": "cmd",
    "CMD, sizes on a logarithmic axis": "cmd_log",
}
_CURVE = {
    "nodes": "size",
    "faithfulness": "faithfulness",
    "from": "faithfulness_low",
    "to": "faithfulness_high",
    "on discovery prompts": "discovery_faithfulness",
    "completeness, normalised": "completeness_normalised",
    "random circuits": "random_faithfulness",
}


def _summary(found: Found) -> list[tuple[str, str]]:
    names = ("nodes", "faithfulness", "completeness, normalised", "faithfulness of random circuits")
    return [(name, cell(found.result.get(_FIGURES[name]))) for name in names]


def _blocks(found: Found) -> list[Block]:
    graph = nx.node_link_graph(read_json(found.folder / "circuit.json"), edges="edges")
    curve, result = found.table("curve.csv"), found.result
    figures = [(name, cell(result[field]), _ends(result, field)) for name, field in _FIGURES.items() if field in result]
    blocks: list[Block] = [
        Paragraph(_about(graph)),
        Table("The reported circuit, test prompts", ("figure", "value", "95 %"), figures),
        *_sites(result),
        Figure(circuit_figure(graph)),
        Figure(curve_figure(curve, len(graph)), _curve_table(curve)),
        Figure(layers_figure(graph), _layers_table(graph)),
        _nodes_table(graph),
    ]
    return [*blocks, *_audit(graph)]


def _ends(result: Mapping[str, Any], field: str) -> str:
    low, high = result.get(f"{field}_low"), result.get(f"{field}_high")
    return "" if low is None or high is None else interval_cell(low, high)


def _sites(result: Mapping[str, Any]) -> list[Block]:
    """What each site is worth alone, where that was measured."""
    alone, nodes = result.get("single_site_faithfulness", {}), result.get("nodes_per_site", {})
    rows = [(site, cell(nodes.get(site)), cell(value)) for site, value in alone.items()]
    columns = ("site", "nodes of the circuit", "faithfulness of as many nodes there")
    return [Table("One site alone", columns, rows)] if rows else []


def _about(graph: nx.DiGraph) -> str:
    facts = graph.graph
    return (
        f"Found by {facts.get('method', 'a method not named')} on {facts.get('population', '')} prompts; ablated nodes "
        f"are set to {facts.get('reference', 'their reference')}; edges by {facts.get('edges', 'a method not named')}. "
        "All figures are from the test split, which discovery never saw."
    )


def _curve_table(curve: pd.DataFrame) -> Table:
    columns = {title: field for title, field in _CURVE.items() if field in curve}
    table = records_table("Evaluation by circuit size", columns, curve.to_dict("records"))  # pyright: ignore
    bands = [interval_cell(row["random_low"], row["random_high"]) for row in curve.to_dict("records")]
    rows = [[*row, band] for row, band in zip(table.rows, bands, strict=True)]
    return Table(table.title, [*table.columns, "of random circuits, from to"], rows)


def _layers_table(graph: nx.DiGraph) -> Table:
    layers = pd.Series([data["layer"] for _, data in graph.nodes(data=True)], dtype=int).value_counts().sort_index()
    return Table("Nodes per layer", ("layer", "nodes"), [(str(layer), cell(int(n))) for layer, n in layers.items()])


def _nodes_table(graph: nx.DiGraph) -> Table:
    rows = []
    for name in strongest_nodes(graph, _NODES):
        node = graph.nodes[name]
        tokens = [tokens_text(node.get(side, ()), _TOKENS) for side in ("raises", "lowers")]
        rows.append((name, cell(node["effect"]), cell(node.get("absolute_effect")), *tokens))
    columns = ("node", f"effect ({graph.graph.get('effect_unit', '')})", "mean |effect|", "raises", "lowers")
    return Table("The nodes with the largest |effect|", columns, rows)


def _audit(graph: nx.DiGraph) -> list[Block]:
    audit = graph.graph.get("audit") or {}
    rows = [
        (name, *(cell(audit[group][field]) for field in ("n_nodes", "rank_correlation", "sign_agreement")))
        for group, name in (("top", "strongest nodes"), ("random", "random active nodes"))
        if group in audit
    ]
    columns = ("nodes", "n", "rank correlation", "same sign")
    return [Table("Effects held against exact ones, one node at a time", columns, rows)] if rows else []


def _limits(found: Found) -> list[str]:
    result, where = found.result, f"The circuit of {found.result.get('category')} ({found.result.get('method')})"
    limits = []
    if result.get("faithfulness") is None:
        limits.append(f"{where}: F(M) - F(0) is too small to divide by, so that nothing is said of its faithfulness.")
    if (share := result.get("error_share")) is not None:
        limits.append(
            f"{where}: {cell(share)} of the absolute effects flow through what the autoencoders miss, which no feature"
            " explains."
        )
    return limits


CIRCUIT = Kind(
    title=lambda found: f"Circuit: {found.result['category']}, {found.result['method']}",
    summary=_summary,
    blocks=_blocks,
    limits=_limits,
    methods=(
        Formula(
            "Refusal score s (Arditi et al. 2024)",
            "logsumexp(log p over R) - logsumexp(log p over all others), R"
            " the tokens that open a refusal, at the last prompt position",
        ),
        Formula(
            "Ablation",
            "x <- x_hat(f_ref) + sum over kept features (f_i - f_ref_i) d_i + error, f_ref the mean"
            " over reference prompts at the same place of the template",
        ),
        Formula("Effect of a feature by attribution", "sum over positions (ds/dx . d_i)(f_i - f_ref_i)"),
        Formula(
            "F(M), F(C), F(M\\C), F(0)",
            "mean s of the full model; with all but the circuit ablated; with the"
            " circuit ablated; with everything ablated",
        ),
        Formula("Faithfulness (Marks et al. 2024)", "(F(C) - F(0)) / (F(M) - F(0))"),
        Formula(
            "CPR, CMD (Mueller et al. 2025)",
            "area under the curve of faithfulness by size, nodes ranked by effect; area between it and 1, by |effect|",
        ),
        Formula("Completeness, normalised", "(F(M\\C) - F(0)) / (F(M) - F(0)); as published, F(M\\C) / F(M)"),
    ),
)

_QUALITY = {
    "site": "site", "variance unexplained": "fvu", "cosine": "cosine", "L0": "l0", "dead": "dead_share",
    "loss recovered": "loss_recovered", "score recovered": "score_recovered",
}  # fmt: skip


def _quality(found: Found) -> Table:
    quality = found.table("quality.csv")
    of_all = quality[quality["role"] == "all"].to_dict("records")
    return records_table("Held-out rows", _QUALITY, of_all)  # pyright: ignore[reportArgumentType]


SAES = Kind(
    title=lambda found: "Sparse autoencoders",
    summary=lambda found: [("variance unexplained", cell(found.manifest.get("variance_unexplained")))],
    blocks=lambda found: [_quality(found)],
    methods=(
        Formula("Variance unexplained", "sum |x - x_hat|^2 / sum |x - mean x|^2, over held-out rows"),
        Formula("Recovered", "share of what ablating the site to its mean costs that the reconstruction wins back"),
    ),
)


_FEW_PAIRS = 10
_HEADS = 15
_DIRECTIONS = {"denoise": "Denoising", "noise": "Noising"}


def _patching_summary(found: Found) -> list[tuple[str, str]]:
    result = found.result
    names = {"pairs used": "n_pairs", "components": "n_components", "critical components": "n_critical"}
    rows = [(name, cell(result[field])) for name, field in names.items()]
    for row in result["critical"]:
        if row["rank"] == 1 and row["kind"] == "head":
            words = f"{cell(row['effect'])} ({interval_cell(row['low'], row['high'])})"
            rows.append((f"{_DIRECTIONS[row['direction']]}: effect of {row['component']}", words))
    return rows


def _patching_blocks(found: Found) -> list[Block]:
    result, effects = found.result, found.table("effects.csv")
    single, ranges, sets = effects[~effects["is_range"]], effects[effects["is_range"]], list(result["n_pairs_at"])
    blocks: list[Block] = [Paragraph(_pairs(result)), _critical(result)]
    for direction in map(str, single["direction"].unique()):
        of_direction = single[single["direction"] == direction]
        heads, others = of_direction[of_direction["kind"] == "head"], of_direction[of_direction["kind"] != "head"]
        title = _DIRECTIONS.get(direction, direction)
        if len(others):
            columns = {
                (int(row["layer"]), f"{row['kind']} {row['positions']}"): grid_cell(row["effect"])
                for row in _rows(others)
            }
            table = grid_table(f"{title}: effects by layer and positions", "layer", columns)
            blocks.append(Figure(positions_figure(single, direction, sets), table))
        if len(heads):
            figure = heads_figure(single, direction, sets)
            tables = [_heads(heads[heads["positions"] == name], f"{title}: heads at {name}") for name in sets]
            blocks += [Figure(figure, tables[0]), *(table for table in tables[1:])]
    if len(ranges):
        blocks.append(Figure(cumulative_figure(ranges)))
    names = {"direction": "direction", "kind": "kind", "n": "n", "r": "pearson", "rank correlation": "spearman",
             "mean |difference|": "mean_difference", "best": "best", "of these shared": "shared"}  # fmt: skip
    table = records_table("First-order effects against exact ones", names, result["agreement"])
    return [*blocks, Figure(agreement_figure(single, result["agreement"]), table)]


def _pairs(result: Any) -> str:
    lost = "; ".join(f"{cell(count)}: {reason}" for reason, count in result["lost"].items()) or "none"
    chosen = {
        "behaviour": "The clean prompt of each was refused and the corrupted one was not, by the judged replies.",
        "score": "They were chosen by the refusal score alone, not by what the model says.",
    }[result["require"]]
    return (
        f"{cell(result['n_pairs'])} of {cell(result['n_tried'])} pairs ({result['pairs']}) were used; lost: {lost}. "
        f"{chosen} Mean score of the clean prompts {cell(result['clean_score'])}, of the corrupted ones"
        f" {cell(result['corrupted_score'])} nats."
    )


def _critical(result: Any) -> Table:
    rows = [
        (
            row["component"],
            row["direction"],
            row["positions"],
            cell(row["n_pairs"]),
            cell(row["effect"]),
            interval_cell(row["low"], row["high"]),
            cell(row["q_value"]),
            cell(row["first_order"]),
        )
        for row in result["critical"]
    ]
    columns = ("component", "direction", "positions", "pairs", "effect", "95 %", "q", "first order")
    return Table("Critical components (q of at most 0.05), the strongest of each kind", columns, rows)


def _heads(rows: pd.DataFrame, title: str) -> Table:
    return grid_table(
        title, "layer \\ head", {(row["layer"], int(row["head"])): grid_cell(row["effect"]) for row in _rows(rows)}
    )


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    return table.sort_values(["layer", "head"]).to_dict("records")  # pyright: ignore[reportReturnType]


def _patching_limits(found: Found) -> list[str]:
    result, limits = found.result, []
    if result["n_pairs"] < _FEW_PAIRS:
        limits.append(f"Patching rests on {cell(result['n_pairs'])} pairs: with so few no p-value can be small.")
    if result["require"] == "score":
        limits.append("Patching used pairs chosen by the score: it is about the score and not about behaviour.")
    return limits


PATCHING = Kind(
    title=lambda found: f"Activation patching: {found.result['pairs']}",
    summary=_patching_summary,
    blocks=_patching_blocks,
    limits=_patching_limits,
    methods=(
        Formula(
            "Effect of a patch",
            "mean(s_patched - s_base) / mean(s_source - s_base); denoising puts the clean run"
            " into the corrupted one, noising the corrupted into the clean one",
        ),
        Formula("First order (attribution patching)", "ds/dx at the base run . (x_source - x_base)"),
        Formula(
            "p, q",
            "sign-flip permutation test of the mean change; false discovery rate over all components of a"
            " kind and direction (Benjamini and Hochberg 1995)",
        ),
        Formula("Intervals", "95 % percentiles over pairs drawn again, numerator and denominator together"),
    ),
)


def _logits_summary(found: Found) -> list[tuple[str, str]]:
    result = found.result
    names = {
        "AUROC, toxic against safe": "auroc",
        "correlation with the score": "score_correlation",
        "heads": "n_heads",
    }
    roles = [(f"{role} heads", cell(len(result[role]))) for role in ("guardrail", "compliance")]
    return [*((name, cell(result[field])) for name, field in names.items()), *roles]


def _logits_blocks(found: Found) -> list[Block]:
    result, components = found.result, found.table("components.csv")
    difference, tokens = result["logit_difference"], result["tokens"]
    rows = [
        (side, cell(difference[side]["mean"]), interval_cell(difference[side]["low"], difference[side]["high"]))
        for side in ("toxic", "safe")
    ]
    heads = components[components["kind"] == "head"]
    cells = {(int(row["layer"]), int(row["head"])): grid_cell(row["difference"]) for row in _rows(heads)}
    strongest = [
        (
            row["component"],
            row["role"],
            cell(row["toxic_mean"]),
            interval_cell(row["toxic_low"], row["toxic_high"]),
            cell(row["safe_mean"]),
            cell(row["difference"]),
            cell(row["q_value"]),
        )
        for row in result["heads"]
    ]
    columns = ("head", "role", "toxic, nats", "95 %", "safe", "toxic - safe", "q")
    return [
        Paragraph(
            f"The mean logit of {', '.join(map(repr, tokens['refusal']))} minus that of"
            f" {', '.join(map(repr, tokens['against']))}. The parts miss their sum by"
            f" {cell(result['reconstruction_error'])} of the absolute terms at most."
        ),
        Table("Logit difference, nats", ("prompts", "mean", "95 %"), rows),
        Figure(written_heads_figure(components), grid_table("Heads: toxic - safe, nats", "layer \\ head", cells)),
        Table("The heads that tell toxic from safe prompts best", columns, strongest),
    ]


LOGITS = Kind(
    title=lambda found: f"Direct logit attribution: {found.result['category']}",
    summary=_logits_summary,
    blocks=_logits_blocks,
    methods=(
        Formula(
            "Direct logit attribution",
            "contribution = (output / norm scale, held) . (mean W_U of refusal tokens -"
            " mean W_U of tokens against); all contributions sum to the logit difference",
        ),
        Formula(
            "Guardrail head",
            "contribution to toxic prompts above 0 (95 %) and larger than to safe ones (Welch's t,"
            " q < 0.05); compliance head: the mirror image",
        ),
    ),
)


_MOST_ROWS = 40


def _rates(found: Found) -> Table:
    rows = [
        (
            row["category"],
            row["label"],
            cell(row["n"]),
            cell(row["refusals"]),
            cell(row["rate"]),
            interval_cell(row["low"], row["high"]),
        )
        for row in found.table("groups.csv").to_dict("records")
    ]
    return Table("Judged refusals", ("category", "label", "prompts", "refusals", "rate", "95 %"), rows)


BEHAVIOUR = Kind(
    title=lambda found: f"Behaviour: {found.name.partition('-')[2]}",
    summary=lambda found: [("AUROC of the score against judged refusals", cell(found.result.get("auroc")))],
    blocks=lambda found: [_rates(found)],
    methods=(
        Formula(
            "Refusal", "a greedy reply whose first words refuse, by a judge of phrases; never the data set's label"
        ),
        Formula("Interval of a rate", "Wilson 1927, 95 %"),
    ),
    limits=lambda found: ["Refusals are judged by phrases that open a reply; a refusal in other words is missed."],
)

_LAYERS = {
    "layer": "layer", "norm": "norm", "separation": "separation", "from": "separation_low", "to": "separation_high",
    "AUROC": "auroc", "probe": "accuracy", "shuffled": "control", "shuffled, 95th percentile": "control_high",
    "p": "p_value",
}  # fmt: skip


def _probe_summary(found: Found) -> list[tuple[str, str]]:
    best = max(found.result["layers"], key=lambda row: (row["separation"] is not None, row["separation"]))
    place = f"layer {best['layer']}, where separation is largest"
    names = {"separation": "separation", "probe accuracy": "accuracy", "with shuffled labels": "control"}
    return [(f"{name}, {place}", cell(best[field])) for name, field in names.items()]


def _probe_blocks(found: Found) -> list[Block]:
    layers = found.table("layers.csv")
    table = records_table("Every layer", _LAYERS, layers.to_dict("records"))  # pyright: ignore[reportArgumentType]
    return [Figure(separation_figure(layers), table), Figure(accuracy_figure(layers))]


PROBE = Kind(
    title=lambda found: f"Refusal direction and probe: {found.result['category']}",
    summary=_probe_summary,
    blocks=_probe_blocks,
    methods=(
        Formula(
            "Refusal direction (Arditi et al. 2024)",
            "mean over toxic - mean over safe discovery prompts, residual stream at the last position",
        ),
        Formula("Separation", "(mean of toxic - mean of safe projections) / pooled standard deviation, test prompts"),
        Formula(
            "Probe",
            "ridge regression on the standardised residual stream, accuracy by cross-validation; the"
            " control is the same with labels shuffled within folds (Hewitt and Liang 2019)",
        ),
    ),
    limits=lambda found: ["That a probe can read a layer does not mean that the model reads it."],
)

_FORMATS = {
    "format": "format", "refuse - comply, nats": "mean", "from": "low", "to": "high", "harmless": "harmless_mean",
    "refused": "refused", "AUROC": "auroc", "z": "z_mean",
}  # fmt: skip
_PAIRS = {
    "first": "first", "second": "second", "z first - second": "mean_difference", "p": "p_value", "p, Holm": "p_holm",
    "rank-biserial r": "rank_biserial",
}  # fmt: skip


def _formats_blocks(found: Found) -> list[Block]:
    result = found.result
    test = records_table("Friedman's test of z", {"chi2": "chi2", "degrees of freedom": "degrees", "p": "p_value",
                                                  "Kendall's W": "kendall_w"}, [result["friedman"]])  # fmt: skip
    return [
        Figure(
            violins(found.table("scores.csv"), "z", "Standardised within each format", "z"),
            records_table("Harmful instructions by format", _FORMATS, result["formats"]),
        ),
        test,
        records_table("Pairs of formats (Wilcoxon)", _PAIRS, result["pairs"]),
    ]


FORMATS = Kind(
    title=lambda found: f"Prompt formats: {found.result['prompts']}",
    summary=lambda found: [
        ("Friedman's p", cell(found.result["friedman"]["p_value"])),
        ("Kendall's W", cell(found.result["friedman"]["kendall_w"])),
    ],
    blocks=_formats_blocks,
    methods=(
        Formula(
            "z",
            "(logit difference - mean of its format) / standard deviation of its format, over harmful and"
            " harmless instructions",
        ),
        Formula("Tests", "Friedman 1937 over formats; Wilcoxon signed-rank between pairs of formats, Holm 1979"),
    ),
)


def _other_blocks(found: Found) -> list[Block]:
    """Every figure of a result: plain ones in one table, lists of records each in one of their own."""
    plain, tables = [], []
    for name, value in _flat(found.result):
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            fields = {str(field).replace("_", " "): str(field) for field in value[0]}
            tables.append(records_table(name.replace("_", " "), fields, value[:_MOST_ROWS]))
        elif isinstance(value, list):
            plain.append((name, ", ".join(map(cell, value[:_MOST_ROWS]))))
        else:
            plain.append((name, cell(value)))
    rows = [(name.replace("_", " "), value) for name, value in plain]
    return [Table("Figures", ("figure", "value"), rows) if rows else Paragraph("It left no figures."), *tables]


def _flat(result: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in result.items():
        if name in ("files", "seconds", "preset"):
            continue
        pairs += _flat(value, f"{before}{name}: ") if isinstance(value, Mapping) else [(f"{before}{name}", value)]
    return pairs


def _first_words(name: str) -> str:
    return f"{name[:1].upper()}{name[1:]}".replace("-", ": ", 1)


OTHER = Kind(title=lambda found: _first_words(found.name), summary=lambda found: [], blocks=_other_blocks)

REPLICATION = OTHER._replace(
    title=lambda found: (
        f"Replication with SAEs from another seed: {found.result['category']}, {found.result['method']}"
    ),
    summary=lambda found: [
        ("Jaccard, nodes of both circuits", cell(found.result["jaccard"])),
        ("by chance", cell(found.result["chance"])),
    ],
    methods=(
        Formula(
            "The same feature (after Paulo and Belrose 2025)",
            "mutual nearest neighbours by the cosine of decoder directions, of at least 0.7",
        ),
    ),
)

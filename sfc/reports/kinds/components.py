"""Activation patching and direct logit attribution: heat maps of layers and heads, and components with intervals."""

from typing import Any

import pandas as pd

from sfc.reports.blocks import Block, Figure, Formula, Paragraph, Table, cell, interval_cell
from sfc.reports.found import Found
from sfc.reports.kinds.kind import Kind, grid_cell, grid_table, records_table
from sfc.viewer.logits import heads_figure as written_heads_figure
from sfc.viewer.patching import agreement_figure, cumulative_figure, heads_figure, positions_figure

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

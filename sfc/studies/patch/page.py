"""The page of activation patching: heat maps of effects by layer and position, and by layer and head."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sfc.behaviors.behavior import Words
from sfc.pages.blocks import (
    Block,
    Figure,
    Formula,
    Page,
    Paragraph,
    Section,
    Table,
    Tile,
    Tiles,
    cell,
    estimate_cell,
    grid_table,
    records_table,
)
from sfc.pages.style import (
    BLUE,
    GREEN,
    INK,
    PINK,
    QUIET,
    Panel,
    axis,
    error_bars,
    heat_map,
    panels_figure,
    points,
    styled_figure,
)
from sfc.pages.text import hover_text, number_text
from sfc.studies.patch import CRITICAL_Q, FEW_PAIRS, Patching
from sfc.studies.study import Finished

_KINDS = {"resid": "residual stream", "attn": "attention output", "mlp": "MLP output", "head": "heads"}
_DIRECTIONS = {"denoise": "Denoising: clean into corrupted", "noise": "Noising: corrupted into clean"}
_COLOURS = dict(zip(_KINDS, (INK, GREEN, PINK, BLUE), strict=True))
_HEADS_A_ROW = 4
_LISTED = 5


def page(_study: Patching, finished: Finished) -> Page:
    """The page of a finished patching."""
    result, words, sets = finished.result, finished.words, list(finished.result["n_pairs_at"])
    effects = _in_order(finished.table("effects.csv"), sets)
    single, ranges = effects[~effects["is_range"]], effects[effects["is_range"]]
    of_ranges = Figure("ranges", lambda: cumulative_figure(ranges), _ranges_table(ranges))
    of_agreement = Figure("agreement", lambda: agreement_figure(single, result["agreement"]))
    return Page(
        title=f"Activation patching · {result['pairs']} · {result['preset']}",
        sentence=_sentence(result, words),
        summary=[_tiles(result, words), _critical(result), _agreement(result)],
        sections=[
            *(Section(_DIRECTIONS[name], _maps(single, name, sets)) for name in map(str, single["direction"].unique())),
            *([Section("All layers from the first to each at once", [of_ranges])] if len(ranges) else []),
            Section("Exact effects and attribution patching", [of_agreement]),
        ],
        guide=_guide(words),
        findings=_findings(result),
        methods=_METHODS,
        limits=_limits(result, words),
    )


def positions_figure(effects: pd.DataFrame, direction: str, sets: Sequence[str]) -> go.Figure:
    """One heat map per kind but heads: layers against position sets, in this order; the colour scale common to all."""
    rows = effects[(effects["direction"] == direction) & (effects["kind"] != "head")]
    kinds = [kind for kind in _KINDS if kind in set(rows["kind"])]
    panels = [
        Panel(
            _KINDS[kind],
            axis("positions", showgrid=False, type="category"),
            _layers_axis(rows, is_first=number == 0),
            [_heat_map(rows[rows["kind"] == kind], "positions", sets, _largest(rows))],
        )
        for number, kind in enumerate(kinds)
    ]
    return _grid("By layer and positions", rows, panels, len(kinds))


def heads_figure(effects: pd.DataFrame, direction: str, sets: Sequence[str]) -> go.Figure:
    """One heat map per position set, in this order: layers against heads."""
    rows = effects[(effects["direction"] == direction) & (effects["kind"] == "head")]
    heads = list(range(int(rows["head"].max()) + 1))
    panels = [
        Panel(
            f"heads at {hover_text(name)}",
            axis("head", showgrid=False, tickformat="d"),
            _layers_axis(rows, is_first=number % _HEADS_A_ROW == 0),
            [_heat_map(rows[rows["positions"] == name], "head", heads, _largest(rows))],
        )
        for number, name in enumerate(sets)
    ]
    return _grid("By layer and head", rows, panels, _HEADS_A_ROW)


def cumulative_figure(ranges: pd.DataFrame) -> go.Figure:
    """Effect of patching all layers up to each, with the 95 % interval: a line per direction, kind and position set."""
    figure = styled_figure("", 460)
    for (direction, kind, positions), line in ranges.groupby(["direction", "kind", "positions"], sort=False):
        figure.add_scatter(
            x=line["layer"],
            y=line["effect"],
            error_y=error_bars(line["effect"], line["low"], line["high"]),
            mode="lines+markers",
            line={"color": _COLOURS[str(kind)], "dash": "solid" if direction == "denoise" else "dot"},
            name=f"{direction}, {_KINDS[str(kind)]}, {hover_text(str(positions))}",
            customdata=_hovers(line),
            hovertemplate="%{customdata}<extra></extra>",
        )
    return figure.update_layout(
        margin={"t": 120},
        xaxis=axis("last layer of the range", tickformat="d"),
        yaxis=axis("effect (95 %)", zeroline=True),
    )


def agreement_figure(effects: pd.DataFrame, agreement: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Attribution patching against exact effects, one panel per direction, with the line on which they are equal."""
    correlations = {(row["direction"], row["kind"]): row["pearson"] for row in agreement}
    panels = []
    for direction in dict.fromkeys(effects["direction"]):
        rows = effects[effects["direction"] == direction].dropna(subset=["effect", "attribution"])
        ends = np.array([rows[["effect", "attribution"]].min().min(), rows[["effect", "attribution"]].max().max()])
        equal = go.Scatter(x=ends, y=ends, mode="lines", line={"color": QUIET, "width": 1}, showlegend=False)
        traces = [equal.update(hoverinfo="skip")]
        for kind, group in rows.groupby("kind", sort=False):
            name = f"{_KINDS[str(kind)]}, {direction}: r = {number_text(correlations.get((direction, kind)))}"
            colour, marker = _COLOURS[str(kind)], {"size": 7, "opacity": 0.7}
            traces.append(points(group["effect"], group["attribution"], name, colour, _hovers(group), marker=marker))
        y_title = "" if panels else "attribution patching"
        panels.append(Panel(_DIRECTIONS[direction], axis("exact effect"), axis(y_title), traces))
    figure = panels_figure(styled_figure("Every component at every position set", 520), panels)
    return figure.update_layout(margin={"t": 140}, legend={"y": 1.08})


def _in_order(effects: pd.DataFrame, sets: Sequence[str]) -> pd.DataFrame:
    """The effects in the order of kinds, position sets, heads and layers, and not of their ranks."""
    places = {name: place for place, name in enumerate([*_KINDS, *sets])}
    by = ["direction", "kind", "positions", "head", "layer"]
    return effects.sort_values(
        by, key=lambda names: names.map(places) if names.name in ("kind", "positions") else names
    )


def _maps(effects: pd.DataFrame, direction: str, sets: Sequence[str]) -> list[Block]:
    """The heat maps of a direction, and the tables that stand in their place."""
    rows, title = effects[effects["direction"] == direction].to_dict("records"), direction.capitalize()
    others = {
        (row["layer"], f"{row['kind']} {row['positions']}"): row["effect"] for row in rows if row["kind"] != "head"
    }
    heads = {
        (row["layer"], f"{row['head']:.0f} {row['positions']}"): row["effect"] for row in rows if row["kind"] == "head"
    }
    blocks: list[Block] = []
    if others:
        table = grid_table(f"{title}: effects by layer and positions", "layer", others)
        blocks.append(Figure("positions", lambda: positions_figure(effects, direction, sets), table))
    if heads:
        table = grid_table(f"{title}: effects by layer, head and positions", "layer", heads)
        blocks.append(Figure("heads", lambda: heads_figure(effects, direction, sets), table))
    return blocks


def _grid(title: str, effects: pd.DataFrame, panels: Sequence[Panel], most: int) -> go.Figure:
    rows = -(-len(panels) // most)
    figure = styled_figure(title, 40 + rows * (max(220, 16 * effects["layer"].nunique()) + 90))
    return panels_figure(figure, panels, most, vertical_spacing=0.2 / rows).update_layout(margin={"t": 84})


def _layers_axis(effects: pd.DataFrame, is_first: bool) -> dict[str, Any]:
    return axis("layer" if is_first else "", showgrid=False, dtick=1 + effects["layer"].nunique() // 12)


def _heat_map(rows: pd.DataFrame, across: str, columns: Sequence[Any], largest: float) -> go.Heatmap:
    """Effects, layers upwards; a dot marks those with q of at most 0.05."""
    cells = rows.assign(hover=_hovers(rows), mark=np.where(rows["q_value"] <= CRITICAL_Q, "•", ""))
    return heat_map(cells, "effect", across, columns, largest, "effect").update(textfont={"size": 14})


def _hovers(rows: pd.DataFrame) -> list[str]:
    return [
        f"<b>{hover_text(row['component'])}</b> at {hover_text(row['positions'])}<br>"
        f"effect <b>{number_text(row['effect'], signed=True)}</b>"
        f" (95 %: {number_text(row['low'], signed=True)} to {number_text(row['high'], signed=True)})<br>"
        f"attribution patching {number_text(row['attribution'], signed=True)}<br>"
        f"q = {number_text(row['q_value'])}, {row['n_pairs']} pairs"
        for row in rows.to_dict("records")
    ]


def _largest(rows: pd.DataFrame) -> float:
    largest = float(rows["effect"].abs().max()) if rows["effect"].notna().any() else 1.0
    return max(largest, 1e-3)


def _sentence(result: Mapping[str, Any], words: Words) -> str:
    chosen = {
        "behaviour": f"By the judged replies, the clean prompt of each was {words.acted}, the corrupted one was not.",
        "score": f"They were chosen by the {words.score} alone: the model's replies were NOT read, so this page is"
        " about the score and not about behaviour.",
    }
    return (
        f"Activations of one run put into another, between {result['n_pairs']} pairs of prompts ({result['pairs']}). "
        f"{chosen[result['require']]} {result['n_critical']} of {result['n_components']} components have"
        f" q ≤ {CRITICAL_Q}."
    )


def _tiles(result: Mapping[str, Any], words: Words) -> Tiles:
    lost = "; ".join(f"{cell(count)}: {reason}" for reason, count in result["lost"].items())
    return Tiles(
        [
            Tile("pairs used", cell(result["n_pairs"]), f"of {cell(result['n_tried'])}; lost: {lost or 'none'}"),
            Tile(
                "clean, corrupted",
                f"{cell(result['clean_score'])}, {cell(result['corrupted_score'])}",
                f"mean {words.score}, nats",
            ),
            Tile("critical components", cell(result["n_critical"]), f"of {cell(result['n_components'])}"),
            *(Tile(name, value, "effect (95 %)") for name, value in _best_heads(result)),
        ]
    )


def _best_heads(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    best = [row for row in result["critical"] if row["rank"] == 1 and row["kind"] == "head"]
    return [(f"{row['direction']}: {row['component']}", _effect(row)) for row in best]


def _effect(row: Mapping[str, Any]) -> str:
    return estimate_cell(row["effect"], row["low"], row["high"])


def _critical(result: Mapping[str, Any]) -> Block:
    if not result["critical"]:
        return Paragraph("No component can be told from chance.")
    records = [{**row, "effect": _effect(row)} for row in result["critical"] if row["rank"] <= _LISTED]
    columns = {
        "component": "component", "direction": "direction", "positions": "positions", "pairs": "n_pairs",
        "effect (95 %)": "effect", "q": "q_value", "attribution patching": "attribution",
    }  # fmt: skip
    title = f"Critical components (q ≤ {CRITICAL_Q}), the strongest {_LISTED} of each direction and kind"
    return records_table(title, columns, records, ("direction", "positions"))


def _agreement(result: Mapping[str, Any]) -> Table:
    columns = {
        "kind": "kind", "direction": "direction", "n": "n", "r": "pearson", "rank correlation": "spearman",
        "mean |difference|": "mean_difference", "strongest": "best", "of these shared": "shared",
    }  # fmt: skip
    title = "Attribution patching against exact effects"
    return records_table(title, columns, result["agreement"], ("direction",))


def _ranges_table(ranges: pd.DataFrame) -> Table:
    rows = ranges.to_dict("records")
    cells = {(row["layer"], f"{row['direction']} {row['kind']} {row['positions']}"): row["effect"] for row in rows}
    return grid_table("Effects of all layers up to each", "last layer", cells)


def _findings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"pairs used": "n_pairs", "components": "n_components", "critical components": "n_critical"}
    counts = [(name, cell(result[field])) for name, field in names.items()]
    return [*counts, *((f"strongest head, {name}", value) for name, value in _best_heads(result))]


def _limits(result: Mapping[str, Any], words: Words) -> list[str]:
    limits = []
    if result["n_pairs"] < FEW_PAIRS:
        limits.append(f"Patching rests on {cell(result['n_pairs'])} pairs: with so few no p-value can be small.")
    if result["require"] == "score":
        limits.append(
            f"Patching used pairs chosen by the {words.score}: it is about the score and not about behaviour."
        )
    return limits


def _guide(words: Words) -> tuple[str, ...]:
    return (
        "**Effect** = (s_patched − s_base) / (s_source − s_base), means over pairs above and below the line. Denoising "
        f"puts activations of the clean ({words.acted}) run into the corrupted one: 0 leaves it corrupted, 1 brings the"
        " clean score back: it shows what suffices. Noising goes the other way: it shows what is needed. Orange "
        f"components carry the {words.score}, blue ones oppose it.",
        "**Certainty.** Intervals of 95 % come from resampling pairs. q is the false discovery rate at which a "
        "component counts, over all components of its kind and direction; a dot marks those that are critical"
        f" (q ≤ {CRITICAL_Q}). `effects.csv` has every component.",
        "**Positions** correspond by role: `last` is where the reply begins, `suffix` the template after the prompt, "
        "`content` the prompt. A pair counts only at positions where both prompts correspond; the hover says how many "
        "do.",
        "**Attribution patching** estimates an effect as the gradient at the base run times the difference of the"
        " activations. Where it strays from the line, the model is not linear between the two runs, and the exact "
        "effect counts.",
    )


_METHODS = (
    Formula(
        "Effect of a patch (Vig et al. 2020)",
        "mean(s_patched - s_base) / mean(s_source - s_base); denoising puts the clean run into the corrupted one,"
        " noising the corrupted into the clean one",
    ),
    Formula("Attribution patching (Nanda 2023)", "ds/dx at the base run . (x_source - x_base)"),
    Formula(
        "p, q",
        "sign-flip permutation test of the mean change; false discovery rate over all components of a kind and"
        " direction (Benjamini and Hochberg 1995)",
    ),
    Formula("Intervals", "95 % percentiles over resampled pairs, numerator and denominator together"),
)

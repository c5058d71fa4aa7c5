"""The figures of a circuit as tiles: a name, a number, a remark."""

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from sfc.viewer.text import NOT_MEASURABLE, number_text


class _Tile(NamedTuple):
    key: str
    name: str
    note: str


_TILES = (
    _Tile("faithfulness", "faithfulness", "1: the circuit alone suffices"),
    _Tile("completeness_normalised", "completeness, normalised", "0: nothing works without it"),
    _Tile("random_faithfulness", "random circuits", "faithfulness at the same size"),
    _Tile("n_nodes", "nodes", "features and error nodes"),
    _Tile("n_edges", "edges", "between its nodes"),
    _Tile("f_model", "F(M)", "mean score, full model"),
    _Tile("f_circuit", "F(C)", "the circuit alone"),
    _Tile("f_complement", "F(M\\C)", "all but the circuit"),
    _Tile("f_empty", "F(0)", "everything ablated"),
    _Tile("error_share", "error share", "of all effects: what SAEs miss"),
)


_REFUSALS = {
    "f_model": "refused_model",
    "f_circuit": "refused_circuit",
    "f_complement": "refused_complement",
    "f_empty": "refused_empty",
}
"""the share of replies that refuse, beside the score of the same ablation"""


def tiles_html(result: Mapping[str, Any]) -> str:
    """The tiles as a definition list; a figure that does not exist is "not measurable"."""
    return f'<dl class="tiles">{"".join(_tile_html(tile, result) for tile in _TILES)}</dl>'


def _tile_html(tile: _Tile, result: Mapping[str, Any]) -> str:
    text = _value_text(tile, result.get(tile.key))
    style = "none" if text == NOT_MEASURABLE else "value"
    return (
        f'<div class="tile"><dt>{escape(tile.name)}</dt><dd class="{style}">{escape(text)}</dd>'
        f'<dd class="note">{escape(_note(tile, result))}</dd></div>'
    )


def _note(tile: _Tile, result: Mapping[str, Any]) -> str:
    """The remark, with what else there is to say: the 95 % interval, a p-value, how many replies refuse."""
    low, high = result.get(f"{tile.key}_low"), result.get(f"{tile.key}_high")
    if low is not None and high is not None:
        return f"{number_text(low)} to {number_text(high)} · {tile.note}"
    if tile.key == "random_faithfulness" and result.get("p_value") is not None:
        return f"{tile.note} · p = {result['p_value']:.2g}"
    if (refused := result.get(_REFUSALS.get(tile.key, ""))) is not None:
        return f"{tile.note} · {100 * refused:.0f} % of replies refuse"
    return tile.note


def _value_text(tile: _Tile, value: float | None) -> str:
    if value is not None and tile.key.startswith("n_"):
        return f"{int(value):,}"
    if value is not None and tile.key == "error_share":
        return f"{100 * value:.0f} %".replace("-", "−")
    return number_text(value)

"""What there is to say of a kind of artifact."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sfc.reports.blocks import Block, Formula, Table, cell
from sfc.reports.found import Found


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

"""Where the nodes of a circuit stand, in pixels, so that no two of them overlap.

Each column is a diverging stack: nodes with a positive effect are piled up above a common base line, the others hang
below it, the strongest next to the line. So the sign can be read without the colour, and the height of a stack shows
how much of the circuit its layer holds. A row of a stack holds one node, or as many small ones as a width allows,
which is the same for all columns and no larger than it takes to make the highest stack fit.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

PLOT_WIDTH = 1000
"""the narrowest plotting area in pixels; on a wider one everything stands further apart"""
_PLOT_HEIGHT = 480
_FILL = 0.86
"""the share of a column's width that a row may take up"""
_LARGEST, _SMALLEST = 30, 7
"""extents in pixels"""
_NARROWEST_LABELLED = 56
_SHRINKAGES = (1.0, 0.75, 0.5, 0.35)
_ROW_WIDTHS = (0.0, 0.4, 0.6, 0.8, 1.0)


class Placement(NamedTuple):
    """What the nodes look like, in the order in which they were given."""

    x: list[float]
    """in columns, 0 for the middle of the first"""
    y: list[float]
    """in pixels above the base line"""
    extent: list[float]
    """width and height of the marker in pixels"""
    top: float
    bottom: float
    labelled: bool
    """whether there is room for a line of text under every node"""


class _Style(NamedTuple):
    largest: float
    row_width: float
    gap: float
    labelled: bool


def place(columns: Sequence[int], effects: Sequence[float], breadths: Sequence[float], n_columns: int) -> Placement:
    """Place nodes with these effects in these columns, in the roomiest style in which they fit.

    Where none fits, the figure becomes as high as the tightest one needs.

    Args:
        breadths: how much wider than a circle each node's symbol is.
    """
    stacks: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for node in sorted(range(len(effects)), key=lambda node: -abs(effects[node])):
        stacks[columns[node], effects[node] >= 0].append(node)
    strongest = max((abs(effect) for effect in effects), default=0) or 1
    # The area, not the diameter, is what the eye compares.
    shares = [(abs(effect) / strongest) ** 0.5 for effect in effects]
    column_width = PLOT_WIDTH / n_columns

    def placed(style: _Style) -> Placement:
        extents = [
            breadth * max(min(_SMALLEST, style.largest), share * style.largest)
            for share, breadth in zip(shares, breadths, strict=True)
        ]
        return _stacked(stacks, extents, style, column_width)

    styles = _styles(column_width, max(breadths, default=1))
    fitting = (placement for placement in map(placed, styles) if placement.top - placement.bottom <= _PLOT_HEIGHT)
    return next(fitting, None) or placed(styles[-1])


def _styles(column_width: float, broadest: float) -> list[_Style]:
    """From roomy to tight."""
    widest = _FILL * column_width
    largest = min(_LARGEST, widest / broadest)
    labelled = [_Style(largest, 0, 20, True)] if column_width >= _NARROWEST_LABELLED else []
    spaced = [_Style(largest, 0, 12, False), _Style(largest, 0, 6, False)]
    packed = [
        _Style(max(shrinkage * largest, min(_SMALLEST, largest)), width * widest, 4, False)
        for shrinkage in _SHRINKAGES
        for width in _ROW_WIDTHS
    ]
    return labelled + spaced + packed


def _stacked(
    stacks: dict[tuple[int, bool], list[int]], extents: list[float], style: _Style, column_width: float
) -> Placement:
    x, y, top, bottom = [0.0] * len(extents), [0.0] * len(extents), 44.0, -44.0
    for (column, is_upper), stack in stacks.items():
        height = style.gap / 2 + 4
        direction = 1 if is_upper else -1
        for row in _rows(stack, extents, style):
            row_height = max(extents[node] for node in row)
            left = -(sum(extents[node] for node in row) + style.gap * (len(row) - 1)) / 2
            # The strongest in the middle of the row.
            for node in row[::2][::-1] + row[1::2]:
                x[node] = column + (left + extents[node] / 2) / column_width
                y[node] = direction * (height + row_height / 2)
                left += extents[node] + style.gap
            height += row_height + style.gap
        top, bottom = max(top, direction * height), min(bottom, direction * height)
    return Placement(x, y, extents, top, bottom, style.labelled)


def _rows(stack: list[int], extents: list[float], style: _Style) -> Iterator[list[int]]:
    row: list[int] = []
    width = 0.0
    for node in stack:
        if row and width + style.gap + extents[node] > style.row_width:
            yield row
            row, width = [], 0.0
        width += extents[node] + (style.gap if row else 0)
        row.append(node)
    if row:
        yield row

"""What a report is made of, before it is Markdown or HTML. All text is plain: whoever renders it escapes it."""

from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go

from sfc.pages.text import NOT_MEASURABLE, number_text


class Paragraph(NamedTuple):
    """A few sentences."""

    text: str


class Formula(NamedTuple):
    """A formula as text, with what it is called."""

    name: str
    text: str


class Table(NamedTuple):
    """Rows of cells, written as they shall stand there; the first column is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Figure(NamedTuple):
    """A picture for the page, and the table that stands in its place in Markdown, where there is one."""

    figure: go.Figure
    table: Table | None = None


class Commands(NamedTuple):
    """Lines for a shell."""

    lines: Sequence[str]


Block = Paragraph | Formula | Table | Figure | Commands


class Section(NamedTuple):
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]


def cell(value: object) -> str:
    """A value from an artifact as it stands in a table: counts whole, other numbers to three digits."""
    if value is None or value != value:  # NaN
        return NOT_MEASURABLE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else number_text(value)


def interval_cell(low: float, high: float) -> str:
    """The ends of an interval."""
    return f"{cell(low)} to {cell(high)}"

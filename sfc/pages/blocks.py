"""What pages, terminal tables and report sections are made of, before they are HTML, text or Markdown.

All text is plain, whatever it holds: whoever renders a block escapes it. In paragraphs `**words**` are strong and
words between backticks are code.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd
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
    """Rows of cells, written as they are shown; the first column is text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: Sequence[str] = ()
    """further columns that are text"""


class Tile(NamedTuple):
    """A figure with its name and a remark."""

    name: str
    value: str
    note: str = ""


class Tiles(NamedTuple):
    """The figures that matter most."""

    tiles: Sequence[Tile]


class Figure(NamedTuple):
    """A plotly figure for the page, and the table that stands in its place elsewhere, where there is one."""

    name: str
    """of its element in the page, and of the file that it is saved to; repeated ones are numbered"""
    draw: Callable[[], go.Figure]
    """called where the figure is shown, which a terminal does not"""
    table: Table | None = None


class Pair(NamedTuple):
    """Two blocks side by side, where there is room."""

    left: "Block"
    right: "Block"


class Widget(NamedTuple):
    """HTML with scripts of this package, for the page alone, and the table that stands in its place elsewhere."""

    html: Callable[[], str]
    """trusted: whoever makes it has escaped what it holds"""
    scripts: Sequence[str] = ()
    table: Table | None = None


class Commands(NamedTuple):
    """Lines for a shell."""

    lines: Sequence[str]


class Links(NamedTuple):
    """Other pages, beside what they belong to."""

    name: str
    links: Sequence[tuple[str, str]]
    """what each is called, and its address relative to this page"""


Block = Paragraph | Formula | Table | Tiles | Figure | Pair | Widget | Commands | Links


class Section(NamedTuple):
    """Blocks under a heading, or under none."""

    title: str
    blocks: Sequence[Block]


class Page(NamedTuple):
    """What a study has to say of a finished artifact, for its page, for the terminal and for the report."""

    title: str
    sentence: str
    """what was asked of what, under the title"""
    summary: Sequence[Block] = ()
    """what the terminal shows; it opens the page and the report's section"""
    sections: Sequence[Section] = ()
    """what the page and the report show beside it"""
    guide: Sequence[str] = ()
    """how to read the page, a paragraph each"""
    findings: Sequence[tuple[str, str]] = ()
    """lines of the report's summary: a figure's name and its value"""
    methods: Sequence[Formula] = ()
    """how figures were measured; the report says it once for all artifacts"""
    limits: Sequence[str] = ()
    """what the figures do not say"""
    foot: Sequence[str] = ()
    """where it comes from, in small print"""


def cell(value: object) -> str:
    """A value from an artifact as it stands in a table: counts whole, other numbers to three digits."""
    if value is None or value != value:  # NaN
        return NOT_MEASURABLE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else number_text(value)


def share_cell(value: object, signed: bool = False) -> str:
    """A share in percent; one that says how far something rose, in tenths and with its sign."""
    if not isinstance(value, int | float) or value != value:  # NaN
        return NOT_MEASURABLE
    return f"{value:{'+.1' if signed else '.0'}%}".replace("-", "−")


def interval_cell(low: object, high: object) -> str:
    """The ends of an interval."""
    return f"{cell(low)} to {cell(high)}"


def estimate_cell(value: object, low: object, high: object) -> str:
    """A value with the ends of its interval behind it, where there are some."""
    if any(figure is None or figure != figure for figure in (value, low, high)):  # NaN
        return cell(value)
    return f"{cell(value)} ({interval_cell(low, high)})"


def figure_cell(result: Mapping[str, Any], name: str) -> str:
    """A figure of a result with its 95 % interval behind it, where there is one."""
    return estimate_cell(result.get(name), result.get(f"{name}_low"), result.get(f"{name}_high"))


def records_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table."""
    return table.to_dict("records")  # pyright: ignore[reportReturnType]


def records_table(
    title: str, columns: Mapping[str, str], records: Sequence[Mapping[str, Any]], texts: Sequence[str] = ()
) -> Table:
    """A table of some fields of records.

    Args:
        columns: for each title the field under it.
        texts: further columns that are text.
    """
    rows = [[cell(record.get(field)) for field in columns.values()] for record in records]
    return Table(title, list(columns), rows, texts)


def grid_table(title: str, corner: str, cells: Mapping[tuple[int, Any], float]) -> Table:
    """A heat map as a table to three decimals, layers downwards; a place without a value is blank.

    Args:
        cells: values by layer and column.
    """
    layers, across = sorted({layer for layer, _ in cells}), list(dict.fromkeys(column for _, column in cells))
    rows = [[str(layer), *(_grid_cell(cells.get((layer, column))) for column in across)] for layer in layers]
    return Table(title, [corner, *map(str, across)], rows)


def _grid_cell(value: float | None) -> str:
    if value is None:
        return ""
    return cell(value) if value != value else f"{value + 0.0:.3f}".replace("-", "−").replace("−0.000", "0.000")


Style = Literal["plain", "strong", "code"]
_SPANS = re.compile(r"\*\*(?P<strong>.+?)\*\*|`(?P<code>[^`]+)`", re.DOTALL)


def spans(text: str) -> Iterator[tuple[Style, str]]:
    """The parts of a paragraph with what their markup makes of them."""
    end = 0
    for match in _SPANS.finditer(text):
        if match.start() > end:
            yield "plain", text[end : match.start()]
        yield ("strong", match["strong"]) if match["strong"] is not None else ("code", match["code"])
        end = match.end()
    if end < len(text):
        yield "plain", text[end:]

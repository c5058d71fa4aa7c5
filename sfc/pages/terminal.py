"""Blocks on the terminal: standard error, so that standard output stays for paths and JSON."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table as RichTable

from sfc.core.progress import console
from sfc.pages.blocks import Block, Pair, Paragraph, Table, Tiles, spans
from sfc.pages.text import printable


def show(blocks: Sequence[Block]) -> None:
    """Show what a terminal can: tables, tiles and paragraphs."""
    for block in blocks:
        match block:
            case Paragraph(text):
                console.print("".join(_styled(style, part) for style, part in spans(text)), soft_wrap=True)
            case Table():
                _show_table(block)
            case Tiles(tiles):
                _show_table(Table("", ("figure", "value", ""), tiles, texts=("",)))
            case Pair(left, right):
                show((left, right))
            case _:
                pass


def _show_table(table: Table) -> None:
    shown = RichTable(title=_text(table.title) or None, title_justify="left", show_header=any(table.columns))
    for number, title in enumerate(table.columns):
        shown.add_column(_text(title), justify="left" if number == 0 or title in table.texts else "right")
    for row in table.rows:
        shown.add_row(*map(_text, row))
    console.print(shown)


def _styled(style: str, text: str) -> str:
    return f"[bold]{_text(text)}[/bold]" if style == "strong" else _text(text)


def _text(text: str) -> str:
    return escape(printable(text))

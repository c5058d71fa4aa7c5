"""Blocks as Markdown, and on the terminal.

Text is escaped, so that prompts and tokens stay text, whatever they hold. The terminal's is standard error, so that
standard output stays for paths and JSON.
"""

import re
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table as RichTable

from sfc.core.progress import console
from sfc.pages.blocks import (
    Block,
    Commands,
    Figure,
    Formula,
    Links,
    Pair,
    Paragraph,
    Section,
    Table,
    Tiles,
    Widget,
    spans,
)
from sfc.pages.text import printable

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"([\\`*_\[\]|~$])")
_NOTHING = "&#8203;"  # a space of no width
_LINE_STARTS = re.compile(r"^([-+=#]|\d+(?=[.)]))")
_ADDRESS = re.compile(r"://|(?<=www)\.|@")


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it stands: no markup, no HTML, and no links made of bare addresses."""
    for character, entity in _ENTITIES.items():
        text = text.replace(character, entity)
    text = _MARKUP.sub(r"\\\1", printable(text))
    return _ADDRESS.sub(lambda found: "".join(f"&#{ord(character)};" for character in found[0]), text)


def markdown_report(title: str, sections: Sequence[Section]) -> str:
    """The whole report."""
    parts = [f"# {markdown_text(title)}"]
    for section in sections:
        parts.append(f"## {markdown_text(section.title)}")
        parts += filter(None, map(_block, section.blocks))
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            # A number, a dash or the like at its beginning would make a list or a heading of it.
            return _LINE_STARTS.sub(lambda found: f"{_NOTHING}{found[0]}", _marked(text))
        case Formula(name, text):
            return f"{markdown_text(name)}:\n\n{_code([text])}"
        case Commands(lines):
            return _code(lines)
        case Links(name, links):
            return markdown_text(f"{name}: {', '.join(text for text, _ in links)}")
        case Figure(_, _, table) | Widget(_, _, table):
            return _table(table) if table else ""
        case Pair(left, right):
            return "\n\n".join(filter(None, (_block(left), _block(right))))
        case Tiles(tiles):
            return _table(Table("", ("figure", "value", ""), tiles, texts=("",)))
        case Table():
            return _table(block)


def _code(lines: Sequence[str]) -> str:
    """Indented, not fenced: no line of it can end the block."""
    return "\n".join(f"    {printable(line)}" for line in lines)


def _marked(text: str) -> str:
    """A paragraph's text; its strong words and its code stay marked."""
    marks = {"plain": "", "strong": "**", "code": ""}
    return "".join(f"{marks[style]}{markdown_text(part)}{marks[style]}" for style, part in spans(text))


def _table(table: Table) -> str:
    head = f"| {' | '.join(map(markdown_text, table.columns))} |"
    rules = (" --- " if number == 0 or title in table.texts else " ---: " for number, title in enumerate(table.columns))
    rule = f"|{'|'.join(rules)}|"
    rows = [f"| {' | '.join(map(markdown_text, row))} |" for row in table.rows]
    title = [f"**{markdown_text(table.title)}**", ""] if table.title else []
    return "\n".join([*title, head, rule, *rows])


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

"""A report as one HTML page that needs nothing else."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sfc.pages.blocks import Block, Commands, Figure, Formula, Paragraph, Section, Table
from sfc.pages.document import figure_html, header_html, write_document
from sfc.pages.tables import figures_table
from sfc.pages.text import printable


def write_report_page(path: Path, title: str, sentence: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes."""
    cards = "\n".join(_section(number, section) for number, section in enumerate(sections))
    contents = "".join(f'<a href="#s{n}">{_text(section.title)}</a><br>' for n, section in enumerate(sections))
    write_document(path, title, f'{header_html(title, sentence)}\n<section class="card">{contents}</section>\n{cards}')


def _section(number: int, section: Section) -> str:
    blocks = "\n".join(_block(f"s{number}-{i}", block) for i, block in enumerate(section.blocks))
    return f'<section class="card scroll" id="s{number}"><h2>{_text(section.title)}</h2>\n{blocks}</section>'


def _block(name: str, block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Formula(term, text):
            return f"<p>{_text(term)}: <code>{_text(text)}</code></p>"
        case Commands(lines):
            return "".join(f"<p><code>{_text(line)}</code></p>" for line in lines)
        case Figure(figure, _):
            return figure_html(name, figure)
        case Table(title, columns, rows):
            heading = f"<p><b>{_text(title)}</b></p>" if title else ""
            return heading + figures_table(columns, [[printable(cell) for cell in row] for row in rows])


def _text(text: str) -> str:
    return escape(printable(text))

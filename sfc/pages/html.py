"""Pages and reports as HTML: one file that needs nothing else.

Plotly's own JavaScript is part of the file. A content security policy names the scripts by their hashes and forbids
every request, so that the page stays offline and text from prompts stays text, whatever it holds.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sfc.pages.blocks import (
    Block,
    Commands,
    Figure,
    Formula,
    Links,
    Page,
    Pair,
    Paragraph,
    Section,
    Table,
    Tiles,
    Widget,
    spans,
)
from sfc.pages.text import NOT_MEASURABLE, printable


def document_html(title: str, body: str, scripts: Sequence[str] = ()) -> str:
    """A page; equal input makes equal text.

    Args:
        title: plain text; it is escaped here.
        body: the HTML inside `<main>`, its figures from `figure_html`.
        scripts: files of this package that run after the figures are drawn.
    """
    sources = [get_plotlyjs(), *map(_asset, ("page.js", *scripts))]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(sources)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(printable(title))}</title>
<style>{_asset("page.css")}</style>
</head>
<body>
<main>
{body}
</main>
{"".join(f"<script>{script}</script>" for script in sources)}
</body>
</html>
"""


def figure_html(name: str, figure: go.Figure) -> str:
    """The place of a figure, and beside it what page.js draws there."""
    height = figure.layout["height"]
    place = f'<div class="figure" id="{name}" style="height:{height}px"></div>'
    return place + _json_html(f"{name}-data", str(figure.to_json(engine="json")))


def data_html(name: str, value: Any) -> str:
    """Data for a script of the page: the JSON of `value` in an element named `name`."""
    return _json_html(name, json.dumps(value, allow_nan=False, sort_keys=True, separators=(",", ":")))


def _json_html(name: str, text: str) -> str:
    # Inside a script element only "<" could end or reopen it.
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _asset(name: str) -> str:
    return files("sfc.pages").joinpath(name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    # Plotly styles its elements inline, and saves pictures through data: and blob: addresses.
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


_MOST_WITHOUT_CONTENTS = 6
_TAGS = {"strong": "b", "code": "code"}


def page_html(page: Page) -> str:
    """The page of an artifact; equal input makes equal text. A long page begins with its contents."""
    header = (
        f"<header><h1>{_text(page.title)}</h1><p>{_text(page.sentence)}</p></header>\n"
        "<noscript><p>The pictures need JavaScript; figures and table are readable without it.</p></noscript>"
    )
    taken: set[str] = set()
    body = [header, *(_bare(block, taken) for block in page.summary)]
    titles = [(f"s{number}", section.title) for number, section in enumerate(page.sections) if section.title]
    if len(titles) > _MOST_WITHOUT_CONTENTS:
        links = "".join(f'<a href="#{name}">{_text(title)}</a><br>' for name, title in titles)
        body.append(f'<section class="card">{links}</section>')
    body += [_card(f"s{number}", section, taken) for number, section in enumerate(page.sections)]
    if page.guide:
        paragraphs = "".join(f"<p>{_marked(text)}</p>" for text in page.guide)
        body.append(
            f'<section class="card"><h2>How to read this page</h2><div class="guide">{paragraphs}</div></section>'
        )
    if page.foot:
        body.append(f"<footer>{''.join(f'<p>{_marked(line)}</p>' for line in page.foot)}</footer>")
    blocks = [*page.summary, *(block for section in page.sections for block in section.blocks)]
    scripts = dict.fromkeys(script for block in blocks for script in _scripts_of(block))
    return document_html(page.title, "\n".join(body), list(scripts))


def _card(name: str, section: Section, taken: set[str]) -> str:
    heading = f"<h2>{_text(section.title)}</h2>\n" if section.title else ""
    blocks = "\n".join(_block(block, taken) for block in section.blocks)
    return f'<section class="card scroll" id="{name}">{heading}{blocks}</section>'


def _bare(block: Block, taken: set[str]) -> str:
    """A block of the summary: tiles are cards themselves."""
    if isinstance(block, Tiles):
        return _block(block, taken)
    return f'<section class="card scroll">{_block(block, taken)}</section>'


def _block(block: Block, taken: set[str]) -> str:
    """A block.

    Args:
        taken: names of the page's figures so far; that of this one is added.
    """
    match block:
        case Paragraph(text):
            return f"<p>{_marked(text)}</p>"
        case Formula(term, text):
            return f"<p>{_text(term)}: <code>{_text(text)}</code></p>"
        case Commands(lines):
            return "".join(f"<p><code>{_text(line)}</code></p>" for line in lines)
        case Links(term, links):
            shown = ", ".join(f'<a href="{escape(address)}">{_text(text)}</a>' for text, address in links)
            return f"<p>{_text(term)}: {shown or 'none'}</p>"
        case Figure(name, draw, _):
            return figure_html(_free(name, taken), draw())
        case Pair(left, right):
            return f'<div class="pair"><div>{_block(left, taken)}</div><div>{_block(right, taken)}</div></div>'
        case Widget(html, _, _):
            return html()
        case Tiles(tiles):
            return f'<dl class="tiles">{"".join(map(_tile, tiles))}</dl>'
        case Table():
            return table_html(block)


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where another figure of the page has it already."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free


def table_html(table: Table) -> str:
    """A table with its title above it."""
    styles = ["tokens" if i == 0 or title in table.texts else "number" for i, title in enumerate(table.columns)]
    head = "".join(f'<th scope="col" class="{s}">{_text(t)}</th>' for s, t in zip(styles, table.columns, strict=True))
    rows = "".join(
        "<tr>" + "".join(f'<td class="{s}">{_text(t)}</td>' for s, t in zip(styles, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    title = f"<p><b>{_text(table.title)}</b></p>" if table.title else ""
    return f"{title}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _tile(tile: tuple[str, str, str]) -> str:
    name, value, note = tile
    style = "none" if value == NOT_MEASURABLE else "value"
    return (
        f'<div class="tile"><dt>{_text(name)}</dt><dd class="{style}">{_text(value)}</dd>'
        f'<dd class="note">{_text(note)}</dd></div>'
    )


def _marked(text: str) -> str:
    parts = ((_TAGS.get(style), _text(part)) for style, part in spans(text))
    return "".join(f"<{tag}>{part}</{tag}>" if tag else part for tag, part in parts)


def _text(text: str) -> str:
    return escape(printable(text))


def _scripts_of(block: Block) -> Iterator[str]:
    match block:
        case Widget(_, scripts, _):
            yield from scripts
        case Pair(left, right):
            yield from _scripts_of(left)
            yield from _scripts_of(right)

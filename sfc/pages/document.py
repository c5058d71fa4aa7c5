"""One HTML file that needs nothing else: the frame of every page.

Plotly's own JavaScript is part of the file. A content security policy names the two scripts by their hashes and
forbids every request, so that the page stays offline and text from prompts stays text, whatever it holds.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from sfc.pages.text import printable


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

"""Text from prompts and vocabularies, and numbers, made fit to be shown.

Tokens are untrusted: whoever writes a prompt or a tokenizer chooses them. Here they lose what is invisible or would
move the text around them; each place that shows them escapes them for its own markup.
"""

import html
import math
from collections.abc import Sequence

from sfc.core.progress import printable

NOT_MEASURABLE = "not measurable"
_LONGEST_TOKEN = 24


def token_text(token: str) -> str:
    """A token in quotation marks, its spaces visible, cut when it is very long."""
    cut = token if len(token) <= _LONGEST_TOKEN else token[: _LONGEST_TOKEN - 1] + "…"
    return f"“{printable(cut).replace(' ', '␣')}”"


def tokens_text(tokens: Sequence[str], most: int) -> str:
    """The first tokens of a list, in one line."""
    return " ".join(token_text(token) for token in tokens[:most])


def hover_text(text: str) -> str:
    """Text for plotly's labels, whose markup knows `&lt;` but shows `&quot;` as it stands: quotes are left alone."""
    return html.escape(printable(text), quote=False)


def number_text(value: float | None, signed: bool = False) -> str:
    """Three significant digits with a true minus sign; None and NaN are "not measurable"."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURABLE
    if value == 0:
        return "0"
    small_or_large = abs(value) < 0.0005 or abs(value) >= 1e5
    digits = 2 if small_or_large else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:{'+' if signed else ''}.{min(digits, 4)}{'e' if small_or_large else 'f'}}"
    return text.replace("-", "−")


def count_text(count: int, noun: str) -> str:
    """`1 node`, `4,000 nodes`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

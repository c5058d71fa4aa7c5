"""The vocabulary of the data: categories, columns, and which file holds which kind of prompt.

What a prompt's text looks like after cleaning, and what it is compared by.

The two are different on purpose. The prompt itself is brought to NFC, which only picks one spelling of the same
characters: the compatibility form NFKC would rewrite what the model is asked (`x²` to `x2`, `½` to `1⁄2`), and how
odd characters influence a refusal is a fair thing to study. For comparing prompts NFKC is right: a full-width or
ligatured copy of a prompt is the same prompt, and must not stand in two splits.

Chance that sticks to the prompt: the same text gets the same number wherever it stands in a file.

Splits, balancing and limits choose by these numbers and never by position or by a generator's state, so that
reordering the files changes nothing. Different purposes use different keys: choices are independent of each other.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sfc.core.errors import UserError, suggestion

CATEGORIES = (
    "deception",
    "harassment",
    "harmful",
    "hate",
    "illegal",
    "privacy",
    "self-harm",
    "sexual",
    "unethical",
    "violence",
)
ALL = "all"  # every category
COLUMNS = ("prompt", "category", "refusal_label", "dataset_type", "original_source")
FILES = {"safe_80k": "or-bench-80k.csv", "hard": "or-bench-hard-1k.csv", "toxic": "or-bench-toxic.csv"}
TOPICS_FILE = "topics.csv"
SPLITS = ("discovery", "reference", "test")


def category_or_all(name: str) -> str:
    """Like `canonical_category`, but `all` is welcome too and means every category."""
    return ALL if name == ALL else canonical_category(name)


def canonical_category(name: str) -> str:
    """The category that `name` means; case, spaces and underscores do not matter (`Self_Harm` is `self-harm`).

    Raises:
        UserError: there is no such category; the message suggests a close one or lists them all.
    """
    canonical = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    if canonical not in CATEGORIES:
        raise UserError(f"unknown category {name!r}; {suggestion(canonical, CATEGORIES)}")
    return canonical


# C0 and C1 controls that are not whitespace, the soft hyphen, zero-width and bidirectional marks, and the byte order
# mark: none can be seen. (Joiners matter to some scripts and emoji; prompts here are English, where they only hide.)
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]"
)


def normalise(text: str) -> str:
    """The text in NFC, without invisible characters, each run of whitespace one space. Idempotent."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    elif not text.isprintable():
        text = _INVISIBLE.sub("", text)
    return " ".join(text.split())


def comparison_key(text: str) -> str:
    """What two prompts must share to be the same: the normalised text in compatibility form, regardless of case."""
    text = normalise(text)
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def keyed_numbers(texts: Iterable[str], key: str) -> NDArray[np.uint64]:
    """One uniform 64-bit number per text, from the SHA-256 of the key and of what the text is compared by."""
    prefix = hashlib.sha256(f"{key}\n".encode())
    digests = bytearray()
    for text in texts:
        digest = prefix.copy()
        digest.update(comparison_key(text).encode())
        digests += digest.digest()[:8]
    return np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64)


def keyed_ranks(frame: pd.DataFrame, by: list[str], key: str) -> pd.Series:
    """Each row's place (0, 1, …) in the keyed order of its group, where `by` names the columns that make groups."""
    numbers = pd.Series(keyed_numbers(frame["prompt"], key), index=frame.index)
    groups = [frame[column] for column in by]
    return numbers.groupby(groups).rank(method="first").astype(int) - 1

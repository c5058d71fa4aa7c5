"""The vocabulary of the data, and what a prompt is known by.

Categories, columns, and which file holds which kind of prompt come first; then what a prompt's text looks like after
cleaning, what it is compared by, and the id and the random numbers that follow from that.

The cleaned text and the text that is compared differ on purpose. The prompt itself is brought to NFC, which only picks
one spelling of the same characters: the compatibility form NFKC would rewrite what the model is asked (`x²` to `x2`,
`½` to `1⁄2`), and how odd characters influence a refusal is a fair thing to study. For comparing prompts NFKC is right:
a full-width or ligatured copy of a prompt is the same prompt, and must not be in two splits.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from jaxtyping import UInt64

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
COLUMNS = ("id", "prompt", "category", "refusal_label", "dataset_type", "original_source")
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


def prompt_ids(texts: Iterable[str]) -> list[str]:
    """The id of each prompt: `p` and the first 12 hexadecimal digits of the SHA-256 of what it is compared by.

    Texts with the same id are the same prompt. The letter keeps spreadsheets and pandas from reading ids as numbers.
    """
    return [f"p{digest.hex()[:12]}" for digest in _digests(texts)]


def with_ids(prompts: pd.DataFrame) -> pd.DataFrame:
    """The table with the `id` of each `prompt` as its first column."""
    others = [name for name in prompts.columns if name != "id"]
    return prompts.assign(id=prompt_ids(prompts["prompt"]))[["id", *others]]


def looked_up(ids: Iterable[str], prompts: pd.DataFrame, column: str) -> np.ndarray:
    """For each id the value of a column in the row of `prompts` that has the id.

    Raises:
        ValueError: two rows have the same id.
        KeyError: no row has one of the ids.
    """
    if not prompts["id"].is_unique:
        raise ValueError(f"{column!r} cannot be looked up: two rows have the same id")
    return prompts.set_index("id").loc[list(ids), column].to_numpy()


def keyed_numbers(texts: Iterable[str], key: str) -> UInt64[np.ndarray, " texts"]:
    """One uniform 64-bit number per text: the same text gets the same number wherever it is in a file.

    Splits, balancing and limits choose by these numbers and never by position or by a generator's state, so that
    reordering the files changes nothing. Different purposes use different keys: their choices are independent.
    """
    first_bytes = b"".join(digest[:8] for digest in _digests(texts, f"{key}\n"))
    return np.frombuffer(first_bytes, dtype=">u8").astype(np.uint64)


def keyed_ranks(frame: pd.DataFrame, by: list[str], key: str) -> pd.Series:
    """Each row's place (0, 1, …) in the keyed order of its group, where `by` names the columns that make groups."""
    numbers = pd.Series(keyed_numbers(frame["prompt"], key), index=frame.index)
    groups = [frame[column] for column in by]
    return numbers.groupby(groups).rank(method="first").astype(int) - 1


def _digests(texts: Iterable[str], salt: str = "") -> Iterator[bytes]:
    """For each text the SHA-256 of the salt and of what the text is compared by."""
    salted = hashlib.sha256(salt.encode())
    for text in texts:
        digest = salted.copy()
        digest.update(comparison_key(text).encode())
        yield digest.digest()

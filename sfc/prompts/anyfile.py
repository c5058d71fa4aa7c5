"""Read a prompt file of anyone's: a CSV with a column `prompt` (or `goal`), and `category` and `label` if there."""

import csv
from pathlib import Path

import pandas as pd

from sfc.errors import UserError, suggestion
from sfc.prompts.table import read_table

LABELS = ("toxic", "hard", "safe")
UNLABELLED = "unlabelled"
UNCATEGORISED = "all"
# XSTest (Röttger et al. 2024) calls what a prompt is about its type, and what should be refused unsafe.
_XSTEST_COLUMNS = {"id", "prompt", "type", "label", "focus", "note"}
_XSTEST_LABELS = {"safe": "safe", "unsafe": "toxic"}


def load_prompt_file(path: Path) -> pd.DataFrame:
    """Read `prompt`, `category` and `label` (`toxic`, `hard` or `safe`), one row per prompt that is not blank.

    A file without categories has the one category `all`; a file without labels, or a row whose label is blank, the
    label `unlabelled`. XSTest's own columns `id,prompt,type,label,focus,note` are understood, and AdvBench's `goal` in
    place of `prompt`.

    Raises:
        UserError: the file is missing or malformed, holds no prompts, or names an unknown label.
    """
    header = _header(path)
    text = "goal" if "goal" in header and "prompt" not in header else "prompt"
    read_table(path, (text,))  # says what is wrong with a file that is no prompt file at all
    xstest = set(header) >= _XSTEST_COLUMNS and "category" not in header
    columns = {"prompt": text, "category": "type" if xstest else "category", "label": "label"}
    present = {ours: theirs for ours, theirs in columns.items() if theirs in header or ours == "prompt"}
    table = read_table(path, tuple(present.values())).rename(columns={theirs: ours for ours, theirs in present.items()})
    table = table.apply(lambda column: column.str.strip())
    table = table[table["prompt"] != ""]
    if table.empty:
        raise UserError(f"{path} holds no prompts: its column 'prompt' is blank in every row")
    labels = table["label"] if "label" in table else pd.Series("", index=table.index, dtype=object)
    categories = table["category"] if "category" in table else pd.Series("", index=table.index, dtype=object)
    return pd.DataFrame(
        {
            "prompt": table["prompt"],
            "category": categories.mask(categories == "", UNCATEGORISED),
            "label": _canonical_labels(path, labels, _XSTEST_LABELS if xstest else {}),
        }
    ).reset_index(drop=True)


def _header(path: Path) -> list[str]:
    """The names of the columns; none where the file cannot be read, and `read_table` says why."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
        try:
            return [name.strip() for name in next(csv.reader(handle), [])]
        except csv.Error:
            return []


def _canonical_labels(path: Path, labels: pd.Series, translation: dict[str, str]) -> pd.Series:
    known = {label: label for label in LABELS} | {"": UNLABELLED, UNLABELLED: UNLABELLED} | translation
    canonical = labels.str.lower().map(known)
    for row, label in labels[canonical.isna()].items():
        raise UserError(f"{path} row {row}: unknown label {label!r}; {suggestion(label.lower(), LABELS)}")
    return canonical

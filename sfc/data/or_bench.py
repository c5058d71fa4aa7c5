"""Load the three OR-Bench files of a folder as one clean table: tidy texts, no blanks, no copies, all of it counted.

A prompt belongs to one kind only. Where files share a prompt, the rarer and more telling kind keeps it:

- toxic before safe: a prompt on both sides would have two labels; toxic prompts are the scarce side and were singled
  out by the data set's moderators, so the safe copy goes.
- hard before 80k: the hard file is (all but one row) a selection from the 80k file, not further prompts.

Of copies within a file the first in alphabetical order of category and text is kept, so that reordering a file never
changes which prompts there are. Copies are rows with the same id: in the clean table every id is there once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sfc.core.errors import UserError
from sfc.data.read import read_table
from sfc.data.schema import COLUMNS, FILES, canonical_category, normalise, with_ids

_PRECEDENCE = ("toxic", "hard", "safe_80k")


class FileCounts(NamedTuple):
    """What became of the rows of one file; `read` is the sum of all that follow."""

    file: str
    read: int
    empty: int
    duplicates: int
    also_toxic: int
    also_hard: int
    kept: int


class CleaningReport(NamedTuple):
    """What cleaning did, file by file."""

    files: tuple[FileCounts, ...]

    @property
    def read(self) -> int:
        return sum(counts.read for counts in self.files)

    @property
    def kept(self) -> int:
        return sum(counts.kept for counts in self.files)

    @property
    def duplicates(self) -> int:
        """Rows dropped because the same prompt was kept elsewhere, in the same file or in another."""
        return sum(counts.duplicates + counts.also_toxic + counts.also_hard for counts in self.files)

    def lines(self) -> list[str]:
        """One line per file, for people."""
        return [_line(counts) for counts in self.files]


def load_prompts(folder: Path) -> tuple[pd.DataFrame, CleaningReport]:
    """Read `or-bench-80k.csv`, `or-bench-hard-1k.csv` and `or-bench-toxic.csv` (columns `prompt`, `category`).

    The table has the columns of `schema.COLUMNS`. `refusal_label` is what the data set expects, not what a model
    does; `original_source` is file and row, as `or-bench-toxic.csv:17`.

    Raises:
        UserError: the folder or a file is missing or malformed, or a row's category is unknown.
    """
    _check_files(folder)
    tables = {kind: _read_kind(folder / name) for kind, name in FILES.items()}
    frame, report = clean(tables)
    for counts in report.files:
        if counts.read == counts.empty:
            raise UserError(f"{folder / counts.file} holds no prompts: all its {counts.read} rows are blank")
    return frame, report


def _check_files(folder: Path) -> None:
    missing = [name for name in FILES.values() if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(missing)}: `sfc download` fetches OR-Bench into data/or-bench; "
            "files of your own need the columns 'prompt' and 'category'"
        )


def _read_kind(path: Path) -> pd.DataFrame:
    table = read_table(path, ("prompt", "category"))
    filled = table["prompt"].str.strip() != ""  # cleaning drops blank rows, whatever their category says
    first_rows = table.loc[filled, "category"].drop_duplicates()
    canonical = {name: _category_at(path, row, name) for row, name in zip(first_rows.index, first_rows, strict=True)}
    categories = [canonical.get(name, "") for name in table["category"]]
    sources = [f"{path.name}:{row}" for row in table.index]
    return table.assign(category=categories, original_source=sources)


def _category_at(path: Path, row: int, category: str) -> str:
    try:
        return canonical_category(category)
    except UserError as error:
        raise UserError(f"{path} row {row}: {error}") from None


def clean(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, CleaningReport]:
    """Clean and join tables (columns `prompt`, `category`, `original_source`) given by `dataset_type`.

    The rows keep the order of the files and of the rows in them; the index is new.
    """
    kept: dict[str, pd.DataFrame] = {}
    counts: dict[str, FileCounts] = {}
    for kind in (kind for kind in _PRECEDENCE if kind in tables):
        table = with_ids(tables[kind].assign(prompt=[normalise(text) for text in tables[kind]["prompt"]]))
        filled = table[table["prompt"] != ""]
        copies = filled[filled["id"].duplicated(keep=False)].sort_values(["id", "category", "prompt"], kind="stable")
        unique = filled.drop(index=copies.index[copies["id"].duplicated()])
        in_toxic = _is_in(unique, kept.get("toxic"))
        in_hard = _is_in(unique, kept.get("hard")) & ~in_toxic
        rest = unique[~(in_toxic | in_hard)]
        kept[kind] = rest.assign(dataset_type=kind, refusal_label=kind == "toxic")
        counts[kind] = FileCounts(
            file=FILES[kind],
            read=len(table),
            empty=len(table) - len(filled),
            duplicates=len(filled) - len(unique),
            also_toxic=int(in_toxic.sum()),
            also_hard=int(in_hard.sum()),
            kept=len(rest),
        )
    order = [kind for kind in FILES if kind in kept]
    frame = pd.concat([kept[kind] for kind in order], ignore_index=True)[list(COLUMNS)]
    return frame, CleaningReport(tuple(counts[kind] for kind in order))


def _is_in(table: pd.DataFrame, other: pd.DataFrame | None) -> "pd.Series[bool]":
    return table["id"].isin(other["id"] if other is not None else [])


def _line(counts: FileCounts) -> str:
    dropped = {
        "empty": counts.empty,
        "duplicates": counts.duplicates,
        "also in the toxic file": counts.also_toxic,
        "also in the hard file": counts.also_hard,
    }
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number)
    return f"{counts.file}: {counts.kept:,} of {counts.read:,} rows kept" + (f" ({reasons})" if reasons else "")

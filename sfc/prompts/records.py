"""Read a table of texts from a CSV file or from JSON lines, with required columns and ones that may be missing."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sfc.errors import UserError
from sfc.prompts.table import read_table


def read_records(path: Path, required: Sequence[str], optional: Sequence[str]) -> pd.DataFrame:
    """The columns asked for, as text, a row per record; an optional column that is not there is blank.

    A name that ends with `.jsonl` is read as JSON lines, any other as CSV.

    Raises:
        UserError: the file is missing or malformed, holds no record, or a required column is missing or blank.
    """
    frame = (_json_lines if path.suffix == ".jsonl" else _csv)(path, required, optional)
    for column in required:
        for row in frame.index[frame[column].str.strip() == ""]:
            raise UserError(f"{path} row {row}: {column!r} is blank")
    return frame.reset_index(drop=True)


def _csv(path: Path, required: Sequence[str], optional: Sequence[str]) -> pd.DataFrame:
    read_table(path, required)  # says what is wrong with a file that is no such table at all
    with path.open(encoding="utf-8-sig", newline="") as handle:
        header = [name.strip() for name in next(csv.reader(handle))]
    present = [column for column in optional if column in header]
    return read_table(path, [*required, *present]).reindex(columns=[*required, *optional], fill_value="")


def _json_lines(path: Path, required: Sequence[str], optional: Sequence[str]) -> pd.DataFrame:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    rows = {number: _record(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()}
    if not rows:
        raise UserError(f"{path} is empty: write one JSON object a line, with {', '.join(map(repr, required))}")
    texts = {}
    for number, row in rows.items():
        missing = [column for column in required if column not in row]
        if missing:
            raise UserError(
                f"{path} row {number} has no {missing[0]!r}; it has {', '.join(map(repr, row)) or 'nothing'}"
            )
        texts[number] = [row.get(column, "") for column in (*required, *optional)]
        if not all(isinstance(text, str) for text in texts[number]):
            raise UserError(f"{path} row {number}: every value must be a text in quotes")
    return pd.DataFrame.from_dict(texts, orient="index", columns=[*required, *optional], dtype=object)


def _record(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} row {number} is not JSON ({error.msg}): write one object a line") from None
    if not isinstance(record, dict):
        raise UserError(f'{path} row {number} is not a JSON object such as {{"toxic": …, "safe": …}}')
    return record

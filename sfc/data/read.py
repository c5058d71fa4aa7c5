"""Read one CSV file of prompts, and say exactly what is wrong with it when something is.

Read a table of texts from a CSV file or from JSON lines, with required columns and ones that may be missing.

Read a prompt file of anyone's: a CSV with a column `prompt` (or `goal`), and `category` and `label` if there.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sfc.core.errors import UserError, suggestion


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a UTF-8 CSV file as text: the columns asked for, in that order, others being ignored.

    The index is the row number as a spreadsheet counts: the header is row 1, the first prompt row 2, and a quoted
    line break does not start a row. Lines without anything in them are counted but left out.

    Raises:
        UserError: the file is missing, not UTF-8, not CSV or empty, a column is missing, or a row is ragged.
    """
    records = _records(path)
    if not records:
        raise UserError(f"{path} is empty: it must hold a header with {_quoted(columns)} and at least one row")
    header, *rows = [field.strip() for field in records[0]], *records[1:]
    positions = [_position(path, header, column) for column in columns]
    numbers, values = [], []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(
                f"{path} row {number} has {len(row)} fields where the header has {len(header)}: "
                "quote texts that contain commas or line breaks"
            )
        numbers.append(number)
        values.append([row[position] for position in positions])
    if not values:
        raise UserError(f"{path} has a header but no rows: add prompts, or fetch the file again")
    return pd.DataFrame(values, columns=list(columns), index=pd.Index(numbers, name="row"), dtype=object)


def _records(path: Path) -> list[list[str]]:
    text = _decoded(path)
    if "\0" in text:
        raise UserError(f"{path} is not a CSV file (it holds binary zeros): fetch it again or export it as CSV")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file (line {reader.line_num}: {error}): mend the quotes there") from None


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path, or fetch the data with `sfc download`") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it must be a file that you may read") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 (line {line}: byte 0x{data[error.start]:02x}): save it again with the encoding UTF-8"
        ) from None


def _position(path: Path, header: list[str], column: str) -> int:
    if header.count(column) > 1:
        raise UserError(f"{path} has the column {column!r} more than once: rename all but one")
    if column not in header:
        found = [name for name in header if name] or ["none"]
        close = suggestion(column, found)
        hint = f" ({close.replace('did you mean', 'is it')})" if close.startswith("did") else ""
        raise UserError(f"{path} has no column {column!r}; columns found: {_quoted(found)[:200]}{hint}")
    return header.index(column)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


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

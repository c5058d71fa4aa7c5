"""Read one CSV file of prompts, and say exactly what is wrong with it when something is."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sfc.errors import UserError, suggestion


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

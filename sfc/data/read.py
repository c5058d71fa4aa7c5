"""Tables of texts from CSV files and JSON lines; when something is wrong with a file, the error says exactly what.

CSV is parsed by `csv` and not by pandas, which fills up rows that are too short without a word.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError, create_model

from sfc.core.errors import UserError, suggestion
from sfc.core.progress import say
from sfc.core.reading import read_text
from sfc.data.schema import with_ids

LABELS = ("toxic", "hard", "safe")
UNLABELLED = "unlabelled"
UNCATEGORISED = "all"
# XSTest (Röttger et al. 2024) calls what a prompt is about its type, and what should be refused unsafe.
_XSTEST_COLUMNS = {"id", "prompt", "type", "label", "focus", "note"}
_XSTEST_LABELS = {"safe": "safe", "unsafe": "toxic"}
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs"}


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Read the columns asked for, as text and in this order; an optional one that is not there is blank.

    A name that ends with `.jsonl` is read as JSON lines, any other as CSV. The index is the row number: the line's in
    JSON lines; in CSV as a spreadsheet counts, where the header is row 1, the first row after it row 2, and a line
    break within quotes does not start a row. Empty lines are counted but left out.

    Raises:
        UserError: the file is missing, not UTF-8, malformed or empty, a column is missing, or a row is ragged.
    """
    if path.suffix == ".jsonl":
        return _json_lines(path, required, optional)
    return _columns(path, *_csv(path), required, optional)


def read_records(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> pd.DataFrame:
    """Like `read_table`, but a blank text in a required column is an error, and rows are numbered from 0.

    Raises:
        UserError: as `read_table`, or a required text is blank.
    """
    table = read_table(path, required, optional)
    for column in required:
        for row in table.index[table[column].str.strip() == ""]:
            raise UserError(f"{path} row {row}: {column!r} is blank")
    return table.reset_index(drop=True)


def load_prompt_file(path: Path) -> pd.DataFrame:
    """Read anyone's prompts: `id`, `prompt`, `category` and `label` (`toxic`, `hard` or `safe`), one row per prompt.

    Blank prompts are left out, and so are copies (rows with an id that an earlier row has), which is said.

    A file without categories has the one category `all`; a file without labels, or a row whose label is blank, the
    label `unlabelled`. XSTest's own columns `id,prompt,type,label,focus,note` are understood, and AdvBench's `goal` in
    place of `prompt`.

    Raises:
        UserError: the file is missing or malformed, holds no prompts, names an unknown label, or has two labels for one
            prompt.
    """
    header, rows = _csv(path)
    is_xstest = set(header) >= _XSTEST_COLUMNS and "category" not in header
    text = "goal" if "goal" in header and "prompt" not in header else "prompt"
    table = _columns(path, header, rows, (text,), ("type" if is_xstest else "category", "label"))
    table = table.set_axis(["prompt", "category", "label"], axis=1).apply(lambda column: column.str.strip())
    table = table[table["prompt"] != ""]
    if table.empty:
        raise UserError(f"{path} holds no prompts: its column 'prompt' is blank in every row")
    prompts = table.assign(
        category=table["category"].mask(table["category"] == "", UNCATEGORISED),
        label=_canonical_labels(path, table["label"], _XSTEST_LABELS if is_xstest else {}),
    )
    return _without_copies(path, with_ids(prompts)).reset_index(drop=True)


def _csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names of the columns, and the fields of every row after them; a line without anything in it has none."""
    text = read_text(path)
    if "\0" in text:
        raise UserError(f"{path} is not a CSV file (it holds binary zeros): fetch it again or export it as CSV")
    first_line = text.partition("\n")[0]
    for separator, name in _OTHER_SEPARATORS.items():
        if separator in first_line and "," not in first_line:
            raise UserError(f"{path} has {name} between its columns: export it with commas")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        records = list(reader)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file (line {reader.line_num}: {error}): fix the quotes there") from None
    if not records:
        raise UserError(f"{path} is empty: it must hold a header and at least one row")
    return [field.strip() for field in records[0]], records[1:]


def _columns(
    path: Path, header: list[str], rows: list[list[str]], required: Sequence[str], optional: Sequence[str]
) -> pd.DataFrame:
    """The columns asked for, of rows that must all be as long as the header."""
    for column in required:
        _check_is_there(path, header, column)
    columns = [*required, *optional]
    for column in columns:
        if header.count(column) > 1:
            raise UserError(f"{path} has the column {column!r} more than once: rename all but one")
    places = [header.index(column) if column in header else None for column in columns]
    texts = {}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(
                f"{path} row {number} has {len(row)} fields where the header has {len(header)}: "
                "quote texts that contain commas or line breaks"
            )
        texts[number] = ["" if place is None else row[place] for place in places]
    if not texts:
        raise UserError(f"{path} has a header but no rows: add some, or fetch the file again")
    return _frame(texts, columns)


def _check_is_there(path: Path, header: list[str], column: str) -> None:
    if column in header:
        return
    found = [name for name in header if name] or ["none"]
    close = suggestion(column, found)
    hint = f" ({close.replace('did you mean', 'is it')})" if close.startswith("did") else ""
    raise UserError(f"{path} has no column {column!r}; columns found: {_quoted(found)[:200]}{hint}")


def _json_lines(path: Path, required: Sequence[str], optional: Sequence[str]) -> pd.DataFrame:
    fields: dict[str, Any] = {**dict.fromkeys(required, (str, ...)), **dict.fromkeys(optional, (str, ""))}
    record: type[BaseModel] = create_model("Record", **fields)
    texts = {}
    # Not `splitlines`: it also splits at characters such as U+2028, which may be inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                texts[number] = list(record.model_validate_json(line).model_dump().values())
            except ValidationError as error:
                raise UserError(f"{path} row {number}{_first_problem(error, required)}") from None
    if not texts:
        raise UserError(f"{path} is empty: write one JSON object a line, with {_quoted(required)}")
    return _frame(texts, [*required, *optional])


def _first_problem(error: ValidationError, required: Sequence[str]) -> str:
    """What is wrong with a line, as the end of a sentence that began with the row's number."""
    first = error.errors()[0]
    match first["type"]:
        case "json_invalid":
            return f" is not JSON ({first['ctx']['error']}): write one object a line"  # pyright: ignore
        case "missing":
            return f" has no {first['loc'][0]!r}; it has {_quoted(first['input']) or 'nothing'}"
        case "string_type":
            return f": {first['loc'][0]!r} must be a text in quotes"
        case _:
            example = ", ".join(f'"{column}": "…"' for column in required)
            return f" is not a JSON object: write {{{example}}}"


def _frame(texts: dict[int, list[str]], columns: list[str]) -> pd.DataFrame:
    rows = pd.Index(list(texts), name="row")
    return pd.DataFrame(list(texts.values()), columns=columns, index=rows, dtype=object)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _canonical_labels(path: Path, labels: pd.Series, translation: dict[str, str]) -> pd.Series:
    known = {label: label for label in LABELS} | {"": UNLABELLED, UNLABELLED: UNLABELLED} | translation
    canonical = labels.str.lower().map(known)
    for row, label in labels[canonical.isna()].items():
        raise UserError(f"{path} row {row}: unknown label {label!r}; {suggestion(label.lower(), LABELS)}")
    return canonical


def _without_copies(path: Path, prompts: pd.DataFrame) -> pd.DataFrame:
    """Each prompt once, where it comes first."""
    first_label = prompts.groupby("id")["label"].transform("first")
    for row in prompts.index[prompts["label"] != first_label]:
        raise UserError(
            f"{path} row {row}: an earlier row has the same prompt with the label {first_label[row]!r}: remove one"
        )
    is_copy = prompts.duplicated("id")
    if is_copy.any():
        say(f"left out: {is_copy.sum():,} copies of other prompts in {path}")
    return prompts[~is_copy]

"""What SAEs can learn from beside the circuits' prompts: ordinary texts, and files of instructions."""

import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError, one_line
from sfc.core.reading import hash_of_given, read_text
from sfc.data.read import read_table
from sfc.data.render import Role, TokenizedPrompt, plain_ids
from sfc.data.schema import prompt_ids

PROMPTS, SAMPLED = "prompts", "sampled"
"""sources that are no files: the circuits' prompts, and conversations that the model wrote"""
SOURCES = "prompts, sampled, FILE, hf:NAME@COMMIT[:SPLIT], chat:FILE or chat:hf:NAME@COMMIT[:SPLIT]:COLUMN"
_HUB, _CHAT = "hf:", "chat:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INSTRUCTION_COLUMNS = ("prompt", "instruction", "text")
_SHORTEST_PIECE = 8


def is_chat(source: str) -> bool:
    """Whether a source holds instructions, which are rendered in the model's template, and not texts."""
    return source.startswith(_CHAT)


def corpus_identity(source: str) -> Any:
    """What fingerprints say of texts or instructions: a file's hash, or a data set's name and commit.

    Raises:
        UserError: there is no such file, or the data set names no commit.
    """
    name = source.removeprefix(_CHAT)
    if name.startswith(_HUB):
        folder = _DataSet.of(source).name
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file()) if Path(folder).is_dir() else []
        return [source, *([str(path.relative_to(folder)), hash_of_file(path)] for path in files)] if files else source
    if not Path(name).is_file():
        raise UserError(f"no corpus {source!r}: corpus.source is a list of {SOURCES}")
    return {"chat" if is_chat(source) else "text": hash_of_given(Path(name))}


def read_texts(source: str) -> Iterator[str]:
    """The texts of a corpus, one by one, blank ones left out.

    `.txt`: texts are separated by blank lines; `.csv` and `.jsonl`: a column `text`; `hf:NAME@COMMIT[:SPLIT]`: the
    column `text` of a data set, streamed, of the split `train` unless another is named; a local folder has no commit.

    Raises:
        UserError: the file is malformed or of another kind, the data set cannot be read, or a row's text is missing.
    """
    if source.startswith(_HUB):
        texts = _from_hub(_DataSet.of(source))
    elif source.endswith(".txt"):
        texts = read_text(Path(source)).replace("\r\n", "\n").split("\n\n")
    elif source.endswith((".csv", ".jsonl")):
        texts = read_table(Path(source), ("text",))["text"]
    else:
        raise UserError(f"corpus {source}: give a .txt, .csv or .jsonl file")
    return (text.strip() for text in texts if text.strip())


def read_chats(source: str) -> Iterator[tuple[str, str]]:
    """Instructions with the replies to them, one by one; a reply that is not known is empty.

    `chat:FILE`, CSV or JSON lines: the instruction is in a column `prompt`, `instruction` or `text` (the first of them
    that is not blank), the reply in a column `reply`. `chat:hf:NAME@COMMIT[:SPLIT]:COLUMN`: a column of a data
    set.

    Raises:
        UserError: the file is malformed or has no such column, or the data set cannot be read.
    """
    if source.startswith(_CHAT + _HUB):
        texts = _from_hub(_DataSet.of(source))
        return ((text.strip(), "") for text in texts if text.strip())
    source = source.removeprefix(_CHAT)
    if not source.endswith((".csv", ".jsonl")):
        raise UserError(f"corpus {_CHAT + source}: give a .csv or .jsonl file")
    table = read_table(Path(source), (), (*_INSTRUCTION_COLUMNS, "reply"))
    instructions = table[list(_INSTRUCTION_COLUMNS)].apply(lambda column: column.str.strip())
    first = instructions.replace("", pd.NA).bfill(axis=1).iloc[:, 0]
    if first.isna().all():
        raise UserError(f"{source} holds no instructions: give it a column {', '.join(_INSTRUCTION_COLUMNS)}")
    return zip(first.dropna(), table.loc[first.notna(), "reply"], strict=True)


def holds_prompt(text: str, ids: Set[str]) -> bool:
    """Whether a text, or one of its lines, is one of the prompts with these ids, as prompts are compared."""
    return not ids.isdisjoint(prompt_ids({text, *text.splitlines()}))


def pieces(tokenizer: Any, texts: Iterable[str], context: int, max_tokens: int | None) -> list[TokenizedPrompt]:
    """Texts cut into pieces of at most `context` tokens, each beginning as this tokenizer begins a text.

    All their tokens are content. A piece of fewer than eight tokens is left out; the last text is cut at `max_tokens`.

    Raises:
        UserError: no text is long enough.
    """
    opening = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = context - len(opening)
    cut: list[TokenizedPrompt] = []
    total = 0
    for text in texts:
        ids = plain_ids(tokenizer, text)
        for start in range(0, len(ids), step):
            room = context if max_tokens is None else min(context, max_tokens - total)
            piece = np.array([*opening, *ids[start : start + step]][:room])
            if len(piece) >= _SHORTEST_PIECE:
                cut.append(TokenizedPrompt(piece, np.full(len(piece), Role.CONTENT)))
                total += len(piece)
        if max_tokens is not None and total > max_tokens - _SHORTEST_PIECE:
            break
    if not cut:
        raise UserError(f"the corpus holds no text of at least {_SHORTEST_PIECE} tokens")
    return cut


class _DataSet(NamedTuple):
    """A column of a Hugging Face data set: of the hub, at a commit, or of a local folder."""

    name: str
    commit: str | None
    split: str
    column: str

    @classmethod
    def of(cls, source: str) -> "_DataSet":
        """What `[chat:]hf:NAME@COMMIT[:SPLIT][:COLUMN]` names; the column is that of instructions, texts are in `text`.

        Raises:
            UserError: it is written otherwise, or names no commit of a data set on the hub, which may change there.
        """
        name, *parts = source.removeprefix(_CHAT).removeprefix(_HUB).split(":")
        column = "text"
        if is_chat(source):
            if len(parts) not in (1, 2):
                raise UserError(
                    f"corpus {source!r}: write chat:hf:NAME@COMMIT:COLUMN or chat:hf:NAME@COMMIT:SPLIT:COLUMN"
                )
            column = parts.pop()
        split = ":".join(parts) or "train"
        if Path(name).is_dir():
            return cls(name, None, split, column)
        name, _, commit = name.partition("@")
        if not _COMMIT.fullmatch(commit):
            raise UserError(
                f"corpus {source!r} can change: write hf:{name}@COMMIT, with the 40 hexadecimal digits of a commit that"
                " the hub lists for it, or give a local folder"
            )
        return cls(name, commit, split, column)


def _from_hub(data: _DataSet) -> Iterator[str]:
    from datasets import load_dataset

    name, commit, split, column = data
    try:
        rows = load_dataset(name, split=split, revision=commit, streaming=True, trust_remote_code=False)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row[column], str):
                raise UserError(f"row {number} of data set {name!r} has no text in its column {column!r}")
            yield row[column]
    except KeyError:
        raise UserError(f"data set {name!r} has no column {column!r}") from None
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds for what is not there
        raise UserError(f"cannot read data set {name!r}: {one_line(error)}") from None

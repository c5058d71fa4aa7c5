"""Ordinary texts for SAEs to learn from: a file or a Hugging Face data set, cut into pieces of tokens."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sfc.core.artifacts import hash_of_file
from sfc.core.errors import UserError
from sfc.data.read import read_table, read_text
from sfc.data.render import Role, TokenizedPrompt

_HUB = "hf:"
_SHORTEST_PIECE = 8


def corpus_identity(source: str) -> Any:
    """What fingerprints say of a corpus: a file's hash, or a data set's name.

    Raises:
        UserError: there is no such file.
    """
    if source.startswith(_HUB):
        return source
    if not Path(source).is_file():
        raise UserError(f"no corpus {source!r}: corpus.source is prompts, replies, a file, or hf:NAME[:SPLIT]")
    return hash_of_file(Path(source))


def read_texts(source: str) -> Iterator[str]:
    """The texts of a corpus, one by one, blank ones left out.

    `.txt`: texts are separated by blank lines; `.csv` and `.jsonl`: a column `text`; `hf:NAME[:SPLIT]`: the column
    `text` of a data set (a local folder works too), streamed, of the split `train` unless another is named.

    Raises:
        UserError: the file is malformed or of another kind, the data set cannot be read, or a row's text is missing.
    """
    if source.startswith(_HUB):
        texts = _from_hub(source.removeprefix(_HUB))
    elif source.endswith(".txt"):
        texts = read_text(Path(source)).replace("\r\n", "\n").split("\n\n")
    elif source.endswith((".csv", ".jsonl")):
        texts = read_table(Path(source), ("text",))["text"]
    else:
        raise UserError(f"corpus {source}: give a .txt, .csv or .jsonl file")
    return (text.strip() for text in texts if text.strip())


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
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
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


def _from_hub(name: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, split = name.partition(":")
    try:
        for number, row in enumerate(load_dataset(name, split=split or "train", streaming=True), start=1):
            if not isinstance(row["text"], str):
                raise UserError(f"row {number} of data set {name!r} has no text in its column 'text'")
            yield row["text"]
    except KeyError:
        raise UserError(f"data set {name!r} has no column 'text'") from None
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen kinds for what is not there
        raise UserError(f"cannot read data set {name!r}: {str(error).splitlines()[0]}") from None

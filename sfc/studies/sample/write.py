"""Write conversations batch by batch, and go on where a killed process stopped.

`sampled.jsonl` has a line per conversation, `batches.jsonl` a line per batch, which is written after its conversations:
a batch without one is written again, and becomes what it was.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sfc.behaviors.behavior import POSITIVE
from sfc.core.artifacts import write_text
from sfc.core.config import SampleOptions
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.core.reading import read_text
from sfc.run import EVERYDAY_STARTS, Run
from sfc.session import Session
from sfc.studies.sample.conversations import FATES, Start, Writer, first_words

CONVERSATIONS, BATCHES = "sampled.jsonl", "batches.jsonl"
EVERYDAY = "everyday"
_FRUITLESS = 10
"""batches in a row without a conversation, after which it is given up"""


class Starts:
    """What instructions are begun with: first words of prompts that are not in the test split, and everyday ones."""

    def __init__(self, run: Run) -> None:
        known = run.prompts.frame[run.prompts.frame["split"] != "test"]
        prompts = list(zip(known["prompt"], known["dataset_type"], strict=True))
        self._positive = [each for each in prompts if each[1] == POSITIVE]
        negative = [each for each in prompts if each[1] != POSITIVE]
        everyday = [(line, EVERYDAY) for line in read_text(EVERYDAY_STARTS).splitlines() if line]
        self._others = [pool for pool in (negative, everyday) if pool]
        self._share = SampleOptions.of(run.experiment).positive_share if self._positive else 0.0

    def draw(self, random: np.random.Generator) -> Start:
        """A start: of a positive prompt, as often as is wanted; else of another prompt or an everyday one, evenly."""
        is_positive, pool, place, words = random.random(4)
        texts = self._positive if is_positive < self._share else self._others[int(pool * len(self._others))]
        text, kind = texts[int(place * len(texts))]
        return Start(text if kind == EVERYDAY else first_words(text, words), kind)


def write_sample(session: Session, folder: Path) -> dict[str, Any]:
    """Write conversations until there are as many tokens as are wanted.

    Returns:
        Their numbers by kind of start, and what became of all instructions.

    Raises:
        UserError: what was written before is damaged, or the model writes nothing that can be kept.
    """
    run, options, prompts = session.run, SampleOptions.of(session.run.experiment), session.run.prompts.frame
    batches = _whole_lines(folder / BATCHES)
    conversations = [line for line in _whole_lines(folder / CONVERSATIONS) if line["batch"] < len(batches)]
    for name, lines in ((BATCHES, batches), (CONVERSATIONS, conversations)):
        write_text(folder / name, "".join(map(_line, lines)))
    writer = Writer(session.model, options, set(prompts.loc[prompts["split"] == "test", "id"]))
    for line in conversations:
        writer.remember(line["prompt"])
    starts, n_tokens = Starts(run), sum(line["n_tokens"] for line in conversations)
    with progress_bar("writing conversations", options.tokens, "tokens") as progress:
        progress(n_tokens)
        while n_tokens < options.tokens:
            # What was drawn for one batch says nothing of the next: a batch can be made again by itself.
            random = np.random.default_rng([int(run.sampled.fingerprint, 16), len(batches)])
            made, fates = writer.write([starts.draw(random) for _ in range(options.batch)], random)
            lines = [{**conversation._asdict(), "batch": len(batches)} for conversation in made]
            _append(folder / CONVERSATIONS, lines)
            _append(folder / BATCHES, [fates])
            conversations += lines
            batches.append(fates)
            if not any(line["kept"] for line in batches[-_FRUITLESS:]) and len(batches) >= _FRUITLESS:
                raise UserError(
                    f"{_FRUITLESS} batches of instructions and none to keep ({fates}): is it a chat model, and this its"
                    " template (model.template)? Where it does not write like English, --unfiltered keeps all that end"
                )
            written = sum(conversation.n_tokens for conversation in made)
            n_tokens += written
            progress(written)
    return {
        "n_conversations": len(conversations),
        "n_tokens": n_tokens,
        "kinds": dict(sorted(Counter(line["kind"] for line in conversations).items())),
        "fates": {name: sum(line[name] for line in batches) for name in FATES},
    }


def read_sample(folder: Path, tokens: int) -> Iterator[tuple[str, str]]:
    """The first conversations that were written, instructions with replies, until they have so many tokens."""
    for line in _whole_lines(folder / CONVERSATIONS):
        yield line["prompt"], line["reply"]
        tokens -= line["n_tokens"]
        if tokens <= 0:
            return


def _append(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(_line, lines))
        file.flush()
        os.fsync(file.fileno())


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a kill may have cut short what follows the last of them.

    Raises:
        UserError: one of them is damaged.
    """
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); make it again with --rebuild") from None

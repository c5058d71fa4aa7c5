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
from sfc.data.read import read_text
from sfc.run import EVERYDAY_STARTS, Run
from sfc.session import Session
from sfc.studies.sample.conversations import FATES, Start, first_words, line_ends, not_repeated, write_conversations
from sfc.studies.sample.study import BATCHES, SAMPLED

EVERYDAY = "everyday"


class Starts:
    """What instructions are begun with: first words of prompts that are not in the test split, and everyday ones."""

    def __init__(self, run: Run) -> None:
        known = run.prompts.frame[run.prompts.frame["split"] != "test"]
        is_positive = known["dataset_type"] == POSITIVE
        self._share = SampleOptions.of(run.experiment).positive_share
        self._positive = list(zip(known["prompt"][is_positive], known["dataset_type"][is_positive], strict=True))
        everyday = [(line, EVERYDAY) for line in read_text(EVERYDAY_STARTS).splitlines() if line.strip()]
        negative = list(zip(known["prompt"][~is_positive], known["dataset_type"][~is_positive], strict=True))
        self._others = [everyday, negative]

    def draw(self, random: np.random.Generator) -> Start:
        """A start of one of the kinds."""
        wants_positive, which, place, words = random.random(4)
        pool = self._positive if wants_positive < self._share else self._others[int(which * len(self._others))]
        text, kind = pool[int(place * len(pool))]
        return Start(text if kind == EVERYDAY else first_words(text, words), kind)


def write_sample(session: Session, folder: Path) -> dict[str, Any]:
    """Write conversations until there are as many tokens as are wanted.

    Returns:
        Their numbers, and what became of all instructions.

    Raises:
        UserError: what was written before is damaged.
    """
    run, model = session.run, session.model
    options = SampleOptions.of(run.experiment)
    batches = _whole_lines(folder / BATCHES)
    done = [line for line in _whole_lines(folder / SAMPLED) if line["batch"] < len(batches)]
    for name, lines in ((BATCHES, batches), (SAMPLED, done)):
        write_text(folder / name, "".join(map(_line, lines)))
    fate = not_repeated(set(run.prompts.frame.loc[run.prompts.frame["split"] == "test", "id"]))
    for line in done:
        fate(line["prompt"])
    starts, ends, n_tokens = Starts(run), line_ends(model.tokenizer), sum(line["n_tokens"] for line in batches)
    with progress_bar("writing conversations", options.tokens, "tokens") as progress:
        progress(n_tokens)
        while n_tokens < options.tokens:
            random = np.random.default_rng([int(run.sampled.fingerprint, 16), len(batches)])
            begun = [starts.draw(random) for _ in range(options.batch)]
            lengths = options.instruction_tokens, options.reply_tokens
            made, fates = write_conversations(model, begun, random, lengths, ends, fate)
            written = sum(conversation.n_tokens for conversation in made)
            _append(folder / SAMPLED, ({**each._asdict(), "batch": len(batches)} for each in made))
            batches.append({"n_conversations": len(made), "n_tokens": written, **fates})
            _append(folder / BATCHES, batches[-1:])
            n_tokens += written
            progress(written)
    totals = Counter[str]()
    for line in batches:
        totals.update(line)
    return {
        "n_conversations": totals["n_conversations"],
        "n_tokens": totals["n_tokens"],
        "fates": {name: totals[name] for name in FATES},
    }


def read_sample(folder: Path, tokens: int) -> Iterator[tuple[str, str]]:
    """The first conversations that were written, instructions with replies, until they have so many tokens."""
    for line in _whole_lines(folder / SAMPLED):
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
    """The lines of a file that a kill may have cut short."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return [json.loads(line) for line in text.split("\n")[:-1]]
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); make it again with --rebuild") from None

"""Write conversations batch by batch, and go on where a killed process stopped.

`sampled.jsonl` has a line per conversation, `batches.jsonl` a line per batch, which is written after its conversations:
a batch without one is written again, and becomes what it was.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from sfc.behaviors.behavior import POSITIVE
from sfc.core.artifacts import read_lines, write_text
from sfc.core.config import SampleOptions
from sfc.core.errors import UserError
from sfc.core.files import open_journal, writing
from sfc.core.progress import progress_bar
from sfc.core.reading import read_text
from sfc.core.work import Work
from sfc.models.work import Shape, cache_bytes, replied
from sfc.run import EVERYDAY_STARTS, Run
from sfc.session import Session
from sfc.studies.sample import Sample
from sfc.studies.sample.conversations import FATES, Start, Writer, first_words
from sfc.studies.sketch import Sketch
from sfc.studies.study import Made

CONVERSATIONS, BATCHES = "sampled.jsonl", "batches.jsonl"
EVERYDAY = "everyday"
_FRUITLESS = 10
"""batches in a row without a conversation, after which it is given up"""


class Written(BaseModel):
    """A line of `sampled.jsonl` (see `Conversation`), and the number of its batch."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str
    reply: str
    start: str
    kind: str
    n_tokens: NonNegativeInt
    batch: NonNegativeInt


class Fates(BaseModel):
    """A line of `batches.jsonl`: how many of a batch's instructions met which of the `FATES`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    unfinished: NonNegativeInt
    malformed: NonNegativeInt
    copies: NonNegativeInt
    test: NonNegativeInt
    kept: NonNegativeInt


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


def write_sample(study: Sample, session: Session, folder: Path) -> Made:
    """Write conversations until there are as many tokens as are wanted.

    The result has their numbers by kind of start, and what became of all instructions.

    Raises:
        UserError: what was written before is damaged, or the model writes nothing that can be kept.
    """
    run, options, prompts = session.run, study.of(session.run), session.run.prompts.frame
    batches = _written(folder / BATCHES, Fates)
    all_written = _written(folder / CONVERSATIONS, Written)
    conversations = [line for line in all_written if line.batch < len(batches)]
    if len(conversations) < len(all_written):  # of a batch that a kill left without its own line
        write_text(folder / CONVERSATIONS, "".join(map(_line, conversations)))
    writer = Writer(session.model, options, set(prompts.loc[prompts["split"] == "test", "id"]))
    for line in conversations:
        writer.remember(line.prompt)
    starts, n_tokens = Starts(run), sum(line.n_tokens for line in conversations)
    with progress_bar("writing conversations", options.tokens, "tokens") as progress:
        progress(n_tokens)
        while n_tokens < options.tokens:
            # What was drawn for one batch says nothing of the next: a batch can be made again by itself.
            random = np.random.default_rng([int(run.sampled.fingerprint, 16), len(batches)])
            made, fates = writer.write([starts.draw(random) for _ in range(options.batch)], random)
            lines = [Written(**conversation._asdict(), batch=len(batches)) for conversation in made]
            _append(folder / CONVERSATIONS, lines)
            _append(folder / BATCHES, [Fates(**fates)])
            conversations += lines
            batches.append(Fates(**fates))
            if not any(line.kept for line in batches[-_FRUITLESS:]) and len(batches) >= _FRUITLESS:
                raise UserError(
                    f"{_FRUITLESS} batches of instructions and none to keep ({fates}): is it a chat model, and this its"
                    " template (model.template)? Where it does not write like English, --unfiltered keeps all that end"
                )
            written = sum(conversation.n_tokens for conversation in made)
            n_tokens += written
            progress(written)
    result = {
        "preset": run.experiment.name,
        "n_conversations": len(conversations),
        "n_tokens": n_tokens,
        "kinds": dict(sorted(Counter(line.kind for line in conversations).items())),
        "fates": {name: sum(getattr(line, name) for line in batches) for name in FATES},
    }
    return Made(result, facts={"n_tokens": n_tokens})


def read_sample(folder: Path, tokens: int) -> Iterator[tuple[str, str]]:
    """The first conversations that were written, instructions with replies, until they have so many tokens."""
    for line in read_lines(folder / CONVERSATIONS, Written):
        yield line.prompt, line.reply
        tokens -= line.n_tokens
        if tokens <= 0:
            return


Line = TypeVar("Line", bound=BaseModel)


def _append(path: Path, lines: Iterable[BaseModel]) -> None:
    with writing(path), open_journal(path) as file:
        file.write("".join(map(_line, lines)).encode())
        file.flush()
        os.fsync(file.fileno())


def _line(value: BaseModel) -> str:
    return json.dumps(value.model_dump(), ensure_ascii=False) + "\n"


def _written(path: Path, kind: type[Line]) -> list[Line]:
    """What an earlier process wrote, without a last line that a kill cut short, which is removed from the file.

    Raises:
        UserError: a line is damaged.
    """
    open_journal(path).close()
    return read_lines(path, kind)


KEPT = 0.5
"""share of the instructions that are kept, taken without a measurement: models write more or fewer plain ones"""
_LINE_BYTES = 5.5
"""a token has in `sampled.jsonl`"""


def work(study: Sample, sketch: Sketch) -> list[Work]:
    """The steps of `sfc sample`: batches until there are as many tokens as are wanted; what there is, is not written
    again.
    """
    run, sizes, options = sketch.run, sketch.sizes, study.of(sketch.run)
    artifact = run.sampled
    written = artifact.manifest()["n_tokens"] if artifact.is_complete() else 0
    lengths = [len(prompt.ids) for prompt in sketch.circuit_prompts]
    instruction = min(float(np.mean(lengths)), float(options.instruction_tokens))
    per_conversation = instruction + options.reply_tokens
    wanted = max(options.tokens - written, 0)
    batches = -(-wanted // max(int(options.batch * KEPT * per_conversation), 1))
    begun = Shape(options.batch, round(instruction / 2))
    asked = Shape(max(round(options.batch * KEPT), 1), round(instruction))
    tokens = options.batch * (options.instruction_tokens + options.reply_tokens)
    of_one = replied([begun], 1, options.instruction_tokens, sizes.n_layers, 4096)
    if options.reply_tokens:
        of_one += replied([asked], 1, options.reply_tokens, sizes.n_layers, 4096)
    in_use = cache_bytes(sizes, tokens) + sketch.in_use(begun.tokens) + sizes.logits(options.batch)
    kept = round(_LINE_BYTES * wanted)
    return [sketch.loading(), Work(f"write {wanted:,} tokens", of_one * batches, sizes.weights + in_use, kept=kept)]

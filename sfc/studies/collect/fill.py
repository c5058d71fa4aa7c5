"""Fill a store with activations: of the circuits' prompts, or of another corpus for the SAEs."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.ranks import is_leader
from sfc.core.sites import layer_of
from sfc.core.work import Amounts, Work
from sfc.data.render import Role, TokenizedPrompt, tokenize_prompts
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.work import Shape, passed
from sfc.run import Run
from sfc.saes.collect import collect
from sfc.saes.plan import plan_batches, plan_shards
from sfc.saes.store import shard_digests, sites_before, write_prompts
from sfc.saes.unfinished import bytes_of_shard
from sfc.session import Session

if TYPE_CHECKING:
    from sfc.studies.collect import Collect
    from sfc.studies.sketch import Sketch


class Corpus(NamedTuple):
    """Token sequences, and a table that says what they are: `id`, `prompt` (the text), `split`, and what else is known.

    In the table of a circuit's prompts every id is there once; texts for SAEs may repeat.
    """

    table: pd.DataFrame
    sequences: list[TokenizedPrompt]

    @property
    def n_tokens(self) -> int:
        return sum(len(sequence.ids) for sequence in self.sequences)


Tokenize = Callable[[list[str]], list[TokenizedPrompt]]


def circuit_prompts(run: Run, tokenize: Tokenize) -> Corpus:
    """The discovery and reference prompts. Test prompts are left out, so that nothing learned can have seen them.

    Raises:
        UserError: no prompt is short enough.
    """
    frame = run.prompts.frame
    return short_enough(tokenize, frame[frame["split"] != "test"], run.experiment.prompts.max_tokens)


def short_enough(tokenize: Tokenize, frame: pd.DataFrame, max_tokens: int | None) -> Corpus:
    """The prompts of at most `max_tokens` tokens, or all; how many are left out is said.

    Raises:
        UserError: none is short enough.
    """
    tokenized = tokenize(frame["prompt"].tolist())
    fits = np.array([max_tokens is None or len(prompt.ids) <= max_tokens for prompt in tokenized])
    if not fits.any():
        raise UserError(
            f"no prompt has at most {max_tokens} tokens: raise --set prompts.max_tokens=…, or take a model with more"
            " positions"
        )
    if not fits.all():
        say(f"left out: {(~fits).sum():,} prompts of more than {max_tokens} tokens")
    return Corpus(frame[fits].reset_index(drop=True), [tokenized[i] for i in np.flatnonzero(fits)])


def batched(session: Session, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[Batch]]:
    """The prompts that are short enough, and batches of them for runs of the session's model.

    Raises:
        UserError: none is short enough.
    """
    experiment, model = session.run.experiment, session.model
    table, sequences = short_enough(model.tokenize, frame, experiment.prompts.max_tokens)
    layout, batch_tokens = TemplateLayout.of(sequences), experiment.activations.batch_tokens
    return table, make_batches(sequences, layout, batch_tokens, model.device)


def tokenizing(tokenizer: Any, config: ModelConfig) -> Tokenize:
    """How prompts are rendered and tokenized for a model of which only the tokenizer is loaded."""
    return lambda texts: tokenize_prompts(
        tokenizer, texts, config.template, config.system_prompt, arguments=config.template_arguments
    )


_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def fill(run: Run, folder: Path, model: Model, corpus: Corpus, sites: Sequence[str]) -> dict[str, Any]:
    """Collect a corpus at these sites into a store's folder, and write its table; sites that it has stay in it.

    Several processes share the shards.

    Returns:
        For the manifest: `n_prompts`, `n_tokens`, `n_rows` and all `sites`.

    Raises:
        UserError: the disk is too small.
    """
    config = run.experiment.activations
    say(f"collecting {len(sites)} sites of {len(corpus.sequences):,} prompts into {folder}")
    before = sites_before(folder)
    new = [site for site in sites if site not in before]
    if is_leader():
        wanted = sum(n_bytes(corpus.sequences, model.width(site), config.dtype) for site in [*before, *new])
        check_room(run, wanted - sum(path.stat().st_size for path in folder.glob("shard-*")))
    with progress_bar("collecting", corpus.n_tokens, "tokens") as progress:
        n_rows = collect(model, corpus.sequences, sites, config, folder, progress)
    if is_leader():
        write_prompts(folder, corpus.table)
    return {
        "n_prompts": len(corpus.sequences),
        "n_tokens": corpus.n_tokens,
        "n_rows": n_rows,
        "sites": [*before, *new],
    }


def fill_corpus(run: Run, model: Model, corpus: Corpus, sites: Sequence[str]) -> None:
    """Collect the SAEs' own corpus into a store of its own.

    Raises:
        UserError: as `fill`.
    """
    began, artifact = time.perf_counter(), run.corpus
    with artifact.being_made() as folder:
        facts = fill(run, folder, model, corpus, sites)
        if is_leader():
            seconds = {"total": round(time.perf_counter() - began, 2)}
            artifact.finish(shard_digests(folder), **facts, seconds=seconds)


def n_rows(sequences: Sequence[TokenizedPrompt]) -> int:
    """Rows that a store of these sequences has: no template prefix, and no first token."""
    return sum(int((sequence.roles[1:] != Role.PREFIX).sum()) for sequence in sequences)


def n_bytes(sequences: Sequence[TokenizedPrompt], width: int, dtype: str) -> int:
    """Bytes of one site's activations, without compression."""
    return n_rows(sequences) * width * _BYTES[dtype]


def check_room(run: Run, needed: int) -> None:
    """Raise a `UserError` if the disk has no room for so many bytes."""
    free = shutil.disk_usage(run.root).free
    if needed > free:
        raise UserError(
            f"the activations take {needed / 1e9:,.1f} GB, {run.root.resolve()} has {free / 1e9:,.1f} GB free: choose"
            " another --root, fewer layers or prompts (--set activations.layers=[…], prompts.limit=…)"
        )


_IN_FLIGHT = 3
"""batches of activations that are there at once: one that runs and those that wait to be written"""


def work(study: "Collect", sketch: "Sketch") -> list[Work]:
    """The steps of `sfc collect`: every prompt through the blocks up to the last site, and the files of the store.

    Raises:
        UserError: the prompts or the tokenizer cannot be read.
    """
    config, sizes = sketch.run.experiment.activations, sketch.sizes
    sequences, sites = sketch.circuit_prompts, study.sites(sketch.run)
    batches = plan_batches(sequences, config, torch.device("cpu"))
    shapes = [Shape(*batch.batch.ids.shape) for batch in batches]
    largest = max(shape.tokens for shape in shapes)
    widths, dtype = {site: sketch.known.outline.width(site) for site in sites}, getattr(torch, config.dtype)
    kept = sum(
        bytes_of_shard(sum(batch.n_rows for batch in shard), widths, dtype)
        for shard in plan_shards(batches, config.shard_tokens)
    )
    rows = largest * sum(widths.values())
    filling = Work(
        f"run {len(sequences):,} prompts, {sum(batch.n_rows for batch in batches):,} rows",
        passed(shapes, layer_of(sites[-1]) + 1) + Amounts(written=kept),
        device=sizes.weights + sketch.in_use(largest) + rows * (sizes.itemsize + dtype.itemsize),
        host=_IN_FLIGHT * rows * dtype.itemsize,
        kept=kept,
    )
    return [sketch.loading(), filling]

"""What SAEs are trained and measured on: rows of a store, or of runs of the model where no store would fit the disk."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.progress import say
from sfc.data.schema import keyed_ranks
from sfc.models.loading import Model, choose_device, load_model
from sfc.run import Run
from sfc.saes.plan import TokenTable, joined, plan_batches
from sfc.saes.store import Store, read_prompts
from sfc.saes.stream import BLOCKS_PER_BUFFER, Source, live_source, stored_source
from sfc.studies.collect import Corpus, fill, n_bytes, sae_corpus


@dataclass(frozen=True)
class TrainingRows:
    """Rows of activations, what they are, and which are kept from training."""

    table: pd.DataFrame
    """the prompts (or pieces of text), and in `held_out` whether one is kept from training"""
    tokens: TokenTable
    source: Callable[[Sequence[str]], Source]
    """the rows at some sites"""
    measured: Callable[[str], Iterator["Measured"]]
    """the held-out rows at a site, block by block"""

    @property
    def trained(self) -> Bool[np.ndarray, " rows"]:
        """Which rows are trained on."""
        return ~self.table["held_out"].to_numpy()[self.tokens.prompt]


class Measured(NamedTuple):
    """A block of held-out rows in float32, and their roles."""

    rows: Float[Tensor, "rows d"]
    roles: Int[np.ndarray, " rows"]


def training_rows(run: Run) -> TrainingRows:
    """Open the rows of `corpus.source`; collect them into a store first, where they shall be and fit.

    Raises:
        UserError: the corpus cannot be read, or is too small to keep a part of it from training.
    """
    experiment = run.experiment
    if _has_all_sites(run):
        return _stored_rows(run)
    model = load_model(experiment.model, choose_device(run.device))
    corpus = sae_corpus(run, model)
    sites = experiment.activations.sites
    needed = sum(n_bytes(corpus.sequences, model.width(site), experiment.activations.dtype) for site in sites)
    free = shutil.disk_usage(run.root).free
    if experiment.corpus.stored == "always" or (experiment.corpus.stored == "auto" and needed < 0.9 * free):
        fill(run, run.corpus, model, corpus, sites, rebuild=False)
        return _stored_rows(run)
    say(f"not stored ({needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB free): the model runs again for every epoch")
    return _live_rows(run, model, corpus)


def _has_all_sites(run: Run) -> bool:
    sites = run.experiment.activations.sites
    return run.corpus.is_complete() and set(sites) <= set(run.corpus.manifest().get("sites", []))


def _stored_rows(run: Run) -> TrainingRows:
    store = Store(run.corpus.folder)
    table = _with_held_out(read_prompts(run.corpus.folder), run.experiment)
    held_out = table["held_out"].to_numpy()[store.tokens.prompt]

    def measured(site: str) -> Iterator[Measured]:
        for start, stop in store.blocks(_block_rows(run)):
            wanted = held_out[start:stop]
            if wanted.any():
                rows = store.read(site, start, stop)[torch.from_numpy(wanted)]
                yield Measured(rows, store.tokens.role[start:stop][wanted])

    return TrainingRows(table, store.tokens, lambda sites: stored_source(store, sites, _block_rows(run)), measured)


def _live_rows(run: Run, model: Model, corpus: Corpus) -> TrainingRows:
    experiment = run.experiment
    config, dtype = experiment.activations, getattr(torch, experiment.activations.dtype)
    table = _with_held_out(corpus.table, experiment)
    batches = plan_batches(corpus.sequences, config, model.device)
    held_out = [sequence for sequence, out in zip(corpus.sequences, table["held_out"], strict=True) if out]
    measured_batches = plan_batches(held_out, config, model.device)
    roles = joined([batch.tokens for batch in measured_batches]).role

    def measured(site: str) -> Iterator[Measured]:
        source = live_source(model, measured_batches, [site], dtype, _block_rows(run))
        for block, (start, stop) in enumerate(pairwise(source.starts)):
            yield Measured(source.read(block)[0], roles[start:stop])

    return TrainingRows(
        table,
        joined([batch.tokens for batch in batches]),
        lambda sites: live_source(model, batches, sites, dtype, _block_rows(run)),
        measured,
    )


def _block_rows(run: Run) -> int:
    return max(run.experiment.saes.buffer_rows // BLOCKS_PER_BUFFER, 1)


def _with_held_out(table: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """Add which prompts are kept from training, chosen by hash within each split."""
    ranks = keyed_ranks(table, ["split"], f"held out {experiment.seed}").to_numpy()
    sizes = table.groupby("split")["prompt"].transform("size").to_numpy()
    held_out = ranks < np.ceil(experiment.saes.held_out * sizes)
    if not held_out.any() or held_out.all():
        raise UserError("saes.held_out leaves nothing to train on or nothing to measure on: --set saes.held_out=0.05")
    return table.assign(held_out=held_out)

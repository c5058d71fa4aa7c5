"""Stage: train one SAE per site from the store, and measure them on prompts kept from training."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sfc.activations.store import Store, shuffled_batches
from sfc.artifacts import write_csv
from sfc.config import Experiment
from sfc.errors import UserError
from sfc.models.batches import SlotLayout, make_batches
from sfc.models.loading import choose_device, load_model
from sfc.pipeline import Run
from sfc.progress import progress_bar, say
from sfc.prompts.keyed import keyed_ranks
from sfc.saes.dictionary import Dictionary, TopKDictionary
from sfc.saes.quality import reconstruction_quality
from sfc.saes.saelens_format import load_dictionary, save_dictionary
from sfc.saes.splice import splicing_quality
from sfc.saes.train import Progress, train_saes
from sfc.stages.collect import PROMPTS_FILE
from sfc.stages.foreign import adopt_dictionaries

QUALITY_FILE = "quality.csv"
_SAMPLE_ROWS = 4096
_SPLICED_PROMPTS = 32


def make_saes(run: Run, rebuild: bool = False) -> None:
    """Train what is missing, site by site, or take what `saes.source` names; then measure all.

    Raises:
        UserError: the store is corrupt or too small, training diverges, or a dictionary of others does not fit.
    """
    began = time.perf_counter()
    experiment, artifact = run.experiment, run.saes
    store = Store(run.store.folder)
    prompts = pd.read_csv(run.store.folder / PROMPTS_FILE, index_col="store_index", keep_default_na=False)
    held_out = _held_out(prompts, experiment)
    sites = experiment.activations.sites
    source = experiment.saes.source
    doing = f"training {len(sites)} SAEs on" if source is None else f"checking {source} against"
    say(f"{doing} {store.n_tokens:,} rows, into {artifact.folder}")
    with artifact.being_made(rebuild) as folder:
        if source is None:
            _train_missing(run, store, folder, ~held_out[store.tokens.prompt])
        else:
            adopt_dictionaries(run, source, folder, lambda site: _rows_of(store, site, held_out[store.tokens.prompt]))
        quality = _quality(run, store, load_dictionaries(folder, sites, choose_device(run.device)), prompts, held_out)
        write_csv(folder / QUALITY_FILE, lambda path: quality.to_csv(path, index=False, float_format="%.6g"))
        artifact.finish(
            source=source or "trained",
            variance_unexplained=round(float(quality["fvu"].mean()), 6),
            seconds=round(time.perf_counter() - began, 2),
        )


def load_dictionaries(folder: Path, sites: list[str], device: torch.device | str = "cpu") -> dict[str, Dictionary]:
    """The dictionaries of a folder, one per site, in the order of the sites.

    Raises:
        UserError: one is missing or corrupt.
    """
    return {site: load_dictionary(folder / site, device) for site in sites}


def _train_missing(run: Run, store: Store, folder: Path, train_rows: np.ndarray) -> None:
    """Train and save the dictionaries that the folder lacks, `layers_at_once` at a time."""
    config = run.experiment.saes
    missing = [site for site in run.experiment.activations.sites if not (folder / site / "cfg.json").is_file()]
    groups = [missing[i : i + config.layers_at_once] for i in range(0, len(missing), config.layers_at_once)]
    with progress_bar("training", len(missing) * config.steps * config.batch_size, "rows") as progress:
        for group in groups:
            for dictionary in _train_group(run, store, group, train_rows, progress):
                save_dictionary(dictionary, folder / dictionary.site, _metadata(run))


def _train_group(
    run: Run, store: Store, sites: list[str], train_rows: np.ndarray, progress: Callable[[int], None]
) -> list[TopKDictionary]:
    experiment = run.experiment
    wanted = np.flatnonzero(train_rows)
    batches = shuffled_batches(store, sites, wanted, experiment.saes.batch_size, experiment.seed)
    sample = next(shuffled_batches(store, sites, wanted, min(_SAMPLE_ROWS, len(wanted)), experiment.seed))

    def on_step(state: Progress) -> None:
        progress(len(sites) * experiment.saes.batch_size)

    return train_saes(
        batches,
        sample,
        experiment.saes,
        sites=sites,
        seed=experiment.seed,
        device=choose_device(run.device),
        on_step=on_step,
    )


def _held_out(prompts: pd.DataFrame, experiment: Experiment) -> np.ndarray:
    """Which prompts are kept from training, chosen by hash within each split."""
    ranks = keyed_ranks(prompts, ["split"], f"held out {experiment.seed}").to_numpy()
    sizes = prompts.groupby("split")["prompt"].transform("size").to_numpy()
    held_out = ranks < np.ceil(experiment.saes.held_out * sizes)
    if not held_out.any() or held_out.all():
        raise UserError("saes.held_out leaves nothing to train on or nothing to measure on: --set saes.held_out=0.05")
    return held_out


def _metadata(run: Run) -> dict[str, str]:
    return {"preset": run.experiment.name, "model": run.experiment.model.source, "sfc_store": run.store.fingerprint}


def _quality(
    run: Run, store: Store, dictionaries: dict[str, Dictionary], prompts: pd.DataFrame, held_out: np.ndarray
) -> pd.DataFrame:
    """One row per site: reconstruction on held-out rows, and what splicing the SAE in costs the model."""
    device = choose_device(run.device)
    model = load_model(run.experiment.model, device)
    texts = prompts["prompt"][held_out].tolist()[:_SPLICED_PROMPTS]
    tokenized = model.tokenize(texts)
    batches = make_batches(tokenized, SlotLayout.of(tokenized), run.experiment.activations.batch_tokens, device)
    rows = []
    with progress_bar("measuring", len(dictionaries), "SAEs") as progress:
        for site, dictionary in dictionaries.items():
            x = _rows_of(store, site, held_out[store.tokens.prompt]).to(device)
            reconstruction = reconstruction_quality(dictionary, x)
            spliced = splicing_quality(model, dictionary, batches)
            rows.append({"site": site, **reconstruction._asdict(), **spliced._asdict()})
            progress(1)
    return pd.DataFrame(rows)


def _rows_of(store: Store, site: str, wanted: np.ndarray) -> Tensor:
    parts = [
        store.read(site, start, stop)[torch.from_numpy(wanted[start:stop])] for start, stop in store.blocks(1 << 14)
    ]
    return torch.cat(parts)

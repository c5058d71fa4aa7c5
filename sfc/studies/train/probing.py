"""What the features of a dictionary tell of prompts: sparse probing, after SAEBench (Karvonen et al. 2025).

A probe that may read only one feature, or five, is compared with one that reads the whole activation, and with probes
on a random dictionary. Features are averaged over the tokens of a prompt. Probes are learned on discovery prompts and
judged on test prompts, by their AUROC.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.errors import UserError
from sfc.core.progress import progress_bar
from sfc.core.sites import in_order
from sfc.data.schema import keyed_ranks
from sfc.models.score import auroc
from sfc.saes.collect import activations_of
from sfc.saes.dictionary import Dictionary
from sfc.saes.nulls import random_dictionary
from sfc.saes.plan import joined, plan_batches
from sfc.session import Session
from sfc.studies.probe.measure import ridge

SIZES = (1, 5)
"""how many features a probe reads"""
TARGETS = ("label", "category")
COLUMNS = [
    f"probe_{target}_{end}"
    for target in TARGETS
    for end in ("dense", *SIZES, *(f"{size}_random" for size in SIZES))
]  # fmt: skip
"""of `quality.csv`"""
PROBED_PROMPTS = 150
_ROWS_AT_ONCE = 4096


def probing_quality(session: Session, dictionaries: Mapping[str, Dictionary]) -> dict[str, dict[str, float | None]]:
    """How well features tell the labels and the categories of prompts, for each site, in the columns `COLUMNS`.

    The figure of categories is the mean over them, each against all others. None where a side has no prompts, or where
    a dictionary has no fixed number of active features, so that there is no random one like it.
    """
    run, model = session.run, session.model
    prompts = _some(run.prompts.frame, run.experiment.seed)
    batches = plan_batches(model.tokenize(prompts["prompt"].tolist()), run.experiment.activations, model.device)
    prompt_of_row = joined([batch.tokens for batch in batches]).prompt
    dtype, sites = getattr(torch, run.experiment.activations.dtype), [each.reads for each in dictionaries.values()]
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    with progress_bar("what features tell", len(prompts), "prompts") as progress:
        for batch in batches:
            for site, rows in activations_of(model, batch, in_order(sites), dtype).items():
                parts[site].append(rows)
            progress(len(batch.batch.prompts))
    test, targets = (prompts["split"] == "test").to_numpy(), _targets(prompts)
    figures = {}
    for site, dictionary in dictionaries.items():
        rows = torch.cat(parts[dictionary.reads]) if dictionary.reads in parts else torch.empty(0)
        read = {"": pooled_features(dictionary, rows, prompt_of_row)}
        try:
            null = random_dictionary(dictionary, run.experiment.seed)
            read["_random"] = pooled_features(null, rows, prompt_of_row)
        except UserError:
            pass
        dense = pooled(rows.float().cpu(), prompt_of_row)
        found = dict.fromkeys(COLUMNS)
        for target, sides in targets.items():
            found[f"probe_{target}_dense"] = _mean_auroc(dense, sides, test, None)
            for end, features in read.items():
                for size in SIZES:
                    found[f"probe_{target}_{size}{end}"] = _mean_auroc(features, sides, test, size)
        figures[site] = found
    return figures


def sparse_probe(
    values: Float[np.ndarray, "prompts columns"],
    positive: Bool[np.ndarray, " prompts"],
    test: Bool[np.ndarray, " prompts"],
    size: int | None,
) -> float | None:
    """The AUROC on test prompts of a ridge probe that is learned on the others.

    It reads the `size` columns whose means differ most between the two sides there, in standard deviations (SAEBench
    takes them as they are, and so the features of large values), or all. None where a side is empty.
    """
    learned = positive[~test]
    if learned.all() or not learned.any():
        return None
    if size is not None:
        means, spread = [values[~test][side].mean(0) for side in (learned, ~learned)], values[~test].std(0)
        contrast = (means[0] - means[1]) / np.where(spread > 0, spread, np.inf)
        values = values[:, np.argsort(-np.abs(contrast), kind="stable")[:size]]
    return auroc(ridge(values[~test], learned[:, None].astype(float), values[test])[:, 0], positive[test])


def pooled(rows: Float[Tensor, "rows columns"], prompt_of_row: Int[np.ndarray, " rows"]) -> np.ndarray:
    """The mean over each prompt's rows, in float64."""
    prompts, counts = torch.from_numpy(prompt_of_row), np.bincount(prompt_of_row)
    sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64).index_add_(0, prompts, rows.double())
    return sums.numpy() / counts[:, None]


@torch.no_grad()
def pooled_features(
    dictionary: Dictionary, rows: Float[Tensor, "rows d_in"], prompt_of_row: Int[np.ndarray, " rows"]
) -> Float[np.ndarray, "prompts d_sae"]:
    """Feature values, averaged over each prompt's rows."""
    counts = np.bincount(prompt_of_row)
    sums = torch.zeros(len(counts), dictionary.d_sae, dtype=torch.float64)
    for part, of in zip(rows.split(_ROWS_AT_ONCE), torch.from_numpy(prompt_of_row).split(_ROWS_AT_ONCE), strict=True):
        values, indices = dictionary.encode_sparse(part.to(dictionary.W_dec.device, torch.float32))
        places = of[:, None].expand(indices.shape), indices.cpu()
        sums.index_put_(places, values.double().cpu(), accumulate=True)
    return sums.numpy() / counts[:, None]


def _some(prompts: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Discovery and test prompts, a share of each category and label, chosen by their hashes."""
    prompts = prompts[prompts["split"].isin(["discovery", "test"])]
    ranks = keyed_ranks(prompts, ["split", "category", "refusal_label"], f"probed {seed}").to_numpy()
    order = prompts.assign(rank=ranks).sort_values("rank", kind="stable")
    return order.groupby("split", sort=True).head(PROBED_PROMPTS).reset_index(drop=True)


def _targets(prompts: pd.DataFrame) -> dict[str, list[Bool[np.ndarray, " prompts"]]]:
    """What is to be told: one side of each question."""
    categories = prompts["category"].to_numpy()
    return {
        "label": [prompts["refusal_label"].to_numpy(bool)],
        "category": [categories == category for category in np.unique(categories)],
    }


def _mean_auroc(
    values: np.ndarray,
    sides: Sequence[Bool[np.ndarray, " prompts"]],
    test: Bool[np.ndarray, " prompts"],
    size: int | None,
) -> float | None:
    found = [sparse_probe(values, positive, test, size) for positive in sides]
    measured = [value for value in found if value is not None]
    return float(np.mean(measured)) if measured else None

"""What discovery works on: one question, put to one model, with everything needed to answer it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import Baseline
from sfc.circuits.counterfactuals import Counterfactuals
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import DiscoveryOptions
from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.data.similarity import topic_pairs
from sfc.models.batches import Batch
from sfc.models.loading import Model
from sfc.models.running import CachedResidual, cached_residual_after, layer_before
from sfc.models.score import Score
from sfc.saes.dictionary import Dictionary
from sfc.saes.store import Store

_BLOCK_ROWS = 4096


@torch.no_grad()
def aggregated_features(
    store: Store, dictionary: Dictionary, prompts: Int[np.ndarray, " prompts"], how: Literal["mean", "max", "last"]
) -> Float[np.ndarray, "prompts d_sae"]:
    """Mean or maximum over a prompt's stored tokens, or the value at its last token.

    Args:
        prompts: numbers of prompts in the store.

    Raises:
        UserError: a prompt has no rows in the store.
    """
    device = dictionary.W_dec.device
    row_of_prompt = np.full(int(max(store.tokens.prompt.max(), prompts.max())) + 1, -1)
    row_of_prompt[prompts] = np.arange(len(prompts))
    target = row_of_prompt[store.tokens.prompt]
    counts = np.bincount(target[target >= 0], minlength=len(prompts))
    if (counts == 0).any():
        raise UserError(f"{store.folder} has no activations of {(counts == 0).sum()} of the prompts; run `sfc collect`")
    last_position = np.full(len(prompts), -1)
    np.maximum.at(last_position, target[target >= 0], store.tokens.position[target >= 0])

    # Feature values are never negative, so zeros are the start of a sum and of a maximum alike.
    result = torch.zeros(len(prompts), dictionary.d_sae, device=device)
    for start, stop in store.blocks(_BLOCK_ROWS):
        wanted = target[start:stop] >= 0
        if how == "last":
            wanted &= store.tokens.position[start:stop] == last_position[target[start:stop]]
        if not wanted.any():
            continue
        rows = store.read(dictionary.reads, start, stop)[torch.from_numpy(wanted)].to(device)
        index = torch.from_numpy(target[start:stop][wanted]).to(device)
        features = dictionary.encode(rows)
        if how == "max":
            result.scatter_reduce_(0, index[:, None].expand_as(features), features, "amax")
        else:
            result.index_add_(0, index, features)
    if how == "mean":
        result /= torch.from_numpy(counts).to(device)[:, None]
    return result.cpu().numpy()


def distinct_prompts(batch: Batch) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " batch"]]:
    """In a batch of pairs a prompt may be in several rows: the first of each, and which of these a row is."""
    prompts = torch.cat([batch.ids, batch.lengths[:, None]], dim=1)
    unique, row = prompts.unique(dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(row), device=row.device)
    first.scatter_reduce_(0, row, torch.arange(len(row), device=row.device), "amin")
    return first, row


def _each_prompt_once(model: Model, batch: Batch, layer: int) -> CachedResidual:
    """The residual stream of a batch in which a prompt may be in several pairs: it is run once."""
    if batch.pair is None:
        return cached_residual_after(model, batch, layer)
    first, row = distinct_prompts(batch)
    return cached_residual_after(model, batch.select(first), layer).select(row)


@dataclass(frozen=True)
class PromptRuns:
    """Batches of prompts whose runs start from a cached residual stream before the first dictionary."""

    batches: Sequence[Batch]
    cached_residuals: Sequence[CachedResidual]

    @classmethod
    def of(cls, model: Model, batches: Sequence[Batch], first_site: str) -> "PromptRuns":
        """Run every batch once, up to the first site."""
        return cls(batches, [_each_prompt_once(model, batch, layer_before(first_site)) for batch in batches])

    def __iter__(self) -> Iterator[tuple[Batch, CachedResidual]]:
        return zip(self.batches, self.cached_residuals, strict=True)

    @property
    def n_prompts(self) -> int:
        return sum(len(batch.prompts) for batch in self.batches)

    @property
    def are_pairs(self) -> bool:
        """Whether every row is a prompt with a counterfactual."""
        return all(batch.pair is not None for batch in self.batches)

    def sample(self, count: int, seed: int) -> "PromptRuns":
        """At most `count` of the prompts, drawn at random, renumbered from 0, in the batches they are in."""
        return self.subset(np.random.default_rng(seed).permutation(self.n_prompts)[:count])

    def halves(self, seed: int) -> tuple["PromptRuns", "PromptRuns"]:
        """The prompts in two halves, drawn at random; of an odd number one is in neither."""
        order, half = np.random.default_rng(seed).permutation(self.n_prompts), self.n_prompts // 2
        return self.subset(order[:half]), self.subset(order[half : 2 * half])

    def subset(self, chosen: Int[np.ndarray, " chosen"]) -> "PromptRuns":
        """These prompts, renumbered from 0, in the batches they are in."""
        batches, cached_residuals, n_taken = [], [], 0
        for batch, cached in self:
            rows = torch.from_numpy(np.flatnonzero(np.isin(batch.prompts.cpu().numpy(), chosen))).to(batch.ids.device)
            if len(rows):
                numbers = torch.arange(n_taken, n_taken + len(rows), device=batch.ids.device)
                batches.append(replace(batch.select(rows), prompts=numbers))
                cached_residuals.append(cached.select(rows))
                n_taken += len(rows)
        return PromptRuns(batches, cached_residuals)

    def joined(self, other: "PromptRuns") -> "PromptRuns":
        """The prompts of both, those of `other` numbered after these."""
        shifted = [replace(batch, prompts=batch.prompts + self.n_prompts) for batch in other.batches]
        return PromptRuns([*self.batches, *shifted], [*self.cached_residuals, *other.cached_residuals])


@dataclass(frozen=True)
class Problem:
    """One discovery problem: which nodes move the score on the discovery prompts of one category?"""

    model: Model
    score: Score
    ablation: Ablation
    runs: PromptRuns
    """discovery prompts of the population that the circuit explains"""
    store: Store
    prompts: pd.DataFrame
    """discovery prompts of the category, both sides: `prompt`, `refusal_label`, and `store_index`, their number in the
    store; `topic` where the data set lists topics"""
    experiment: Experiment
    """where methods find their settings"""
    judge: Callable[[str], bool] | None = None
    """whether a reply shows the behavior; None where replies do not tell"""
    pair_table: pd.DataFrame | None = None
    """with counterfactuals, a row per pair in the order of their numbers: `id` and `counterfactual`, the prompts' ids,
    and `kind`, what prompts like the explained one are called"""
    pooled: "Callable[[], Problem] | None" = None
    """the same question about the discovery prompts of all categories, for methods that would learn the few prompts of
    one by heart; None where there are no others, or where the answer must come from these prompts alone"""

    @property
    def config(self) -> DiscoveryOptions:
        """The settings of discovery."""
        return DiscoveryOptions.of(self.experiment)

    def with_settings(self, **sections: Mapping[str, Any]) -> "Problem":
        """The same problem with some settings changed: `with_settings(learned_mask={"steps": 10})`."""
        update = {name: getattr(self.experiment, name).model_copy(update=values) for name, values in sections.items()}
        return replace(self, experiment=self.experiment.model_copy(update=update))

    def read_by(self, dictionaries: Mapping[str, Dictionary]) -> "Problem":
        """The same question in other dictionaries at the same sites; its baseline is `Counterfactuals`.

        Raises:
            UserError: the baseline is another one.
        """
        baseline = self.ablation.baseline
        if not isinstance(baseline, Counterfactuals):
            raise UserError(
                "other dictionaries are compared under counterfactual ablation: leave discovery.baseline out"
            )
        ablation = replace(
            self.ablation,
            nodes=Nodes.of_spaces(dictionaries),
            dictionaries=dictionaries,
            baseline=baseline.with_spaces(dictionaries),
        )
        pooled = self.pooled
        return replace(self, ablation=ablation, pooled=pooled and (lambda: pooled().read_by(dictionaries)))

    @property
    def labels(self) -> Bool[np.ndarray, " prompts"]:
        """True for prompts that call for the behavior, in the order of `prompts`."""
        return self.prompts["refusal_label"].to_numpy(dtype=bool)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """A positive and a negative prompt each, on the same topic wherever possible, by their places in `prompts`."""
        topics = self.prompts["topic"].tolist() if "topic" in self.prompts else None
        return topic_pairs(self.prompts["prompt"].tolist(), self.labels, topics)

    @cached_property
    def features(self) -> Mapping[str, Float[np.ndarray, "prompts d_sae"]]:
        """Feature values of each prompt, aggregated over the sequence as the configuration says."""
        indices, row = np.unique(self.prompts["store_index"].to_numpy(), return_inverse=True)
        return {
            site: aggregated_features(self.store, dictionary, indices, self.config.aggregation)[row]
            if dictionary.d_sae
            else np.zeros((len(row), 0))
            for site, dictionary in self.ablation.dictionaries.items()
        }

    @cached_property
    def firing_rates(self) -> Float[np.ndarray, " nodes"]:
        """For each feature the share of the prompts in which it is active at all; 1 for errors and components."""
        shares = ((values > 0).mean(0) for values in self.features.values())
        return self.ablation.nodes.of_features(shares, elsewhere=1.0)


class Task(NamedTuple):
    """Everything that discovery and evaluation must be told beside the model and its dictionaries."""

    score: Score
    baseline: Baseline
    discovery: list[Batch]
    """the prompts that the circuit explains"""
    test: list[Batch]
    labelled: pd.DataFrame
    """all discovery prompts, those explained and others: columns `prompt`, `refusal_label`"""
    population: str
    """what the prompts explained are called"""
    facts: dict[str, Any]
    """for the manifest: `prompts` (a frame), `score_auroc`, and what else there is to say"""
    pair_table: pd.DataFrame | None = None
    """with counterfactuals, a row per pair in the order of their numbers: see `Problem`"""

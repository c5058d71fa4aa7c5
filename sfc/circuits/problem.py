"""What discovery works on: one question, put to one model, with everything needed to answer it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from sfc.ablation.ablate import Ablation
from sfc.activations.store import Store
from sfc.circuits.aggregate import aggregated_features
from sfc.config import DiscoveryConfig
from sfc.models.batches import Batch
from sfc.models.loading import Model
from sfc.models.running import Prefix, prefix_after
from sfc.models.score import RefusalScore
from sfc.sites import layer_of


@dataclass(frozen=True)
class PromptRuns:
    """Batches of prompts whose runs start from a cached residual stream before the first dictionary."""

    batches: Sequence[Batch]
    prefixes: Sequence[Prefix]

    @classmethod
    def of(cls, model: Model, batches: Sequence[Batch], first_site: str) -> "PromptRuns":
        """Run every batch once, up to the first site."""
        return cls(batches, [prefix_after(model, batch, layer_before(first_site)) for batch in batches])

    def __iter__(self) -> Iterator[tuple[Batch, Prefix]]:
        return zip(self.batches, self.prefixes, strict=True)

    @property
    def n_prompts(self) -> int:
        return sum(len(batch.prompts) for batch in self.batches)


def layer_before(site: str) -> int:
    """The last block whose output the activation at `site` depends on and no dictionary has touched."""
    return layer_of(site) if site.endswith("resid_post") else layer_of(site) - 1


@dataclass(frozen=True)
class Problem:
    """One discovery problem: which nodes move the score on the discovery prompts of one category?"""

    model: Model
    score: RefusalScore
    ablation: Ablation
    runs: PromptRuns
    """discovery prompts of the population that the circuit explains"""
    store: Store
    prompts: pd.DataFrame
    """discovery prompts of the category, both sides; `store_index` is their number in the store"""
    config: DiscoveryConfig

    @property
    def labels(self) -> Bool[np.ndarray, " prompts"]:
        """True for prompts that should be refused, in the order of `prompts`."""
        return self.prompts["refusal_label"].to_numpy(dtype=bool)

    @cached_property
    def features(self) -> Mapping[str, Float[np.ndarray, "prompts d_sae"]]:
        """Feature values of each prompt, aggregated over the sequence as the configuration says."""
        indices = self.prompts["store_index"].to_numpy()
        return {
            site: aggregated_features(self.store, dictionary, indices, self.config.aggregation)
            for site, dictionary in self.ablation.dictionaries.items()
        }

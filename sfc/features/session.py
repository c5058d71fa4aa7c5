"""One prompt under the microscope: which features fire on which token, and what scaling them does to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.circuits.nodes import Nodes
from sfc.circuits.spaces import sites_of
from sfc.core.sites import in_order
from sfc.models import engine
from sfc.models.batches import PACKED_TOKENS, Batch, TemplateLayout, make_batches
from sfc.models.edits import Steering
from sfc.models.engine import Alike, Edits, PreparedPrompts
from sfc.models.interventions import Intervention, Interventions, chained, recorder
from sfc.models.loading import Model
from sfc.models.running import activations_at
from sfc.models.score import Score
from sfc.saes.dictionary import Dictionary


class Firing(NamedTuple):
    """The values of some features on a prompt, the template around it included."""

    tokens: list[str]
    values: Float[np.ndarray, "tokens features"]


@dataclass(frozen=True)
class PromptSession:
    """A model and its dictionaries, ready for single prompts. The last prompt's plain run is kept: runs start from it.

    `factors` of its methods are numbers by node name, such as `{"resid_post.21/F463": 0}`: what the feature's value is
    multiplied with at every token but the first, the attention sink. 0 switches it off, 2 doubles it. Later features
    are encoded from what this leaves, and the reconstruction error stays as it is. `steering` is an edit at one site
    and some tokens beside it (see `sfc.studies.steer.directions.steer`); features of its own site are scaled first.
    """

    model: Model
    score: Score
    dictionaries: Mapping[str, Dictionary]
    _kept: dict[str, PreparedPrompts] = field(default_factory=dict, init=False, repr=False, compare=False)

    @torch.no_grad()
    def fires(self, prompt: str, features: Sequence[str]) -> Firing:
        """The values of these features on each token.

        Raises:
            UserError: there is no such feature.
        """
        prepared = self._prepared(prompt)
        [batch] = prepared.batches
        by_site = self._by_site(dict.fromkeys(features, 1.0))
        values, activations = {}, {}
        if by_site:
            sites = sites_of({site: self.dictionaries[site] for site in by_site})
            activations = activations_at(self.model, batch, sites, prepared.start(0, next(iter(by_site))))
        for site, of_site in by_site.items():
            dictionary = self.dictionaries[site]
            dense = dictionary.encode(activations[dictionary.reads][0].float())
            values |= {name: dense[:, feature].cpu().numpy() for feature, (name, _) in of_site.items()}
        tokens = [self.model.tokenizer.decode([token]) for token in batch.ids[0].tolist()]
        table = np.stack([values[name] for name in features], axis=1) if features else np.zeros((len(tokens), 0))
        table[0] = 0  # the attention sink is no token that features are about
        return Firing(tokens, table)

    def score_of(
        self, prompt: str, factors: Mapping[str, float] | None = None, steering: Steering | None = None
    ) -> float:
        """The score in nats, with some features scaled, and steered.

        Raises:
            UserError: there is no such feature.
        """
        return float(engine.scores(self._prepared(prompt), self.score, self._edits(factors or {}, steering))[0, 0])

    def reply(
        self,
        prompt: str,
        factors: Mapping[str, float] | None = None,
        max_new_tokens: int = 40,
        steering: Steering | None = None,
    ) -> str:
        """The greedy reply, with some features scaled at every token of prompt and reply, and steered.

        Raises:
            UserError: there is no such feature.
        """
        edits = self._edits(factors or {}, steering)
        return engine.replies(self._prepared(prompt), self.score, edits, max_new_tokens).texts[0][0]

    def _prepared(self, prompt: str) -> PreparedPrompts:
        if prompt not in self._kept:
            prompts = self.model.tokenize([prompt])
            batches = make_batches(prompts, TemplateLayout.of(prompts), PACKED_TOKENS, self.model.device)
            self._kept.clear()
            self._kept[prompt] = PreparedPrompts.of(self.model, batches)
        return self._kept[prompt]

    def _edits(self, factors: Mapping[str, float], steering: Steering | None) -> Edits:
        by_site = {
            site: {feature: factor for feature, (_, factor) in of_site.items()}
            for site, of_site in self._by_site(factors).items()
        }
        return Scaling(self.dictionaries, by_site, steering)

    def _by_site(self, factors: Mapping[str, float]) -> dict[str, dict[int, tuple[str, float]]]:
        """By site and number within it, in the order of the sites: the feature's name and its factor."""
        nodes = Nodes.of_spaces(self.dictionaries)
        sites = nodes.site_numbers
        by_site: dict[str, dict[int, tuple[str, float]]] = {}
        for number, name in sorted((nodes.number(name), name) for name in factors):
            site = nodes.sites[sites[number]]
            if nodes.is_feature[number]:
                feature = int(name.rpartition("/F")[2])
                by_site.setdefault(site, {})[feature] = (name, factors[name])
        return by_site


@dataclass(frozen=True)
class Scaling(Edits):
    """One edit: features are scaled at every token of prompt and reply, and the result is steered."""

    dictionaries: Mapping[str, Dictionary]
    factors: Mapping[str, Mapping[int, float]]
    """by site and feature"""
    steering: Steering | None = None
    """a single edit"""

    def __len__(self) -> int:
        return 1

    def alike(self) -> Sequence[Alike]:
        """See `Edits`."""
        sites = [*self.factors, *(self.steering.edits[0].sites if self.steering else ())]
        return [Alike([0], in_order(sites)[0] if sites else None)]

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        """See `Edits`."""
        steered = self.steering.interventions(batch, members) if self.steering else Interventions()
        scaled = (self._scaled(batch.touchable), self._scaled(None))
        return Interventions(*(_one_after_another(*both) for both in zip(scaled, steered, strict=True)))

    def _scaled(self, where: Bool[Tensor, "batch pos"] | None) -> dict[str, Intervention]:
        """What scales features at some tokens, or at all; what transcoders read is what the sites before it leave."""
        acting: dict[str, Intervention] = {}
        read: dict[str, Tensor] = {}
        for site, factors in self.factors.items():
            dictionary = self.dictionaries[site]
            if (reads := dictionary.reads) != site and reads not in read:
                acting[reads] = chained(acting.get(reads), recorder(read, reads))
            acting[site] = _scaling(dictionary, factors, where, read)
        return acting


def _scaling(
    dictionary: Dictionary,
    factors: Mapping[int, float],
    where: Bool[Tensor, "batch pos"] | None,
    read: Mapping[str, Tensor],
) -> Intervention:
    """Scale features at some tokens, or at all, as they are in what is read."""
    change = torch.zeros(dictionary.d_sae, device=dictionary.W_dec.device)
    for feature, factor in factors.items():
        change[feature] = factor - 1

    def scale(activation: Tensor) -> Tensor:
        scaled = activation.new_ones(activation.shape[:2], dtype=torch.bool) if where is None else where
        x = activation[scaled].float()
        encoded = x if dictionary.reads == dictionary.site else read[dictionary.reads][scaled].float()
        values, indices = dictionary.encode_sparse(encoded)
        added = dictionary.decode_sparse(values * change[indices], indices) - dictionary.b_dec
        return activation.masked_scatter(scaled[..., None], (x + added).to(activation.dtype))

    return scale


def _one_after_another(
    first: Mapping[str, Intervention], second: Mapping[str, Intervention]
) -> dict[str, Intervention]:
    return {**first, **{site: chained(first.get(site), acts) for site, acts in second.items()}}

"""One prompt under the microscope: which features fire on which token, and what scaling them does to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.nodes import Nodes
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, SlotLayout, make_batches
from sfc.models.edits import Steering, editing
from sfc.models.generation import generate_replies
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.running import Prefix, every_prefix, layer_before, run_to
from sfc.models.score import RefusalScore, score_batch
from sfc.saes.dictionary import Dictionary

_BATCH_TOKENS = 4096


class Firing(NamedTuple):
    """The values of some features on a prompt, the template around it included."""

    tokens: list[str]
    values: Float[np.ndarray, "tokens features"]


class _Plain(NamedTuple):
    """A prompt's run with nothing changed, stopped after each layer."""

    batch: Batch
    prefixes: dict[int, Prefix]

    def before(self, sites: Sequence[str]) -> Prefix:
        """The last prefix that changes at these sites leave as it is."""
        return self.prefixes[min(map(layer_before, sites), default=max(self.prefixes))]


@dataclass(frozen=True)
class Probe:
    """A model and its dictionaries, ready for single prompts. The last prompt's plain run is kept: runs start from it.

    `factors` of its methods are numbers by node name, such as `{"resid_post.21/F463": 0}`: what the feature's value is
    multiplied with at every token but the first, the attention sink. 0 switches it off, 2 doubles it. Later features
    are encoded from what this leaves, and the reconstruction error stays as it is. `steering` is an edit at one site
    and some tokens beside it (see `sfc.studies.steer.directions.steer`); features of its own site are scaled first.
    """

    model: Model
    score: RefusalScore
    dictionaries: Mapping[str, Dictionary]
    _kept: dict[str, _Plain] = field(default_factory=dict, init=False, repr=False, compare=False)

    @torch.no_grad()
    def fires(self, prompt: str, features: Sequence[str]) -> Firing:
        """The values of these features on each token.

        Raises:
            UserError: there is no such feature.
        """
        plain = self._plain(prompt)
        activations: dict[str, Tensor] = {}
        by_site = self._by_site(dict.fromkeys(features, 1.0))
        values = {}
        if by_site:
            recorders = {site: recorder(activations, site) for site in by_site}
            run_to(self.model, plain.batch, recorders, list(by_site)[-1], plain.before(list(by_site)))
        for site, of_site in by_site.items():
            dense = self.dictionaries[site].encode(activations[site][0].float())
            values |= {name: dense[:, feature].cpu().numpy() for feature, (name, _) in of_site.items()}
        tokens = [self.model.tokenizer.decode([token]) for token in plain.batch.ids[0].tolist()]
        table = np.stack([values[name] for name in features], axis=1) if features else np.zeros((len(tokens), 0))
        table[0] = 0  # the attention sink is no token that features are about
        return Firing(tokens, table)

    @torch.no_grad()
    def score_of(
        self, prompt: str, factors: Mapping[str, float] | None = None, steering: Steering | None = None
    ) -> float:
        """The refusal score in nats, with some features scaled, and steered.

        Raises:
            UserError: there is no such feature.
        """
        plain, changes = self._plain(prompt), self._changes(prompt, factors or {}, steering)
        return float(score_batch(self.model, self.score, plain.batch, changes, plain.before(list(changes)))[0])

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
        prompts, changes = self.model.tokenize([prompt]), self._changes(prompt, factors or {}, steering)
        return generate_replies(self.model, prompts, max_new_tokens, _BATCH_TOKENS, changes)[0]

    def _plain(self, prompt: str) -> _Plain:
        if prompt not in self._kept:
            prompts = self.model.tokenize([prompt])
            [batch] = make_batches(prompts, SlotLayout.of(prompts), _BATCH_TOKENS, self.model.device)
            prefixes = every_prefix(self.model, batch)
            self._kept.clear()
            self._kept[prompt] = _Plain(batch, prefixes)
        return self._kept[prompt]

    def _by_site(self, factors: Mapping[str, float]) -> dict[str, dict[int, tuple[str, float]]]:
        """By site and number within it, in the order of the sites: the feature's name and its factor."""
        nodes = Nodes.of({site: dictionary.d_sae for site, dictionary in self.dictionaries.items()})
        sites = nodes.site_numbers
        by_site: dict[str, dict[int, tuple[str, float]]] = {}
        for number, name in sorted((nodes.number(name), name) for name in factors):
            site = nodes.sites[sites[number]]
            if not name.endswith("/error"):
                feature = int(name.rpartition("/F")[2])
                by_site.setdefault(site, {})[feature] = (name, factors[name])
        return by_site

    def _changes(self, prompt: str, factors: Mapping[str, float], steering: Steering | None) -> dict[str, Intervention]:
        changes = self._scaling(factors)
        if steering is not None:
            [tokenized] = self.model.tokenize([prompt])
            edit = _edit(steering, tokenized, self.model.device)
            for site in steering.edit.sites:
                changes[site] = _one_after_another(changes[site], edit) if site in changes else edit
        return changes

    def _scaling(self, factors: Mapping[str, float]) -> dict[str, Intervention]:
        return {
            site: _scale(self.dictionaries[site], {feature: factor for feature, (_, factor) in of_site.items()})
            for site, of_site in self._by_site(factors).items()
        }


def _scale(dictionary: Dictionary, factors: Mapping[int, float]) -> Intervention:
    change = torch.zeros(dictionary.d_sae, device=dictionary.W_dec.device)
    for feature, factor in factors.items():
        change[feature] = factor - 1

    def scale(activation: Tensor) -> Tensor:
        # A pass over several positions begins with the prompt's first token; a step of generation has one position.
        first = 1 if activation.shape[1] > 1 else 0
        x = activation[:, first:].float()
        values, indices = dictionary.encode_sparse(x.flatten(0, 1))
        added = dictionary.decode_sparse(values * change[indices], indices) - dictionary.b_dec
        scaled = (x + added.view_as(x)).to(activation.dtype)
        return torch.cat([activation[:, :first], scaled], dim=1)

    return scale


def _edit(steering: Steering, prompt: TokenizedPrompt, device: torch.device) -> Intervention:
    where = torch.from_numpy(steered_tokens(steering.positions, prompt, during_reply=False))[None].to(device)
    in_prompt, in_reply = editing([steering.edit], where), editing([steering.edit], None)

    def edit(activation: Tensor) -> Tensor | None:
        # As above: one position is a step of generation.
        if activation.shape[1] > 1:
            return in_prompt(activation)
        return in_reply(activation) if steering.during_reply else None

    return edit


def _one_after_another(first: Intervention, second: Intervention) -> Intervention:
    def both(activation: Tensor) -> Tensor | None:
        changed = first(activation)
        between = activation if changed is None else changed
        last = second(between)
        return between if last is None else last

    return both

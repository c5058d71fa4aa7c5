"""References: what a node's value is set to when it is ablated.

The mean reference is role-aligned: one value per slot (see `sfc.models.batches`), taken within a prompt first (content
tokens are pooled) and then across the prompts of the reference split, so that long prompts count no more than short.
The attention sink (the first token) is never pooled with others: where the template has no prefix, it would drown them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.errors import UserError
from sfc.models.batches import PAD_SLOT, Batch, SlotLayout
from sfc.models.interventions import recorder
from sfc.models.loading import Model
from sfc.models.running import run_to
from sfc.saes.dictionary import Dictionary


@dataclass(frozen=True)
class Reference:
    """Reference values per site and slot."""

    layout: SlotLayout
    """what the slots are"""
    features: Mapping[str, Float[Tensor, "slots d_sae"]]
    errors: Mapping[str, Float[Tensor, "slots d_in"]]


@torch.no_grad()
def mean_reference(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: SlotLayout
) -> Reference:
    """Role-aligned means of features and errors over the prompts of the batches.

    Raises:
        UserError: a slot of the layout occurs in none of the prompts.
    """
    sites = list(dictionaries)
    features = {site: torch.zeros(layout.n_slots, d.d_sae, device=model.device) for site, d in dictionaries.items()}
    activations = {site: torch.zeros(layout.n_slots, d.d_in, device=model.device) for site, d in dictionaries.items()}
    prompts_with_slot = torch.zeros(layout.n_slots, device=model.device)
    for batch in batches:
        seen: dict[str, Tensor] = {}
        run_to(model, batch, {site: recorder(seen, site) for site in sites}, sites[-1])
        counted = _counted(batch, layout)
        weights = _weights_within_prompts(batch, layout)
        prompts_with_slot.index_add_(0, batch.slots[counted], weights)
        for site, dictionary in dictionaries.items():
            x = seen[site][counted].float()
            features[site].index_add_(0, batch.slots[counted], dictionary.encode(x) * weights[:, None])
            activations[site].index_add_(0, batch.slots[counted], x * weights[:, None])
    if (prompts_with_slot == 0).any():
        raise UserError("the reference prompts do not cover every position of the template; use more of them")
    features = {site: total / prompts_with_slot[:, None] for site, total in features.items()}
    # Decoding is affine, so the mean error is the error of the means.
    errors = {
        site: total / prompts_with_slot[:, None] - dictionaries[site].decode(features[site])
        for site, total in activations.items()
    }
    return Reference(layout, features, errors)


def zero_reference(dictionaries: Mapping[str, Dictionary], layout: SlotLayout) -> Reference:
    """Zero for every feature and every error: of an ablated site only the decoder's bias is left."""
    n = layout.n_slots
    return Reference(
        layout,
        {site: d.W_dec.new_zeros(n, d.d_sae) for site, d in dictionaries.items()},
        {site: d.W_dec.new_zeros(n, d.d_in) for site, d in dictionaries.items()},
    )


def _counted(batch: Batch, layout: SlotLayout) -> Bool[Tensor, "batch pos"]:
    """Tokens that references are means of: neither padding nor a first token among the content."""
    counted = batch.slots != PAD_SLOT
    counted[:, 0] &= batch.slots[:, 0] != layout.n_prefix
    return counted


def _weights_within_prompts(batch: Batch, layout: SlotLayout) -> Float[Tensor, " tokens"]:
    """For each token that counts, one over the number of such tokens of its prompt in its slot."""
    counted = _counted(batch, layout)
    counts = torch.zeros(len(batch.lengths), layout.n_slots, device=batch.ids.device)
    counts.scatter_add_(1, batch.slots.clamp(min=0), counted.float())
    return (1 / counts).gather(1, batch.slots.clamp(min=0))[counted]

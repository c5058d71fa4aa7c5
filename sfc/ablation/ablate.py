"""Keep these nodes, ablate the rest: the intervention that every circuit is proved by.

Sites run in their order, and each dictionary encodes the *current* x. With m the mask of a circuit (1 keeps):
`x <- x_hat(m f + (1 - m) f_ref) + m_error (x - x_hat(f)) + (1 - m_error) error_ref`. Padding and the attention sink
are never touched. Since decoding is linear, the part that does not depend on x is a small table (a row per circuit and
slot), and the rest is one sparse decoding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfc.ablation.nodes import Nodes
from sfc.ablation.references import Reference
from sfc.config import ErrorMode
from sfc.linear import linear
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention
from sfc.saes.dictionary import Dictionary


@dataclass(frozen=True)
class Ablation:
    """What ablating means: which dictionaries and references, and what becomes of the errors.

    `error_mode`: `node` keeps or ablates an error like any node; `keep-current` keeps every error at its current value
    (errors are preserved, as in the published pipeline); `ablate` sets every error to its reference.
    """

    nodes: Nodes
    dictionaries: Mapping[str, Dictionary]
    reference: Reference
    error_mode: ErrorMode

    def interventions(
        self, keep: Float[Tensor, "circuits nodes"], circuit: Int[Tensor, " batch"], batch: Batch
    ) -> dict[str, Intervention]:
        """Interventions under which row b of the batch runs with the circuit `keep[circuit[b]]`.

        Args:
            keep: masks between 0 and 1; differentiable.
        """
        masks = self.nodes.split(self._with_error_mode(keep))
        return {site: self._at_site(site, mask, circuit, batch) for site, mask in masks.items()}

    def reference_activation(self, site: str) -> Float[Tensor, "slots d_in"]:
        """The activation that ablating all of a site's nodes leaves there."""
        return self.dictionaries[site].decode(self.reference.features[site]) + self.reference.errors[site]

    def _with_error_mode(self, keep: Tensor) -> Tensor:
        if self.error_mode == "node":
            return keep
        is_error = torch.from_numpy(self.nodes.is_error).to(keep.device)
        return torch.where(is_error, 1.0 if self.error_mode == "keep-current" else 0.0, keep)

    def _at_site(self, site: str, mask: Tensor, circuit: Tensor, batch: Batch) -> Intervention:
        dictionary = self.dictionaries[site]
        keep_feature, keep_error = mask[:, :-1], mask[:, -1]
        touchable = batch.touchable
        circuit_of_token = circuit[:, None].expand_as(batch.slots)[touchable]
        error_weight = keep_error[circuit_of_token]
        constant = self._ablated_part(site, mask, circuit_of_token, batch.slots[touchable])

        def ablate(activation: Tensor) -> Tensor:
            x = activation[touchable].float()
            values, indices = dictionary.encode_sparse(x)
            # m f + m_error (x - x_hat(f)) needs one decoding: of (m - m_error) f.
            weights = keep_feature[circuit_of_token[:, None], indices] - error_weight[:, None]
            kept_part = dictionary.decode_sparse(values * weights, indices) - dictionary.b_dec
            replaced = constant + kept_part + error_weight[:, None] * x
            return activation.masked_scatter(touchable[..., None], replaced.to(activation.dtype))

        return ablate

    def _ablated_part(
        self, site: str, mask: Tensor, circuit_of_token: Int[Tensor, " tokens"], slots: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_in"]:
        """What ablated nodes add up to at each token: the same for all tokens of one circuit and slot."""
        dictionary, features_ref = self.dictionaries[site], self.reference.features[site]
        row, row_of_token = (circuit_of_token * len(features_ref) + slots).unique(return_inverse=True)
        circuit, slot = row // len(features_ref), row % len(features_ref)
        ablated = 1 - mask[circuit]
        of_features = linear(features_ref[slot] * ablated[:, :-1], dictionary.W_dec.t())
        of_error = ablated[:, -1:] * (self.reference.errors[site][slot] + dictionary.b_dec)
        return (of_features + of_error)[row_of_token]

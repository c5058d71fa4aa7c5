"""Keep these nodes, ablate the rest: the intervention that every circuit is proved by.

Sites run in their order, and each dictionary encodes the *current* x. With m the mask of a circuit (1 keeps):
`x <- x_hat(m f + (1 - m) f_ref) + m_error (x - x_hat(f)) + (1 - m_error) error_ref`. Padding and the attention sink
are never touched. Since decoding is linear, the part that does not depend on x is known before the run (for means per
template position a small table, a row per circuit and template position), and the rest is one sparse decoding.

A transcoder encodes what the same run brings to the site that it reads, and x is what is written. Its skip connection S
is a node with a mask of its own: `+ m_skip S x_read + (1 - m_skip) skip_ref`, and the error is what features and skip
together miss.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from sfc.circuits.baselines import Baseline
from sfc.circuits.nodes import ERROR, Nodes
from sfc.circuits.options import ErrorMode
from sfc.circuits.spaces import NodeSpace, by_coordinate, left_over, sites_of, together
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention, chained, recorder
from sfc.models.loading import Model
from sfc.models.running import CachedResidual, activations_at


@dataclass(frozen=True)
class Ablation:
    """What ablating means: which dictionaries and baselines, and what becomes of the errors.

    `error_mode`: `node` keeps or ablates an error like any node; `keep-current` keeps every error at its current value
    (errors are preserved, as in the published pipeline); `keep-clean` sets every error to what it is in the model as
    it is; `ablate` sets every error to its baseline.
    """

    nodes: Nodes
    dictionaries: Mapping[str, NodeSpace]
    """what takes the activation at each site apart into its nodes"""
    baseline: Baseline
    """what ablated nodes are set to: means per template position, or what each prompt's counterfactual has there"""
    error_mode: ErrorMode
    clean_errors: Mapping[str, Float[Tensor, "batch pos d_in"]] | None = None
    """for `keep-clean`, the errors of one batch in the model as it is, at sites that have one: from `for_batch`"""

    @torch.no_grad()
    def for_batch(self, model: Model, batch: Batch, cached: CachedResidual | None) -> "Ablation":
        """What this ablation is for one batch: itself, or with `keep-clean` one that has the batch's clean errors."""
        if self.error_mode != "keep-clean":
            return self
        spaces = {site: space for site, space in self.dictionaries.items() if ERROR in space.part_kinds}
        seen = activations_at(model, batch, sites_of(spaces), cached) if spaces else {}
        return replace(
            self,
            clean_errors={
                site: _error(space, seen[space.reads].float(), seen[site].float()) for site, space in spaces.items()
            },
        )

    def interventions(
        self,
        keep: Float[Tensor, "circuits nodes"],
        circuit: Int[Tensor, " batch"],
        batch: Batch,
        sites: Collection[str] | None = None,
    ) -> dict[str, Intervention]:
        """Interventions under which row b of the batch runs with the circuit `keep[circuit[b]]`.

        Args:
            keep: masks between 0 and 1; differentiable.
            batch: with `keep-clean` the one that `for_batch` was given, or that one repeated.
            sites: act at these alone.

        Raises:
            ValueError: the error mode is `keep-clean`, and the clean errors are not known.
        """
        if self.error_mode == "keep-clean" and self.clean_errors is None:
            raise ValueError("keep-clean needs the errors of the batch: use for_batch")
        if self.error_mode != "node":
            is_error = torch.from_numpy(self.nodes.is_error).to(keep.device)
            keep = torch.where(is_error, 1.0 if self.error_mode == "keep-current" else 0.0, keep)
        masks = self.nodes.split(keep)
        acting: dict[str, Intervention] = {}
        read: dict[str, Tensor] = {}
        for site, mask in masks.items():
            if sites is None or site in sites:
                reads = self.dictionaries[site].reads
                if reads != site and reads not in read:
                    # What a transcoder reads is what the sites before it have left.
                    acting[reads] = chained(acting.get(reads), recorder(read, reads))
                acting[site] = self._at_site(site, mask, circuit, batch, read)
        return acting

    def ablated_activation(self, site: str, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """The activation that ablating all of a site's nodes leaves at the touchable tokens of a batch."""
        return self.baseline.activations(self.dictionaries[site], batch)

    def _at_site(
        self, site: str, mask: Tensor, circuit: Tensor, batch: Batch, read: Mapping[str, Tensor]
    ) -> Intervention:
        dictionary = self.dictionaries[site]
        keep_feature, keep_error = mask.split([dictionary.d_sae, dictionary.n_parts], dim=1)
        touchable = batch.touchable
        circuit_of_token = circuit[:, None].expand_as(batch.template_positions)[touchable]
        error_weight = keep_error[circuit_of_token]
        constant = self.baseline.ablated_part(dictionary, mask, circuit_of_token, batch)
        if self.clean_errors is not None and site in self.clean_errors:
            clean = self.clean_errors[site]
            clean = repeat(clean, "batch ... -> (copies batch) ...", copies=len(touchable) // len(clean))[touchable]
            constant = constant + clean - self.baseline.errors_at(dictionary, batch)[:, : dictionary.d_in]

        def ablate(activation: Tensor) -> Tensor:
            x = activation[touchable].float()
            encoded = x if dictionary.reads == site else read[dictionary.reads][touchable].float()
            values, indices = dictionary.encode_sparse(encoded)
            # m f + m_error (x - x_hat(f)) needs one decoding: of (m - m_error) f.
            weights = keep_feature[circuit_of_token[:, None], indices] - error_weight[:, :1]
            kept_part = dictionary.decode_sparse(values * weights, indices) - dictionary.b_dec
            kept_parts = by_coordinate(error_weight, dictionary) * dictionary.of_parts(encoded, x)
            replaced = constant + kept_part + together(kept_parts, dictionary)
            return activation.masked_scatter(touchable[..., None], replaced.to(activation.dtype))

        return ablate


def _error(
    space: NodeSpace, read: Float[Tensor, "batch pos d_read"], x: Float[Tensor, "batch pos d_in"]
) -> Float[Tensor, "batch pos d_in"]:
    encoded, rows = (rearrange(each, "batch pos d -> (batch pos) d") for each in (read, x))
    error = left_over(space, encoded, rows, *space.encode_sparse(encoded))[:, : space.d_in]
    return rearrange(error, "(batch pos) d_in -> batch pos d_in", batch=len(x))

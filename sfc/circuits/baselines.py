"""References: what a node's value is set to when it is ablated.

A reference is a table of values per position of the template, or what each prompt's counterfactual has at the very same
position (see `sfc.circuits.counterfactuals`). The mean reference is role-aligned: one value per slot (see
`sfc.models.batches`), taken within a prompt first (content tokens are pooled) and then across the prompts of the
reference split, so that long prompts count no more than short. The attention sink (the first token) is never pooled
with others: where the template has no prefix, it would drown them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.errors import UserError
from sfc.models.batches import PAD_SLOT, Batch, SlotLayout
from sfc.models.interventions import recorder
from sfc.models.linear import linear
from sfc.models.loading import Model
from sfc.models.running import run_to
from sfc.saes.dictionary import Dictionary


class Baseline(Protocol):
    """What ablation, attribution and edges ask of a reference: values at the touchable tokens of a batch, in order.

    `space` is what takes the activation at its site apart: the features of an SAE and its error, or components.
    """

    @property
    def layout(self) -> SlotLayout:
        """What the slots of a prompt are, by which effects are told apart."""
        ...

    def activations(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """The activation that ablating all of a site's nodes leaves there."""
        ...

    def errors_at(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """What is left of it without the features."""
        ...

    def features_at(
        self, space: Dictionary, batch: Batch, features: Int[Tensor, " features"]
    ) -> Float[Tensor, "tokens features"]:
        """The values of some features."""
        ...

    def ablated_part(
        self,
        space: Dictionary,
        mask: Float[Tensor, "circuits site_nodes"],
        circuit_of_token: Int[Tensor, " tokens"],
        batch: Batch,
    ) -> Float[Tensor, "tokens d_in"]:
        """What ablated nodes add up to: `sum_i (1 - m_i) f_ref_i d_i + (1 - m_error) (error_ref + b_dec)`.

        Args:
            mask: of the site's nodes, features first; differentiable.
        """
        ...

    def attributed(
        self,
        space: Dictionary,
        g: Float[Tensor, "tokens d_in"],
        batch: Batch,
        place_of_token: Int[Tensor, " tokens"],
        n_places: int,
    ) -> Float[Tensor, "places d_sae"]:
        """`sum_t (g_t . d_i) f_ref_ti` over the tokens of each place, which are of one prompt and slot."""
        ...


@dataclass(frozen=True)
class Reference:
    """Reference values per site and slot: a table for all prompts, or several, one below the other."""

    layout: SlotLayout
    """what the slots of a table are"""
    features: Mapping[str, Float[Tensor, "slots d_sae"]]
    errors: Mapping[str, Float[Tensor, "slots d_in"]]

    def activations(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """See `Baseline`."""
        table = space.decode(self.features[space.site]) + self.errors[space.site]
        return table[batch.slots[batch.touchable]]

    def errors_at(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """See `Baseline`."""
        return self.errors[space.site][batch.slots[batch.touchable]]

    def features_at(
        self, space: Dictionary, batch: Batch, features: Int[Tensor, " features"]
    ) -> Float[Tensor, "tokens features"]:
        """See `Baseline`."""
        return self.features[space.site][:, features][batch.slots[batch.touchable]]

    def ablated_part(
        self,
        space: Dictionary,
        mask: Float[Tensor, "circuits site_nodes"],
        circuit_of_token: Int[Tensor, " tokens"],
        batch: Batch,
    ) -> Float[Tensor, "tokens d_in"]:
        """See `Baseline`: the same for all tokens of one circuit and slot."""
        features_ref, slots = self.features[space.site], batch.slots[batch.touchable]
        row, row_of_token = (circuit_of_token * len(features_ref) + slots).unique(return_inverse=True)
        circuit, slot = row // len(features_ref), row % len(features_ref)
        ablated = 1 - mask[circuit]
        of_features = linear(features_ref[slot] * ablated[:, : space.d_sae], space.W_dec.t())
        left_ref = self.errors[space.site][slot] + space.b_dec
        of_error = by_coordinate(ablated[:, space.d_sae :], space) * left_ref
        return (of_features + of_error)[row_of_token]

    def attributed(
        self,
        space: Dictionary,
        g: Float[Tensor, "tokens d_in"],
        batch: Batch,
        place_of_token: Int[Tensor, " tokens"],
        n_places: int,
    ) -> Float[Tensor, "places d_sae"]:
        """See `Baseline`: gradients are summed per place first, so that features that are off cost nothing."""
        slots = batch.slots[batch.touchable]
        slot_of_place = slots.new_zeros(n_places).scatter_(0, place_of_token, slots)
        summed = g.new_zeros(n_places, space.d_in).index_add_(0, place_of_token, g)
        return linear(summed, space.W_dec) * self.features[space.site][slot_of_place]


def tables_of(baseline: Baseline) -> Reference:
    """The baseline, if it is a table of values per slot.

    Raises:
        UserError: it is not.
    """
    if not isinstance(baseline, Reference):
        raise UserError(
            "this needs one value per position of the template for what is ablated: take a mean as discovery.reference"
        )
    return baseline


def by_coordinate(of_parts: Float[Tensor, "rows parts"], space: Dictionary) -> Float[Tensor, "rows coordinates"]:
    """A number per part of what features leave, given to each of its coordinates; that of one part broadcasts."""
    if space.n_parts == 1:
        return of_parts
    return repeat(of_parts, "rows parts -> rows (parts width)", width=space.d_in // space.n_parts)


def mean_reference(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: SlotLayout
) -> Reference:
    """Role-aligned means of features and errors over the prompts of the batches.

    Raises:
        UserError: a slot of the layout occurs in none of the prompts.
    """
    reference = _means(model, dictionaries, [(batch, batch.slots) for batch in batches], layout, layout.n_slots)
    if not _known(reference).all():
        raise UserError("the reference prompts do not cover every position of the template; use more of them")
    return reference


def paired_reference(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: SlotLayout
) -> Reference:
    """The values on each single prompt of the batches, its content tokens pooled: a table per prompt.

    The partner of prompt p finds its values through the slots that `Batch.with_tables` gives it. Where a prompt lacks
    a slot of the layout, its values are not numbers: see `check_covered`.
    """
    return reference_in_tables(
        model, dictionaries, [batch.with_tables(batch.prompts, layout) for batch in batches], layout
    )


def reference_in_tables(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: SlotLayout
) -> Reference:
    """The values on the prompts of the batches, in the tables that their slots name (see `Batch.with_tables`): means
    where several prompts share a table.
    """
    rows = [(batch.without_tables(layout), batch.slots) for batch in batches]
    n_tables = 1 + max(int(batch.tables(layout).max()) for batch in batches)
    return _means(model, dictionaries, rows, layout, layout.n_slots * n_tables)


def check_covered(reference: Reference, batches: Sequence[Batch]) -> None:
    """Raise a `UserError` if a token of these prompts has no reference."""
    known = _known(reference)
    if not all(known[batch.slots[batch.touchable]].all() for batch in batches):
        raise UserError("a prompt has tokens that have no counterpart in its partner: both need the same template")


def _known(reference: Reference) -> Bool[Tensor, " slots"]:
    return torch.stack([values.isfinite().all(1) for values in reference.errors.values()]).all(0)


@torch.no_grad()
def _means(
    model: Model,
    dictionaries: Mapping[str, Dictionary],
    rows_of_batches: Sequence[tuple[Batch, Int[Tensor, "batch pos"]]],
    layout: SlotLayout,
    n_rows: int,
) -> Reference:
    """Means of what goes into each row of a table: over the tokens of a prompt first, and then over prompts.

    Rows into which nothing goes are not numbers.
    """
    sites = list(dictionaries)
    features = {site: torch.zeros(n_rows, d.d_sae, device=model.device) for site, d in dictionaries.items()}
    activations = {site: torch.zeros(n_rows, d.d_in, device=model.device) for site, d in dictionaries.items()}
    prompts_in_row = torch.zeros(n_rows, device=model.device)
    for batch, rows in rows_of_batches:
        seen: dict[str, Tensor] = {}
        run_to(model, batch, {site: recorder(seen, site) for site in sites}, sites[-1])
        if missed := [site for site in sites if site not in seen]:
            raise UserError(f"this model has the site {missed[0]!r} by name, but never passes it: it cannot be ablated")
        counted = _counted(batch, layout)
        weights = _weights_within_prompts(batch, layout)
        prompts_in_row.index_add_(0, rows[counted], weights)
        for site, dictionary in dictionaries.items():
            x = seen[site][counted].float()
            features[site].index_add_(0, rows[counted], dictionary.encode(x) * weights[:, None])
            activations[site].index_add_(0, rows[counted], x * weights[:, None])
    features = {site: total / prompts_in_row[:, None] for site, total in features.items()}
    # Decoding is affine, so the mean error is the error of the means.
    errors = {
        site: total / prompts_in_row[:, None] - dictionaries[site].decode(features[site])
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

"""References: what a node's value is set to when it is ablated.

A baseline is a table of values per position of the template, or what each prompt's counterfactual has at the very same
position (see `sfc.circuits.counterfactuals`). The mean baseline is role-aligned: one value per template position (see
`sfc.models.batches`), taken within a prompt first (content tokens are pooled) and then across the prompts of the
reference split, so that long prompts count no more than short. The attention sink (the first token) is never pooled
with others: where the template has no prefix, it would drown them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.spaces import by_coordinate, sites_of, together
from sfc.core.errors import UserError
from sfc.models.batches import NO_POSITION, Batch, TemplateLayout
from sfc.models.linear import linear
from sfc.models.loading import Model
from sfc.models.running import activations_at
from sfc.saes.dictionary import Dictionary


class Baseline(Protocol):
    """What ablation, attribution and edges ask of a baseline: values at the touchable tokens of a batch, in order.

    `space` is what takes the activation at its site apart: the features of an SAE and its error, or components.
    """

    @property
    def layout(self) -> TemplateLayout:
        """What the template positions of a prompt are, by which effects are told apart."""
        ...

    def activations(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """The activation that ablating all of a site's nodes leaves there."""
        ...

    def errors_at(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_parts"]:
        """What is left of it without the features, by the coordinates of the parts."""
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
        """What ablated nodes add up to: `sum_i (1 - m_i) f_ref_i d_i + (1 - m_error) (error_ref + b_dec)`, and so for
        other parts.

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
        """`sum_t (g_t . d_i) f_ref_ti` over the tokens of each place, which are of one prompt and template position."""
        ...


@dataclass(frozen=True)
class BaselineTables:
    """Values per site and template position: a table for all prompts, or several, one below the other."""

    layout: TemplateLayout
    """what the template positions of a table are"""
    features: Mapping[str, Float[Tensor, "positions d_sae"]]
    errors: Mapping[str, Float[Tensor, "positions d_parts"]]
    """what is left without the features"""

    def activations(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """See `Baseline`."""
        table = space.decode(self.features[space.site]) + together(self.errors[space.site], space)
        return table[batch.template_positions[batch.touchable]]

    def errors_at(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_parts"]:
        """See `Baseline`."""
        return self.errors[space.site][batch.template_positions[batch.touchable]]

    def features_at(
        self, space: Dictionary, batch: Batch, features: Int[Tensor, " features"]
    ) -> Float[Tensor, "tokens features"]:
        """See `Baseline`."""
        return self.features[space.site][:, features][batch.template_positions[batch.touchable]]

    def ablated_part(
        self,
        space: Dictionary,
        mask: Float[Tensor, "circuits site_nodes"],
        circuit_of_token: Int[Tensor, " tokens"],
        batch: Batch,
    ) -> Float[Tensor, "tokens d_in"]:
        """See `Baseline`: the same for all tokens of one circuit and template position."""
        features_ref, template_positions = self.features[space.site], batch.template_positions[batch.touchable]
        row, row_of_token = (circuit_of_token * len(features_ref) + template_positions).unique(return_inverse=True)
        circuit, place = row // len(features_ref), row % len(features_ref)
        ablated = 1 - mask[circuit]
        of_features = linear(features_ref[place] * ablated[:, : space.d_sae], space.W_dec.t())
        left_ref = self.errors[space.site][place] + F.pad(space.b_dec, (0, space.d_parts - space.d_in))
        of_parts = by_coordinate(ablated[:, space.d_sae :], space) * left_ref
        return (of_features + together(of_parts, space))[row_of_token]

    def attributed(
        self,
        space: Dictionary,
        g: Float[Tensor, "tokens d_in"],
        batch: Batch,
        place_of_token: Int[Tensor, " tokens"],
        n_places: int,
    ) -> Float[Tensor, "places d_sae"]:
        """See `Baseline`: gradients are summed per place first, so that features that are off cost nothing."""
        template_positions = batch.template_positions[batch.touchable]
        position_of_place = template_positions.new_zeros(n_places).scatter_(0, place_of_token, template_positions)
        summed = g.new_zeros(n_places, space.d_in).index_add_(0, place_of_token, g)
        return linear(summed, space.W_dec) * self.features[space.site][position_of_place]


def tables_of(baseline: Baseline) -> BaselineTables:
    """The baseline, if it is a table of values per template position.

    Raises:
        UserError: it is not.
    """
    if not isinstance(baseline, BaselineTables):
        raise UserError(
            "this needs one value per position of the template for what is ablated: take a mean as discovery.baseline"
        )
    return baseline


def mean_baseline(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: TemplateLayout
) -> BaselineTables:
    """Role-aligned means of features and errors over the prompts of the batches.

    Raises:
        UserError: a template position of the layout occurs in none of the prompts.
    """
    rows = [(batch, batch.template_positions) for batch in batches]
    baseline = _means(model, dictionaries, rows, layout, layout.n_template_positions)
    if not _known(baseline).all():
        raise UserError("the reference prompts do not cover every position of the template; use more of them")
    return baseline


def paired_baseline(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: TemplateLayout
) -> BaselineTables:
    """The values on each single prompt of the batches, its content tokens pooled: a table per prompt.

    The partner of prompt p finds its values through the template positions that `Batch.with_tables` gives it. Where a
    prompt lacks a template position of the layout, its values are not numbers: see `check_covered`.
    """
    with_tables = [batch.with_tables(batch.prompts, layout) for batch in batches]
    return baseline_in_tables(model, dictionaries, with_tables, layout)


def baseline_in_tables(
    model: Model, dictionaries: Mapping[str, Dictionary], batches: Sequence[Batch], layout: TemplateLayout
) -> BaselineTables:
    """The values on the prompts of the batches, in the tables that their template positions name (see
    `Batch.with_tables`): means where several prompts share a table.
    """
    rows = [(batch.without_tables(layout), batch.template_positions) for batch in batches]
    n_tables = 1 + max(int(batch.tables(layout).max()) for batch in batches)
    return _means(model, dictionaries, rows, layout, layout.n_template_positions * n_tables)


def check_covered(baseline: BaselineTables, batches: Sequence[Batch]) -> None:
    """Raise a `UserError` if a token of these prompts has no baseline."""
    known = _known(baseline)
    if not all(known[batch.template_positions[batch.touchable]].all() for batch in batches):
        raise UserError("a prompt has tokens that have no counterpart in its partner: both need the same template")


def _known(baseline: BaselineTables) -> Bool[Tensor, " positions"]:
    return torch.stack([values.isfinite().all(1) for values in baseline.errors.values()]).all(0)


@torch.no_grad()
def _means(
    model: Model,
    dictionaries: Mapping[str, Dictionary],
    rows_of_batches: Sequence[tuple[Batch, Int[Tensor, "batch pos"]]],
    layout: TemplateLayout,
    n_rows: int,
) -> BaselineTables:
    """Means of what goes into each row of a table: over the tokens of a prompt first, and then over prompts.

    Rows into which nothing goes are not numbers.
    """
    sites = sites_of(dictionaries)
    features = {site: torch.zeros(n_rows, d.d_sae, device=model.device) for site, d in dictionaries.items()}
    of_parts = {site: torch.zeros(n_rows, d.d_parts, device=model.device) for site, d in dictionaries.items()}
    prompts_in_row = torch.zeros(n_rows, device=model.device)
    for batch, rows in rows_of_batches:
        seen, counted = activations_at(model, batch, sites), _counted(batch, layout)
        counts = torch.zeros(len(batch.lengths), layout.n_template_positions, device=model.device)
        counts.scatter_add_(1, batch.template_positions.clamp(min=0), counted.float())
        # One over the number of such tokens of the prompt in the token's template position.
        weights = (1 / counts).gather(1, batch.template_positions.clamp(min=0))[counted]
        prompts_in_row.index_add_(0, rows[counted], weights)
        for site, dictionary in dictionaries.items():
            read, x = (seen[each][counted].float() for each in (dictionary.reads, site))
            features[site].index_add_(0, rows[counted], dictionary.encode(read) * weights[:, None])
            of_parts[site].index_add_(0, rows[counted], dictionary.of_parts(read, x) * weights[:, None])
    features = {site: total / prompts_in_row[:, None] for site, total in features.items()}
    # Decoding is affine, so the mean error is the error of the means.
    errors = {}
    for site, space in dictionaries.items():
        errors[site] = of_parts[site] / prompts_in_row[:, None]
        errors[site][:, : space.d_in] -= space.decode(features[site])
    return BaselineTables(layout, features, errors)


def zero_baseline(dictionaries: Mapping[str, Dictionary], layout: TemplateLayout) -> BaselineTables:
    """Zero for every feature and every error: of an ablated site only the decoder's bias is left."""
    n = layout.n_template_positions
    return BaselineTables(
        layout,
        {site: d.b_dec.new_zeros(n, d.d_sae) for site, d in dictionaries.items()},
        {site: d.b_dec.new_zeros(n, d.d_parts) for site, d in dictionaries.items()},
    )


def _counted(batch: Batch, layout: TemplateLayout) -> Bool[Tensor, "batch pos"]:
    """Tokens that baselines are means of: neither padding nor a first token among the content."""
    counted = batch.template_positions != NO_POSITION
    counted[:, 0] &= batch.template_positions[:, 0] != layout.n_prefix
    return counted

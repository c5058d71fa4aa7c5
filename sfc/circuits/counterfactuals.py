"""Counterfactual ablation: ablated nodes have the value they have in the run of an equally long prompt.

For a prompt p and its counterfactual c, an ablated node is set to what it is at the same position in the run of c, its
error included. With m the mask of a circuit (1 keeps), `Ablation` then comes to

    x <- x_c + dec((m - m_error) f(x)) - dec((m - m_error) f(c)) + m_error (x - x_c)

without the decoder's bias: with nothing kept the run is that of c; with everything kept it is that of p; and where no
node of the first site is kept, nothing of p enters, so that it is that of c whatever else is kept. This holds where the
sites are whole points of the residual stream, or all of what writes to it.

Every prompt is run once, and what it has at each site is kept for all touchable tokens. A batch names the pair of each
row, so that rows may be selected and repeated at will.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.spaces import by_coordinate, left_over, sites_of, together
from sfc.core.errors import UserError
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.running import activations_at
from sfc.saes.dictionary import Dictionary
from sfc.saes.kernels import Sparse, row_dots, values_of

_BLOCK_ROWS = 4096


class Pairs(NamedTuple):
    """Prompts and their counterfactuals, by their numbers in a list of prompts."""

    prompt: Int[Tensor, " pairs"]
    counterfactual: Int[Tensor, " pairs"]
    positive: Bool[Tensor, " pairs"]
    """whether the prompt is of the positive side, and its counterfactual of the negative"""

    @property
    def direction(self) -> Float[Tensor, " pairs"]:
        """1 where the prompt is of the positive side, else -1."""
        return torch.where(self.positive, 1.0, -1.0)


class Recorded(NamedTuple):
    """What some tokens have at a site, and what of it was read where that is another one.

    It is kept of every counterfactual at once: in the model's own dtype, and with numbers of four bytes.
    """

    x: Float[Tensor, "tokens d_in"]
    read: Float[Tensor, "tokens d_read"]
    """x itself, but for transcoders"""
    values: Float[Tensor, "tokens entries"]
    indices: Int[Tensor, "tokens entries"]


@dataclass(frozen=True)
class Counterfactuals:
    """The baseline that is each prompt's counterfactual. See `sfc.circuits.baselines.Baseline` for its methods."""

    layout: TemplateLayout
    pairs: Pairs
    recorded: Mapping[str, Recorded]
    """by site, of the touchable tokens of all counterfactuals, prompt by prompt"""
    ends: Int[Tensor, " prompts"]
    """the row behind each prompt's last token; 0 for a prompt that is no counterfactual"""

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: Model,
        spaces: Mapping[str, Dictionary],
        prompts: Sequence[TokenizedPrompt],
        pairs: Pairs,
        layout: TemplateLayout,
        batch_tokens: int,
    ) -> Self:
        """Run every counterfactual once and record it.

        Raises:
            UserError: the two prompts of a pair are not equally long, or begin with different tokens; or the model
                never passes a site.
        """
        for p, c in zip(pairs.prompt.tolist(), pairs.counterfactual.tolist(), strict=True):
            if len(prompts[p].ids) != len(prompts[c].ids) or prompts[p].ids[0] != prompts[c].ids[0]:
                raise UserError(
                    "a prompt and its counterfactual must have equally many tokens and the same first one:"
                    f" {len(prompts[p].ids)} and {len(prompts[c].ids)}"
                )
        served = pairs.counterfactual.unique().tolist()
        ends = torch.zeros(len(prompts), dtype=torch.long, device=model.device)
        parts: dict[str, list[Recorded]] = {site: [] for site in spaces}
        n_tokens = 0
        for batch in make_batches([prompts[i] for i in served], layout, batch_tokens, model.device):
            seen, touchable = activations_at(model, batch, sites_of(spaces)), batch.touchable
            numbers = torch.tensor(served, device=model.device)[batch.prompts]
            ends[numbers] = n_tokens + touchable.sum(1).cumsum(0)
            n_tokens += int(touchable.sum())
            for site, space in spaces.items():
                x = seen[site][touchable]
                read = x if space.reads == site else seen[space.reads][touchable]
                parts[site].append(Recorded(x, read, *_features(space, read)))
        return cls(layout, pairs, {site: _joined(of_site) for site, of_site in parts.items()}, ends)

    def batches(
        self, prompts: Sequence[TokenizedPrompt], chosen: Bool[Tensor, " pairs"], batch_tokens: int
    ) -> list[Batch]:
        """Some of the pairs in batches, a row per pair: the tokens are those of the prompt that is explained."""
        numbers = chosen.nonzero()[:, 0]
        explained = [prompts[i] for i in self.pairs.prompt[numbers].tolist()]
        return [
            batch.with_pairs(numbers[batch.prompts])
            for batch in make_batches(explained, self.layout, batch_tokens, numbers.device)
        ]

    @torch.no_grad()
    def with_spaces(self, spaces: Mapping[str, Dictionary]) -> Self:
        """The same runs, taken apart by other dictionaries at (some of) the same sites."""
        recorded = {}
        for site, space in spaces.items():
            x, read, *_ = self.recorded[site]
            blocks = [Recorded(x[:0], read[:0], *_features(space, block)) for block in read.split(_BLOCK_ROWS)]
            recorded[site] = _joined(blocks)._replace(x=x, read=read)
        return replace(self, recorded=recorded)

    def activations(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_in"]:
        """What the counterfactuals have at the site."""
        return self.recorded[space.site].x[self._rows(batch)].float()

    def errors_at(self, space: Dictionary, batch: Batch) -> Float[Tensor, "tokens d_parts"]:
        """What dictionaries miss of it."""
        x, read, values, indices = self._at(space, batch)
        return left_over(space, read, x, values, indices)

    def features_at(
        self, space: Dictionary, batch: Batch, features: Int[Tensor, " features"]
    ) -> Float[Tensor, "tokens features"]:
        """The values of some features on the counterfactuals."""
        values, indices = self._features_in(space, self._rows(batch))
        return values_of(features, values, indices, space.d_sae)

    def ablated_part(
        self,
        space: Dictionary,
        mask: Float[Tensor, "circuits site_nodes"],
        circuit_of_token: Int[Tensor, " tokens"],
        batch: Batch,
    ) -> Float[Tensor, "tokens d_in"]:
        """`(1 - m_error) x_c - dec((m - m_error) f(c))`: what ablated nodes add up to, the decoder's bias included.

        Of several parts, `x_c` is what they have together.
        """
        x, read, values, indices = self._at(space, batch)
        keep_feature, keep_error = mask.split([space.d_sae, space.n_parts], dim=1)
        error_weight = keep_error[circuit_of_token]
        weights = keep_feature[circuit_of_token[:, None], indices] - error_weight[:, :1]
        kept_part = space.decode_sparse(values * weights, indices) - space.b_dec
        kept_parts = by_coordinate(error_weight, space) * space.of_parts(read, x)
        return x - together(kept_parts, space) - kept_part

    def attributed(
        self,
        space: Dictionary,
        g: Float[Tensor, "tokens d_in"],
        batch: Batch,
        place_of_token: Int[Tensor, " tokens"],
        n_places: int,
    ) -> Float[Tensor, "places d_sae"]:
        """`sum_t (g_t . d_i) f_ti(c)` over the tokens of each place, from the active features alone."""
        values, indices = self._features_in(space, self._rows(batch))
        total = g.new_zeros(n_places, space.d_sae)
        entry = (place_of_token[:, None] * space.d_sae + indices).flatten()
        total.view(-1).index_add_(0, entry, (row_dots(g, indices, space.W_dec) * values).flatten())
        return total

    def _at(self, space: Dictionary, batch: Batch) -> Recorded:
        rows, all_of_them = self._rows(batch), self.recorded[space.site]
        x = all_of_them.x[rows].float()
        read = x if all_of_them.read is all_of_them.x else all_of_them.read[rows].float()
        return Recorded(x, read, *self._features_in(space, rows))

    def _features_in(self, space: Dictionary, rows: Int[Tensor, " tokens"]) -> Sparse:
        all_of_them = self.recorded[space.site]
        return Sparse(all_of_them.values[rows], all_of_them.indices[rows].long())

    def _rows(self, batch: Batch) -> Int[Tensor, " tokens"]:
        """Where the counterpart of each touchable token is recorded: as far from the end of its prompt."""
        if batch.pair is None:
            raise ValueError("counterfactual ablation is of pairs; these prompts have no counterfactuals")
        touchable = batch.touchable
        from_the_end = touchable.flip(1).cumsum(1).flip(1)
        ends = self.ends[self.pairs.counterfactual[batch.pair]]
        return (ends[:, None] - from_the_end)[touchable]


def _features(space: Dictionary, read: Float[Tensor, "tokens d_read"]) -> Sparse:
    """As they are kept: with numbers of four bytes."""
    values, indices = space.encode_sparse(read.float())
    return Sparse(values, indices.int())


def _joined(parts: Sequence[Recorded]) -> Recorded:
    """All tokens together, each with as many entries as the fullest has."""
    entries = max(part.values.shape[1] for part in parts)
    values, indices = (
        torch.cat([F.pad(sparse, (0, entries - sparse.shape[1])) for sparse in of_parts])
        for of_parts in ([part.values for part in parts], [part.indices for part in parts])
    )
    x = torch.cat([part.x for part in parts])
    read = x if parts[0].read is parts[0].x else torch.cat([part.read for part in parts])
    return Recorded(x, read, values, indices)

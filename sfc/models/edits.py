"""Edits of activations, for `sfc.models.engine`: along a direction (steering), or by given values (patching).

Steering: with u the direction at unit length, x the activation and a the amount:

    add          x + a u
    project-out  x - a (x . u) u      a = 1 removes the component (Arditi et al. 2024), a = 0 leaves it
    clamp        x + (a - x . u) u    the component becomes a

Amounts of `add` and `clamp` are in the activation's own units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.core.sites import site_of
from sfc.models.batches import Batch
from sfc.models.engine import Alike, Edits
from sfc.models.interventions import Intervention, Interventions
from sfc.models.model import Model
from sfc.models.positions import EditKind, steered_tokens
from sfc.models.running import layer_before


class SteeringEdit(NamedTuple):
    """One setting of the dial."""

    kind: EditKind
    sites: tuple[str, ...]
    """in the order in which the model passes them"""
    direction: Float[Tensor, " d_model"]
    """of any length but zero"""
    amount: float


@dataclass(frozen=True)
class Steering(Edits):
    """Edits along directions, and the tokens that they act on."""

    edits: Sequence[SteeringEdit]
    positions: str
    """name of a position set (see `sfc.models.positions`)"""
    during_reply: bool
    """whether tokens that are generated are edited too"""

    def __len__(self) -> int:
        return len(self.edits)

    def alike(self) -> Sequence[Alike]:
        """Edits of one kind at the same sites."""
        groups: dict[tuple, list[int]] = {}
        for number, edit in enumerate(self.edits):
            groups.setdefault((edit.kind, edit.sites), []).append(number)
        return [Alike(members, sites[0]) for (_, sites), members in groups.items()]

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        """See `Edits`."""
        edits = [self.edits[member] for member in members]
        named = torch.from_numpy(steered_tokens(self.positions, batch.roles.cpu().numpy())).to(batch.ids.device)
        n_prompts = len(batch.lengths) // len(edits)
        in_prompt = dict.fromkeys(edits[0].sites, steering(edits, n_prompts, named & batch.touchable))
        in_reply = dict.fromkeys(edits[0].sites, steering(edits, n_prompts))
        return Interventions(in_prompt, in_reply if self.during_reply else {})


def residual_sites(model: Model) -> tuple[str, ...]:
    """Every site of the residual stream: projecting a direction out there removes it everywhere."""
    sites = [site_of("resid_pre", 0)]
    for layer in range(model.n_layers):
        sites += [site_of("resid_mid", layer), site_of("resid_post", layer)]
    return tuple(site for site in sites if site in model.hooks)


def steering(
    edits: Sequence[SteeringEdit], n_prompts: int, where: Bool[Tensor, "batch pos"] | None = None
) -> Intervention:
    """An intervention under which a packed run's rows are steered: first all prompts by the first edit, and so on.

    Args:
        edits: of one kind.
        where: the tokens steered; None steers all.
    """
    (kind,) = {edit.kind for edit in edits}
    units = torch.stack([edit.direction / edit.direction.norm() for edit in edits]).float()
    amounts = torch.tensor([edit.amount for edit in edits])
    unit_of_row = repeat(units, "edits d -> (edits prompts) 1 d", prompts=n_prompts)
    amount_of_row = repeat(amounts, "edits -> (edits prompts) 1 1", prompts=n_prompts)

    def steer(x: Float[Tensor, "batch pos d_model"]) -> Tensor:
        u, a = unit_of_row.to(x.device), amount_of_row.to(x.device)
        change = a if kind == "add" else reduce(x.float() * u, "batch pos d -> batch pos 1", "sum")
        change = a - change if kind == "clamp" else -a * change if kind == "project-out" else change
        steered = (x + change * u).to(x.dtype)
        return steered if where is None else torch.where(where[..., None], steered, x)

    return steer


class Replacement(NamedTuple):
    """What one run replaces."""

    sites: Sequence[str]
    """in the order in which the model passes them"""
    part: slice
    """of the activation at each of them: one head's share of `hook_z`, or all"""


@dataclass(frozen=True)
class Replacements(Edits):
    """Activations of one batch replaced by given ones, such as those of another run (activation patching)."""

    replacements: Sequence[Replacement]
    where: Bool[Tensor, "#batch #pos"]
    values: Mapping[str, Float[Tensor, "#batch #pos width"]]
    """by site; they mean nothing where nothing is replaced"""

    def __len__(self) -> int:
        return len(self.replacements)

    def alike(self) -> Sequence[Alike]:
        """Those that start after the same block."""
        groups: dict[int, list[int]] = {}
        for number, each in enumerate(self.replacements):
            groups.setdefault(layer_before(each.sites[0]), []).append(number)
        return [Alike(members, self.replacements[members[0]].sites[0]) for _, members in sorted(groups.items())]

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        """See `Edits`."""
        packed = [self.replacements[member] for member in members]
        sites = dict.fromkeys(site for each in packed for site in each.sites)
        return Interventions({site: self._at_site(site, packed) for site in sites})

    def _at_site(self, site: str, packed: Sequence[Replacement]) -> Intervention:
        values, where = self.values[site], self.where[..., None]

        def replace(activation: Tensor) -> Tensor:
            copies = rearrange(activation, "(edits prompts) ... -> edits prompts ...", edits=len(packed)).clone()
            for rows, each in zip(copies, packed, strict=True):
                if site in each.sites:
                    rows[..., each.part] = torch.where(where, values[..., each.part], rows[..., each.part])
            return rearrange(copies, "edits prompts ... -> (edits prompts) ...")

        return replace

"""What steering does to an activation: an edit along one direction, at some sites.

With u the direction at unit length, x the activation and a the amount:

    add          x + a u
    project-out  x - a (x . u) u      a = 1 removes the component (Arditi et al. 2024), a = 0 leaves it
    clamp        x + (a - x . u) u    the component becomes a

Amounts of `add` and `clamp` are in the activation's own units.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.core.sites import site_of
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.models.positions import EditKind


class Edit(NamedTuple):
    """One setting of the dial."""

    kind: EditKind
    sites: tuple[str, ...]
    """in the order in which the model passes them"""
    direction: Float[Tensor, " d_model"]
    """of any length but zero"""
    amount: float


class Steering(NamedTuple):
    """An edit, and the tokens that it acts on."""

    edit: Edit
    positions: str
    """name of a position set (see `sfc.models.positions`)"""
    during_reply: bool
    """whether tokens that are generated are edited too"""


def residual_sites(model: Model) -> tuple[str, ...]:
    """Every site of the residual stream: projecting a direction out there removes it everywhere."""
    sites = [site_of("resid_pre", 0)]
    for layer in range(model.n_layers):
        sites += [site_of("resid_mid", layer), site_of("resid_post", layer)]
    return tuple(site for site in sites if site in model.hooks)


def editing(edits: Sequence[Edit], where: Bool[Tensor, "batch pos"] | None) -> Intervention:
    """An intervention under which a packed run's rows are edited: first all prompts by the first edit, and so on.

    Args:
        edits: of one kind.
        where: the tokens edited, the same for each edit's rows; None edits all.
    """
    (kind,) = {edit.kind for edit in edits}
    units = torch.stack([edit.direction / edit.direction.norm() for edit in edits]).float()[:, None, None]
    amounts = torch.tensor([edit.amount for edit in edits])[:, None, None, None]

    def edit(activation: Tensor) -> Tensor:
        x = activation.unflatten(0, (len(edits), -1))
        u, a = units.to(x.device), amounts.to(x.device)
        change = a if kind == "add" else (x.float() * u).sum(-1, keepdim=True)
        change = a - change if kind == "clamp" else -a * change if kind == "project-out" else change
        edited = (x + change * u).to(x.dtype)
        return (edited if where is None else torch.where(where[..., None], edited, x)).flatten(0, 1)

    return edit

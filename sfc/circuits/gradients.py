"""Gradients of the score at every site of the plain model, and runs that differ from it at one site only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sfc.circuits.problem import Problem
from sfc.circuits.spaces import sites_of
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.interventions import Intervention, recorder
from sfc.models.running import CachedResidual, activations_at, cached_residual_after, layer_before, run_to
from sfc.models.score import score_batch


class SiteGradient(NamedTuple):
    """What attribution needs of one site."""

    x: Float[Tensor, "batch pos d_in"]
    """the activation"""
    g: Float[Tensor, "batch pos d_in"]
    """ds/dx, s the score of the token's own prompt"""
    read: Float[Tensor, "batch pos d_read"]
    """the activation that is encoded: x itself, but for transcoders"""


GRADIENT_TOKENS = PACKED_TOKENS
"""tokens, padding included, of which all blocks keep what the way back needs at once"""


def score_gradients(problem: Problem, batch: Batch, cached: CachedResidual) -> dict[str, SiteGradient]:
    """Activations and gradients at the sites of all dictionaries. Nothing is spliced in.

    One pass forward and back, or as many as it takes for each to have at most `GRADIENT_TOKENS`.
    """
    n_rows, width = batch.ids.shape
    groups = torch.arange(n_rows, device=batch.ids.device).split(max(1, GRADIENT_TOKENS // width))
    if len(groups) == 1:
        return _in_one_pass(problem, batch, cached)
    passes = [_in_one_pass(problem, batch.select(rows), cached.select(rows)) for rows in groups]
    return {site: _stacked([each[site] for each in passes]) for site in passes[0]}


def _in_one_pass(problem: Problem, batch: Batch, cached: CachedResidual) -> dict[str, SiteGradient]:
    seen: dict[str, Tensor] = {}
    spaces, read = problem.ablation.dictionaries, {}
    interventions = {site: _leaf(seen, site) for site in spaces}
    inputs = {site: recorder(read, site) for site in sites_of(spaces) if site not in spaces}
    with torch.enable_grad():
        total = score_batch(problem.model, problem.score, batch, interventions | inputs, cached).sum()
    gradients = torch.autograd.grad(total, list(seen.values()))
    x = {site: activation.detach() for site, activation in (read | seen).items()}
    return {site: SiteGradient(x[site], g, x[spaces[site].reads]) for site, g in zip(seen, gradients, strict=True)}


def _stacked(parts: Sequence[SiteGradient]) -> SiteGradient:
    x = torch.cat([part.x for part in parts])
    read = x if parts[0].read is parts[0].x else torch.cat([part.read for part in parts])
    return SiteGradient(x, torch.cat([part.g for part in parts]), read)


def _leaf(seen: dict[str, Tensor], site: str) -> Intervention:
    """Record the activation; the first one starts the graph."""

    def record(activation: Tensor) -> Tensor:
        # A copy takes its place: gradients are then of what an intervention here can change, and of nothing that
        # reads the same tensor by another way, as the residual stream around `hook_resid_mid`.
        seen[site] = activation.clone() if activation.requires_grad else activation.detach().requires_grad_()
        return seen[site]

    return record


def prompt_of_token(batch: Batch) -> Int[Tensor, " tokens"]:
    """For each touchable token, the row of its prompt."""
    return batch.touchable.nonzero(as_tuple=True)[0]


@dataclass(frozen=True)
class SiteRun:
    """One batch, stopped at one site, from which runs go on: the blocks before it are not run again."""

    problem: Problem
    site: str
    batch: Batch
    cached: CachedResidual
    """the latest one from which a run still passes the site"""
    x: Float[Tensor, "batch pos d_in"]
    """the clean activation at the site"""
    read: Float[Tensor, "batch pos d_read"]
    """the clean activation that is encoded: x itself, but for transcoders"""

    def scores(self, x: Float[Tensor, "copies batch pos d_in"]) -> Float[Tensor, "copies batch"]:
        """The score of every prompt with the activation at the site replaced, once by each copy. Differentiable."""
        packed, cached = self.batch.repeat(len(x)), self.cached.repeat(len(x))
        scores = score_batch(self.problem.model, self.problem.score, packed, self._replacing(x), cached)
        return rearrange(scores, "(copies batch) -> copies batch", copies=len(x))

    def activations(
        self, x: Float[Tensor, "copies batch pos d_in"], site: str
    ) -> Float[Tensor, "copies batch pos d_out"]:
        """The activation at a later site with the one at this site replaced, once by each copy."""
        seen: dict[str, Tensor] = {}
        packed, cached = self.batch.repeat(len(x)), self.cached.repeat(len(x))
        interventions = {**self._replacing(x), site: recorder(seen, site)}
        run_to(self.problem.model, packed, interventions, site, cached)
        return rearrange(seen[site], "(copies batch) pos d_out -> copies batch pos d_out", copies=len(x))

    def _replacing(self, x: Float[Tensor, "copies batch pos d_in"]) -> dict[str, Intervention]:
        replaced = rearrange(x, "copies batch pos d_in -> (copies batch) pos d_in").to(self.x.dtype)
        return {self.site: lambda _: replaced}


def site_runs(problem: Problem, sites: Sequence[str], batch: Batch, cached: CachedResidual) -> Iterator[SiteRun]:
    """A batch at each of these sites, which come in the order of the run; no block is run twice to get there."""
    for site in sites:
        cached = cached_residual_after(problem.model, batch, layer_before(site), cached)
        space = problem.ablation.dictionaries[site]
        with torch.no_grad():
            seen = activations_at(problem.model, batch, sites_of({site: space}), cached)
        yield SiteRun(problem, site, batch, cached, seen[site], seen[space.reads])

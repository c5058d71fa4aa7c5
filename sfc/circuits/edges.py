"""Edges: what passes from a node to one at a site that its own site writes directly into.

A block reads the residual stream (`resid_pre`) with its attention, heads (`hook_z`) first and their sum (`attn_out`)
after; what the MLP reads (`resid_mid`) is the stream with that added, and its output (`mlp_out`) makes the next stream
(`resid_post`), which the next block calls `resid_pre`. `resid_mid` is what the MLP reads and no more: an intervention
there leaves the stream that goes around the MLP as it is. One site writes directly into another where something passes
between them without passing a third site in use, so that edges form a directed acyclic graph. With `attn_out`,
`mlp_out` and `resid_post` at every layer they are those of Marks et al. 2024.

By attribution (without splicing anything in), the weight of an edge u -> d is, to first order,
`sum_{s,t} (ds/df_d,t) (df_d,t/df_u,s) (f_u,s - f_ref_u,s)`, d a feature or the error of a site downstream. With x and
x' the activations at the two sites and g' = ds/dx' in the plain model, it is `covector(d) . J displacement(u)`, summed
over the tokens of a prompt, of three things:

    displacement   what ablating u takes away from x:  (f_u - f_ref_u) d_u, or e - e_ref for the error
    J = dx'/dx     the Jacobian of what lies between the sites, all positions at once, other sites in use held fixed
    covector       how the score moves with x' by way of d:  (g' . d_d) df_d/dx', which is 0 where d is off, or for the
                   error what is left of g'

Over all d of a site the covectors sum to g', so that the edges out of u, to all sites downstream, sum to the effect of
u wherever x reaches the score through these sites alone, as it does if a site of the residual stream is among them.

Tokens may be told apart by role (template before the prompt, prompt, each template token after it): the weight is then
a sum of parts, one for each role of s and of t, since all three things are made of numbers per token.

J is never written out. It is applied from the side with fewer nodes, as vector-Jacobian products from the targets or
Jacobian-vector products from the sources, many nodes at once, through the blocks between the sites and no others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple

import networkx as nx
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.gradients import SiteGradient, prompt_of_token, score_gradients
from sfc.circuits.problem import Problem
from sfc.circuits.spaces import NodeSpace, by_coordinate, left_over, together
from sfc.core.sites import layer_of, site_of
from sfc.models.batches import Batch
from sfc.models.interventions import Intervention, chained, recorder
from sfc.models.loading import Model
from sfc.models.running import CachedResidual, cached_residual_after, layer_before, run_to
from sfc.saes.kernels import columns_of, row_dots, values_of

Stops = tuple[str, ...]
"""sites in use between two others: what passes through them does not pass directly"""


def downstream(site: str, sites: Sequence[str], is_parallel: bool = False) -> list[tuple[str, Stops]]:
    """The sites that this one writes directly into, each with the sites at which other ways there are stopped.

    Args:
        sites: all that are in use, in the order in which the model passes them.
        is_parallel: see `Model.is_parallel`.
    """
    flow = _flow(max(map(layer_of, sites)), is_parallel)
    others = [other for other in sites if other != site]
    after = nx.descendants(flow, site)
    reached = []
    for other in others:
        if other in after:
            direct = flow.subgraph(set(flow) - set(others) | {other})
            if nx.has_path(direct, site, other):
                stops = after & nx.ancestors(flow, other)
                reached.append((other, tuple(stop for stop in others if stop in stops)))
    return reached


def ways(sites: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """For each site those that write directly into it, and the sites that write directly into the logits."""
    if not sites:
        return {}, []
    logits = site_of("resid_post", max(map(layer_of, sites)) + 1)  # all passes it, and no site in use is there
    into: dict[str, list[str]] = {site: [] for site in (*sites, logits)}
    for site in sites:
        for other, _ in downstream(site, [*sites, logits]):
            into[other].append(site)
    return into, into.pop(logits)


@cache
def _flow(last_layer: int, is_parallel: bool) -> nx.DiGraph:
    """What passes into what: all sites up to a layer, and the streams between attention and MLP, which are no sites."""
    flow = nx.DiGraph()
    for layer in range(last_layer + 1):
        pre, z, attn, mid, mlp, post = (
            site_of(kind, layer) for kind in ("resid_pre", "hook_z", "attn_out", "resid_mid", "mlp_out", "resid_post")
        )
        stream = f"stream after the attention of layer {layer}"
        nx.add_path(flow, [pre, z, attn, stream, post])
        nx.add_path(flow, [pre if is_parallel else stream, mid, mlp, post])
        nx.add_path(flow, [pre, stream])
        if layer > 0:
            flow.add_edge(site_of("resid_post", layer - 1), pre)
    return flow


class Pair(NamedTuple):
    """A site and one that it writes directly into, and the nodes between which edges are wanted.

    Nodes are numbered within their site, in ascending order, the error and other parts after the features.
    """

    upstream: str
    downstream: str
    sources: Int[Tensor, " sources"]
    targets: Int[Tensor, " targets"]
    stops: Stops = ()
    """sites that are held fixed between them"""


@torch.no_grad()
def edge_effects(
    problem: Problem, batch: Batch, cached: CachedResidual, pairs: Sequence[Pair], packed_tokens: int
) -> list[Float[Tensor, "batch sources targets"]]:
    """For each pair of sites, the weight of every edge on every prompt of one batch, in nats of the score.

    Args as `edge_parts`.
    """
    parts = edge_parts(problem, batch, cached, pairs, packed_tokens, all_tokens(batch))
    return [of_pair[:, 0, 0] for of_pair in parts]


def all_tokens(batch: Batch) -> Bool[Tensor, "1 tokens"]:
    """All touchable tokens as one group."""
    return batch.touchable[batch.touchable][None]


@torch.no_grad()
def edge_parts(
    problem: Problem,
    batch: Batch,
    cached: CachedResidual,
    pairs: Sequence[Pair],
    packed_tokens: int,
    groups: Bool[Tensor, "groups tokens"],
) -> list[Float[Tensor, "batch source_groups target_groups sources targets"]]:
    """As `edge_effects`, told apart by the groups of the tokens s and t; over both they sum to the weight.

    Args:
        pairs: in the order of their upstream sites.
        packed_tokens: tokens, padding included, that go through a Jacobian at once: as many nodes as fit, but at least
            one. It bounds the memory beyond that of one run of the batch.
        groups: the touchable tokens of each, every token in one of them, earlier tokens of a prompt in earlier ones.
    """
    gradients = score_gradients(problem, batch, cached)
    shape, device = (len(batch.lengths), len(groups), len(groups)), batch.ids.device
    effects = [torch.zeros(*shape, len(pair.sources), len(pair.targets), device=device) for pair in pairs]
    for pair, effect in zip(pairs, effects, strict=True):
        sources = _displacements(problem, batch, pair, gradients[pair.upstream])
        targets = _covectors(problem, batch, pair, gradients[pair.downstream])
        reads = problem.ablation.dictionaries[pair.downstream].reads
        if sources.moving and targets.moving:
            cached = cached_residual_after(problem.model, batch, layer_before(pair.upstream), cached)
            x, x_next = _run_between(problem.model, batch, cached, pair, reads, gradients[pair.upstream].x)
            # A site need not be heard at the other, as attention is not at a parallel MLP.
            if x_next.requires_grad:
                weights = _weights(x, x_next, sources, targets, batch.copies_in(packed_tokens), groups)
                effect[:] = weights[..., sources.wanted, :][..., targets.wanted]
    return effects


@dataclass(frozen=True)
class _Side:
    """The nodes of one side of a pair: the features that are wanted, then all parts (the error, a skip connection).

    `spread` is linear: from a weight per prompt and node to the sum of the nodes' vectors at each token.
    """

    spread: Callable[[Float[Tensor, "batch nodes"]], Float[Tensor, "tokens d"]]
    like: Float[Tensor, "batch nodes"]
    wanted: list[int]
    moving: list[int]
    """the wanted nodes whose vectors are not all zero"""

    def vectors(self, node: int) -> Float[Tensor, "tokens d"]:
        """The node's vector at each token."""
        return self.spread(F.one_hot(torch.tensor(node), self.like.shape[1]).to(self.like).expand_as(self.like))

    def products(self) -> Callable[[Float[Tensor, "tokens d"]], Float[Tensor, "batch nodes"]]:
        """The transpose of `spread`: inner products with each node's vectors, summed over the tokens of a prompt."""
        with torch.enable_grad():
            weights = torch.zeros_like(self.like).requires_grad_()
            spread = self.spread(weights)
        return lambda vectors: torch.autograd.grad(spread, weights, vectors, retain_graph=True)[0]


def _weights(
    x: Float[Tensor, "tokens d_in"],
    x_next: Float[Tensor, "tokens d_next"],
    sources: _Side,
    targets: _Side,
    at_once: int,
    groups: Bool[Tensor, "groups tokens"],
) -> Float[Tensor, "batch source_groups target_groups sources targets"]:
    """`covector(d) . J displacement(u)` of all sources and targets, x_next having been computed from x."""
    if by_targets := len(targets.moving) <= len(sources.moving):
        near, far, output, start = targets, sources, x_next, x
    else:
        # The product v J is linear in v, whatever v is: differentiating it once more applies J itself.
        start = torch.zeros_like(x_next).requires_grad_()
        (output,) = torch.autograd.grad(x_next, x, start, create_graph=True)
        near, far = sources, targets
    weights = torch.zeros(near.like.shape[1], len(groups), len(groups), *far.like.shape, device=x.device)
    products, parts = far.products(), _parts(near, groups)
    while some := list(islice(parts, at_once)):
        vectors = torch.stack([vector for *_, vector in some]).to(output.dtype)
        (passed,) = torch.autograd.grad(output, start, vectors, retain_graph=True, is_grads_batched=True)
        for (node, group, _), vector in zip(some, passed, strict=True):
            # Nothing passes to earlier tokens.
            for other in range(group + 1) if by_targets else range(group, len(groups)):
                weights[node, group, other] = products(vector.float() * groups[other][:, None])
    if by_targets:
        return rearrange(weights, "targets heard moved batch sources -> batch moved heard sources targets")
    return rearrange(weights, "sources moved heard batch targets -> batch moved heard sources targets")


def _parts(side: _Side, groups: Bool[Tensor, "groups tokens"]) -> Iterator[tuple[int, int, Float[Tensor, "tokens d"]]]:
    """The vectors of each node at the tokens of each group alone, with their numbers; those that are zero left out."""
    for node in side.moving:
        vectors = side.vectors(node)
        for group, tokens in enumerate(groups):
            if (of_group := vectors * tokens[:, None]).any():
                yield node, group, of_group


def _run_between(
    model: Model, batch: Batch, cached: CachedResidual, pair: Pair, reads: str, clean: Float[Tensor, "batch pos d_in"]
) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_next"]]:
    """The activations at both sites, at the touchable tokens, the second computed from the first with its graph.

    Where the nodes downstream read another site than they write, the second is what is there, then what they write.
    """
    where = batch.touchable.nonzero(as_tuple=True)
    x = clean[where].requires_grad_()
    seen: dict[str, Tensor] = {}
    interventions: dict[str, Intervention] = dict.fromkeys(pair.stops, Tensor.detach)
    interventions[pair.upstream] = lambda activation: activation.index_put(where, x)
    for site in {reads, pair.downstream}:
        interventions[site] = chained(interventions.get(site), recorder(seen, site))
    with torch.enable_grad():
        run_to(model, batch, interventions, pair.downstream, cached)
        written = seen[pair.downstream][where]
        return x, written if reads == pair.downstream else torch.cat([seen[reads][where], written], dim=-1)


def _displacements(problem: Problem, batch: Batch, pair: Pair, at: SiteGradient) -> _Side:
    """What ablating each source takes away from the activation."""
    dictionary, baseline = problem.ablation.dictionaries[pair.upstream], problem.ablation.baseline
    features = pair.sources[pair.sources < dictionary.d_sae]
    prompt = prompt_of_token(batch)
    x, read = (each[batch.touchable].float() for each in (at.x, at.read))
    values, indices = dictionary.encode_sparse(read)
    moved = values_of(features, values, indices, dictionary.d_sae) - baseline.features_at(dictionary, batch, features)
    moved_parts = left_over(dictionary, read, x, values, indices) - baseline.errors_at(dictionary, batch)
    directions = dictionary.W_dec[features].float()

    def spread(weights: Tensor) -> Tensor:
        of_features, of_parts = weights[prompt].split([len(features), dictionary.n_parts], dim=1)
        return (moved * of_features) @ directions + together(
            by_coordinate(of_parts, dictionary) * moved_parts, dictionary
        )

    return _side(batch, spread, (moved != 0).any(0), pair.sources, dictionary)


def _covectors(problem: Problem, batch: Batch, pair: Pair, at: SiteGradient) -> _Side:
    """How the score moves with the activation by way of each target.

    A transcoder's features hear at the site that it reads. Its error is what the MLP does beyond them: the score moves
    with what is written as it does, and with what is read by minus what goes through the features and the skip.
    """
    dictionary = problem.ablation.dictionaries[pair.downstream]
    features = pair.targets[pair.targets < dictionary.d_sae]
    column = columns_of(features, dictionary.d_sae)
    prompt = prompt_of_token(batch)
    read, g = at.read[batch.touchable].float().requires_grad_(), at.g[batch.touchable].float()
    with torch.enable_grad():
        values, indices = dictionary.encode_sparse(read)
        of_skip = dictionary.of_parts(read, at.x[batch.touchable].float())[:, dictionary.d_in :]
    is_active = values > 0
    # ds/df of each active feature, while the others and the error stay.
    slopes = row_dots(g, indices, dictionary.W_dec) * is_active

    def spread(weights: Tensor) -> Tensor:
        # The error's covector is g' less that of every feature and of the skip connection, so that one backward pass of
        # the encoder does for all.
        of_features, of_parts = weights.split([len(features), dictionary.n_parts], dim=1)
        of_error = of_parts[prompt, :1]
        of_entry = F.pad(of_features, (0, 1))[prompt[:, None], column[indices]]
        outputs, along = [values], [slopes * (of_entry - of_error)]
        if dictionary.n_parts > 1:
            outputs, along = [values, of_skip], [*along, g * (of_parts[prompt, 1:] - of_error)]
        (heard,) = torch.autograd.grad(outputs, read, along, retain_graph=True, create_graph=torch.is_grad_enabled())
        is_one_site = dictionary.reads == dictionary.writes
        return heard + g * of_error if is_one_site else torch.cat([heard, g * of_error], dim=1)

    fires = torch.zeros(len(features) + 1, dtype=torch.bool, device=g.device)
    fires[column[indices[is_active]]] = True
    return _side(batch, spread, fires[:-1], pair.targets, dictionary)


def _side(
    batch: Batch,
    spread: Callable[[Tensor], Tensor],
    features_move: Bool[Tensor, " features"],
    nodes: Int[Tensor, " nodes"],
    space: NodeSpace,
) -> _Side:
    parts = nodes[nodes >= space.d_sae] - space.d_sae + len(features_move)
    like = torch.zeros(len(batch.lengths), len(features_move) + space.n_parts, device=features_move.device)
    wanted = [*range(len(features_move)), *parts.tolist()]
    moving = [*features_move.nonzero()[:, 0].tolist(), *parts.tolist()]
    return _Side(spread, like, wanted, moving)

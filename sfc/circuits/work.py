"""What finding and judging circuits takes, counted in passes through the blocks after the first site.

`Asked` has the prompts' batches and the sizes; every function below says what one thing that is done with them takes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sfc.circuits.edges import downstream
from sfc.circuits.methods import ExactOptions, IntegratedGradientsOptions, LearnedMaskOptions
from sfc.circuits.options import DiscoveryOptions
from sfc.core.config import Experiment
from sfc.core.sites import layer_of
from sfc.core.work import Amounts
from sfc.models.running import layer_before
from sfc.models.work import Shape, packed, passed, rows_of, scored, tokens_of


class Asked(NamedTuple):
    """A question, as far as its answer's cost depends on it."""

    experiment: Experiment
    sites: Sequence[str]
    n_layers: int
    n_nodes: int
    discovery: Sequence[Shape]
    """batches of the discovery prompts, or pairs"""
    template_tokens: int
    """of the suffix, each of which is a role of its own"""
    pooled: Sequence[Shape] = ()
    """batches of the discovery prompts of all groups, where a method may learn from these as well"""

    @property
    def blocks(self) -> int:
        """Those after the first site, which every ablated run goes through."""
        return self.n_layers - layer_before(self.sites[0]) - 1

    @property
    def blocks_after_sites(self) -> float:
        """Those after a site, on average."""
        return float(np.mean([self.n_layers - layer_before(site) - 1 for site in self.sites]))


def ablated(asked: Asked, shapes: Sequence[Shape], circuits: int) -> Amounts:
    """The score of every prompt with everything outside each circuit ablated."""
    spliced = circuits * tokens_of(shapes) * len(asked.sites)
    return packed(shapes, circuits, asked.blocks) + Amounts(spliced=spliced)


def attributed(asked: Asked, shapes: Sequence[Shape]) -> Amounts:
    """Gradients of the score at every site, and effects from them."""
    tokens = tokens_of(shapes)
    back = Amounts(calls=len(shapes) * asked.blocks, backward=tokens * asked.blocks)
    return scored(shapes, asked.blocks) + back + Amounts(spliced=tokens * len(asked.sites))


def learned_mask(asked: Asked) -> Amounts:
    """Ranking by a learned mask: attribution, all scores, and steps of a few prompts each.

    Every step goes forward and back through every dictionary.
    """
    options, per_step = LearnedMaskOptions.of(asked.experiment), _mean_step(asked)
    tokens, blocks, n_sites = per_step.tokens, asked.blocks, len(asked.sites)
    step = ablated(asked, [per_step], 1)
    step += Amounts(calls=blocks, backward=tokens * blocks, spliced_backward=tokens * n_sites)
    step += scored([per_step], blocks) * (options.kl_weight > 0)
    before = attributed(asked, asked.discovery) + scored(asked.discovery, blocks) + ablated(asked, asked.discovery, 1)
    if options.pooled and asked.pooled:  # they are recorded, run up to the first site, and scored
        last, first = layer_of(asked.sites[-1]) + 1, asked.n_layers - blocks
        before += passed(asked.pooled, last) + passed(asked.pooled, first) + scored(asked.pooled, blocks)
        before += Amounts(encoded=tokens_of(asked.pooled) * n_sites)
    return before + step * options.steps


def _mean_step(asked: Asked) -> Shape:
    """What a step of the mask runs: prompts of one batch, batches drawn by their size."""
    options = LearnedMaskOptions.of(asked.experiment)
    is_paired = DiscoveryOptions.of(asked.experiment).baseline_choice == "counterfactual"
    at_once, n = options.pairs if is_paired else options.prompts, max(rows_of(asked.discovery), 1)
    rows = sum(shape.rows * min(shape.rows, at_once) for shape in asked.discovery) / n
    tokens = sum(shape.tokens * min(shape.rows, at_once) for shape in asked.discovery) / n
    return Shape(max(round(rows), 1), round(tokens / max(rows, 1)))


def attribution(asked: Asked) -> Amounts:
    """Ranking by attribution, or by relevance, whose backward pass costs as much."""
    return attributed(asked, asked.discovery)


def integrated_gradients(asked: Asked) -> Amounts:
    """Ranking by integrated gradients: for every site as many gradients as a path has points, from that site on."""
    points = IntegratedGradientsOptions.of(asked.experiment).steps * len(asked.sites)
    tokens = tokens_of(asked.discovery) * asked.blocks_after_sites
    both_ways = Amounts(forward=tokens, backward=tokens, logits=rows_of(asked.discovery))
    return both_ways * points + Amounts(spliced=tokens_of(asked.discovery) * len(asked.sites))


def exact(asked: Asked) -> Amounts:
    """Ranking by exact effects of the nodes of largest attribution."""
    return attribution(asked) + one_by_one(asked, asked.discovery, ExactOptions.of(asked.experiment).nodes)


def one_by_one(asked: Asked, shapes: Sequence[Shape], nodes: int) -> Amounts:
    """So many nodes ablated each by itself, in runs from their own site on."""
    after = round(asked.blocks_after_sites)
    return packed(shapes, nodes, after) + Amounts(spliced=tokens_of(shapes) * len(asked.sites))


def from_store(asked: Asked) -> Amounts:
    """Ranking by stored rows: those of the discovery prompts through every dictionary; no run of the model."""
    return Amounts(encoded=tokens_of(asked.discovery) * len(asked.sites))


HEARD = 0.1
"""share of the nodes and roles of which something is propagated: features are silent at most tokens of a batch. So that
the edges of the embedded model's circuit take what they took, 19 s of two cores"""


def edges(asked: Asked, shapes: Sequence[Shape], nodes: int) -> Amounts:
    """Edges by attribution between so many nodes, told apart by roles: a backward pass for each node and role.

    Nodes are taken to be spread evenly over the sites; the passes go through the blocks between two sites alone.
    """
    per_site, groups = nodes / len(asked.sites), 2 + asked.template_tokens
    between = [
        max(layer_of(below) - layer_of(site), 1) for site in asked.sites for below, _ in downstream(site, asked.sites)
    ]
    passes = per_site * groups * HEARD
    tokens = tokens_of(shapes) * sum(between)
    return attributed(asked, shapes) + Amounts(forward=tokens, backward=passes * tokens)


def effects_bytes(asked: Asked, shapes: Sequence[Shape]) -> tuple[int, int]:
    """Bytes of attribution on the device, in its largest batch, and in main memory.

    On the device: the effects of a batch's prompts on all nodes, twice while sites are joined, and at one site those of
    every prompt and template position. In main memory: those of all prompts on all nodes.
    """
    largest = max((shape.rows for shape in shapes), default=0)
    positions = min(max((shape.width for shape in shapes), default=0), asked.template_tokens + 8)
    at_site = 3 * largest * positions * asked.n_nodes // len(asked.sites)
    return 4 * (2 * largest * asked.n_nodes + at_site), 4 * 2 * rows_of(shapes) * asked.n_nodes

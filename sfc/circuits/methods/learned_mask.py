"""Learned masks: which nodes must be kept so that the model, with all others ablated, still scores as it does?

One number per node between 0 and 1 is optimised by gradient descent through the very ablation that circuits are
evaluated by, at a price per node that grows from step to step: cheap nodes go first. What is left at a moment is a
circuit for the price of that moment, so that one run goes through all sizes, and nodes are ranked by how long they
held out.

A mask that sees one side only can learn to score high whatever the prompt. Where prompts have counterfactuals, those of
both sides are learned from, each against the other, which no constant satisfies. A mask that sees few prompts learns
them by heart, so that every other step takes pairs of all categories.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.methods import Effects, LearnedMaskOptions, attribution
from sfc.circuits.problem import Problem, distinct_prompts
from sfc.core.progress import progress_bar
from sfc.models.batches import Batch
from sfc.models.engine import kl
from sfc.models.running import CachedResidual, last_logits
from sfc.models.score import DirectedScore, score_batch

START_LOGIT = 1.0
LEARNING_RATE = 0.15
RISING_SHARE = 0.4
SMALLEST_SPAN = 0.1
"""a span |F(M) - F(0)| below this many nats is taken for this, so that the loss stays finite"""


class LearnedMask(NamedTuple):
    """What is known of every node after the last step."""

    mask: Float[np.ndarray, " nodes"]
    """between 0 and 1"""
    held: Float[np.ndarray, " nodes"]
    """the last step after which the mask was above one half, plus the mask at the end: larger is kept longer"""


def rank(problem: Problem) -> Effects:
    """Nodes ranked by how long a learned mask holds them.

    The effects are those of attribution, which also warm-starts the mask. Attributes: `mask`, between 0 and 1, and
    `held`, the step until which the node was kept.
    """
    effects = attribution.rank(problem)
    with progress_bar("learning a mask", LearnedMaskOptions.of(problem.experiment).steps, "steps") as progress:
        learned = learn_mask(problem, np.abs(effects.effect), progress)
    return effects._replace(ranking=attribution.ranked(learned.held, problem.ablation), attributes=learned._asdict())


def learn_mask(
    problem: Problem, warm_start: Float[np.ndarray, " nodes"], progress: Callable[[int], None]
) -> LearnedMask:
    """Learn a mask on the discovery prompts, `pooled` of the steps on those of all categories.

    The loss is the mean squared difference between the masked model's score and the full model's, in units of
    F(M) - F(0) of the problem's own prompts (of pairs: of its root mean square), plus `kl_weight` times the divergence
    of their next-token distributions, plus the price times the sum of the mask. The price rises to `price` linearly
    over the first 40 % of the steps, and from there to `last_price` by a constant factor.

    Args:
        warm_start: non-negative importances; each node's start logit is raised by its rank among them.
    """
    options = LearnedMaskOptions.of(problem.experiment)
    device = problem.model.device
    order = np.argsort(np.argsort(warm_start, kind="stable"), kind="stable") / max(len(warm_start) - 1, 1)
    logits = torch.tensor(START_LOGIT + order, dtype=torch.float32, device=device).requires_grad_()
    held = torch.zeros_like(logits, requires_grad=False)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    random = np.random.default_rng(options.seed)
    own = _Examples(problem, _full_scores(problem), options.pairs if problem.runs.are_pairs else options.prompts)
    pooled = own
    if problem.pooled and options.pooled:
        pooled = _Examples(wider := problem.pooled(), _full_scores(wider), options.pairs)
    span = _span(own)
    for step in range(1, options.steps + 1):
        # Steps of both kinds are spread evenly over all of them.
        examples = pooled if step * options.pooled % 1 < options.pooled else own
        batch, cached, target = examples.drawn(random)
        mask = logits.sigmoid()
        last = _last_logits(examples.problem, batch, cached, mask)
        difference = (examples.problem.score(last, batch) - target) / span
        loss = difference.square().mean() + price(step, options) * mask.sum()
        if options.kl_weight:
            with torch.no_grad():
                plain = last_logits(problem.model, batch, cached=cached).log_softmax(-1)
            loss = loss + options.kl_weight * kl(plain, last.log_softmax(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        held[logits.detach() > 0] = step
        progress(1)
    mask = logits.detach().sigmoid().cpu().double().numpy()
    return LearnedMask(mask, held.cpu().double().numpy() + mask)


def price(step: int, options: LearnedMaskOptions) -> float:
    """The price of a node at a step (1 is the first), in squares of F(M) - F(0)."""
    rising = RISING_SHARE * options.steps
    if step <= rising:
        return options.price * step / rising
    done = (step - rising) / (options.steps - rising)
    return options.price * (options.last_price / options.price) ** done


class _Examples(NamedTuple):
    """What a step learns from: some prompts of a problem, with their scores in the model."""

    problem: Problem
    full: list[Float[Tensor, " batch"]]
    """by batch of the problem's runs"""
    at_once: int

    def drawn(self, random: np.random.Generator) -> tuple[Batch, CachedResidual, Float[Tensor, " drawn"]]:
        """Some prompts of one batch (batches drawn by their size), with their full scores."""
        runs = self.problem.runs
        sizes = np.array([len(batch.prompts) for batch in runs.batches])
        number = random.choice(len(sizes), p=sizes / sizes.sum())
        batch, cached = runs.batches[number], runs.cached_residuals[number]
        rows = torch.from_numpy(random.permutation(sizes[number])[: self.at_once]).to(batch.ids.device)
        return batch.select(rows), cached.select(rows), self.full[number][rows]


@torch.no_grad()
def _full_scores(problem: Problem) -> list[Float[Tensor, " batch"]]:
    """The model's scores of all prompts, by batch; a directed score goes by the prompt, which is run once."""
    scores = []
    for batch, cached in problem.runs:
        first = row = torch.arange(len(batch.lengths), device=batch.lengths.device)
        if isinstance(problem.score, DirectedScore):
            first, row = distinct_prompts(batch)
        runs = batch.select(first), cached.select(first)
        scores.append(score_batch(problem.model, problem.score, runs[0], cached=runs[1])[row])
    return scores


@torch.no_grad()
def _span(examples: _Examples) -> float:
    """What differences of scores are measured in, in nats."""
    problem = examples.problem
    nothing = torch.zeros(problem.ablation.nodes.n_nodes, device=problem.model.device)
    empty = [problem.score(_last_logits(problem, batch, cached, nothing), batch) for batch, cached in problem.runs]
    full, empty = torch.cat(examples.full), torch.cat(empty)
    lost = full - empty
    size = lost.square().mean().sqrt() if problem.runs.are_pairs else (full.mean() - empty.mean()).abs()
    return max(float(size), SMALLEST_SPAN)


def _last_logits(problem: Problem, batch: Batch, cached: CachedResidual, mask: Tensor) -> Float[Tensor, "batch vocab"]:
    circuit = torch.zeros_like(batch.lengths)
    ablation = problem.ablation.for_batch(problem.model, batch, cached)
    interventions = ablation.interventions(mask[None], circuit, batch)
    return last_logits(problem.model, batch, interventions, cached)

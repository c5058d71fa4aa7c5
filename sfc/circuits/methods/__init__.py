"""Methods: what each node does to the score, or how it varies with it, and which nodes a circuit takes first.

A method is registered in `METHODS` with its settings, which are a section of experiments, and with flags that say what
it needs. Nothing here imports torch: a built-in method's module is imported when it ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from pydantic import Field

from sfc.core.options import Options, Share
from sfc.core.registry import Registry, imported_when_called

if TYPE_CHECKING:
    from sfc.circuits.problem import Problem
    from sfc.circuits.work import Asked
    from sfc.core.work import Amounts

NATS = "nats"
"""the unit of causal effects: that of the problem's score"""


class Effects(NamedTuple):
    """What a method says about every node."""

    effect: Float[np.ndarray, " nodes"]
    """signed, in `unit`; not a number for a node that the method has not looked at"""
    absolute: Float[np.ndarray, " nodes"]
    """mean over prompts of the absolute effect where the method has one per prompt, else |effect|"""
    ranking: Int[np.ndarray, " ranked"]
    """the nodes that may be in a circuit, best first"""
    attributes: Mapping[str, Float[np.ndarray, " nodes"]]
    """further numbers per node, such as p-values"""
    unit: str = NATS
    by_position: Float[np.ndarray, "positions nodes"] | None = None
    """the effect's parts from each template position, where the method has them: where in the prompt it matters"""
    by_prompt: Float[np.ndarray, "prompts nodes"] | None = None
    """the effects that `effect` is the mean of, where it is one over prompts"""


@dataclass(frozen=True)
class Method:
    """A way to rank nodes."""

    name: str
    rank: "Callable[[Problem], Effects]"
    options: type[Options] | None = None
    """its settings, in `problem.experiment`"""
    causal: bool = True
    """whether effects are changes of the score in runs of the model; else they come from stored feature values, so that
    nodes must be features"""
    per_prompt: bool = True
    """whether effects are means over `problem.runs`, so that parts of the prompts have circuits of their own"""
    ranked_by_effect: bool = False
    """whether the ranking is that of the |effects| alone, so that it can be resampled with them"""
    reads_topics: bool = False
    """whether the result depends on the topics of the prompts"""
    work: "Callable[[Asked], Amounts] | None" = None
    """what ranking takes, for plans; None where a search takes as long as it takes"""
    signs: tuple[str, str, str] | None = None
    """what an effect above, below and equal to 0 means, unless it is a change of the score; `{positive}` and
    `{negative}` stand for the two sides of the prompts"""


METHODS: Registry[Method] = Registry("method")


class LearnedMaskOptions(Options):
    """How a mask is learned."""

    section = "learned_mask"

    steps: int = Field(120, ge=1, description="steps of gradient descent")
    prompts: int = Field(10, ge=1, description="prompts per step")
    pairs: int = Field(24, ge=1, description="pairs per step, where prompts have counterfactuals")
    pooled: float = Field(
        0.5, ge=0, le=1, description="share of the steps that learn from pairs of all categories, not of its own alone"
    )
    price: float = Field(2e-3, gt=0, description="price per node, in squares of F(M) - F(0)")
    last_price: float = Field(1e-2, gt=0, description="the price to which it rises at last")
    kl_weight: float = Field(
        0.0, ge=0, description="weight of KL(model || circuit) of the next token, in nats, beside the score's loss"
    )
    seed: int = Field(0, ge=0, description="which prompts each step draws")


class IntegratedGradientsOptions(Options):
    """How gradients are integrated."""

    section = "integrated_gradients"

    steps: int = Field(10, ge=1, description="points per path from baseline to clean")


class ExactOptions(Options):
    """What is measured exactly."""

    section = "exact"

    nodes: int = Field(300, ge=1, description="how many nodes, by attribution, are measured and ranked")


class RefusalDirectionOptions(Options):
    """Which features near a refusal direction are taken."""

    section = "refusal_direction"

    per_site: int = Field(10, ge=1, description="candidates per site, those of largest cosine with the direction")
    share: Share = Field(
        0.9, description="the minimal set takes away this share of the score that ablating all candidates does"
    )
    steps: int = Field(10, ge=1, description="points per path of integrated gradients")


class GreedyFilteringOptions(Options):
    """Which features near a refusal direction are tried, and how."""

    section = "greedy_filtering"

    per_site: int = Field(10, ge=1, description="candidates per site, those of largest cosine with the direction")
    share: Share = Field(
        0.9, description="what is left takes away this share of the score that ablating all candidates does"
    )
    prompts: int = Field(50, ge=1, description="at most so many discovery prompts, or pairs")


class CorrelationOptions(Options):
    """Which features are ranked by their correlation, and tested."""

    section = "correlation"

    threshold: float = Field(0.1, ge=0, description="smallest |r| of a node")
    top_per_layer: int | None = Field(None, ge=1, description="take the strongest n per layer instead")
    permutations: int = Field(500, ge=1, description="permutations of the labels that p-values come from")
    min_firing: int = Field(5, ge=1, description="features that fire on fewer prompts are not tested")


def _rank(module: str, function: str = "rank") -> "Callable[[Problem], Effects]":
    return imported_when_called(f"{__name__}.{module}:{function}")


def _work(function: str) -> "Callable[[Asked], Amounts]":
    return imported_when_called(f"sfc.circuits.work:{function}")


METHODS.register(Method("learned-mask", _rank("learned_mask"), LearnedMaskOptions, work=_work("learned_mask")))
METHODS.register(Method("attribution", _rank("attribution"), ranked_by_effect=True, work=_work("attribution")))
_INTEGRATED = _rank("attribution", "rank_integrated")
METHODS.register(
    Method(
        "integrated-gradients", _INTEGRATED, IntegratedGradientsOptions, ranked_by_effect=True,
        work=_work("integrated_gradients"),
    )
)  # fmt: skip
METHODS.register(Method("relevance", _rank("relevance"), ranked_by_effect=True, work=_work("attribution")))
METHODS.register(Method("exact", _rank("exact"), ExactOptions, ranked_by_effect=True, work=_work("exact")))
METHODS.register(Method("refusal-direction", _rank("refusal_direction"), RefusalDirectionOptions))
METHODS.register(Method("greedy-filtering", _rank("greedy"), GreedyFilteringOptions))
METHODS.register(
    Method(
        "correlation", _rank("correlation"), CorrelationOptions, causal=False, per_prompt=False, reads_topics=True,
        work=_work("from_store"),
        signs=("fires more on {positive} prompts", "fires more on {negative} prompts", "no correlation"),
    )
)  # fmt: skip
METHODS.register(
    Method(
        "magnitude", _rank("correlation", "rank_by_magnitude"), causal=False, per_prompt=False,
        work=_work("from_store"),
        signs=("fires", "negative", "silent"),
    )
)  # fmt: skip

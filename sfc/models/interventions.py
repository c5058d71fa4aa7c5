"""The one mechanism that reads or replaces activations at sites while a model runs.

Patching, steering, ablation and splicing an SAE are all "replace the activation at a site by a function of it and of
the run so far". An intervention is such a function; whatever it must carry along a run (an error to keep, a value
seen at an earlier site) it holds in a closure.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from sfc.models.model import Model

Intervention = Callable[[Tensor], Tensor | None]
"""Takes the activation [batch, pos, …] at a site; returns what replaces it, or None to leave it as it is."""


class Interventions(NamedTuple):
    """What acts in a run of prompts and in what is generated after them, by site."""

    in_prompt: Mapping[str, Intervention] = {}
    """act on activations [batch, pos, …] of the prompts"""
    in_reply: Mapping[str, Intervention] = {}
    """act on activations of tokens that the model generates: [batch, 1, …] at each step of generation, and all
    positions at once where a reply is given; then only what stands at its tokens counts"""


@contextmanager
def intervening(model: Model, interventions: Mapping[str, Intervention]) -> Iterator[None]:
    """Let the interventions act at their sites, in every run inside the `with` block and in none after it.

    Raises:
        UserError: the model has no such site.
    """
    model.check_sites(list(interventions))
    with ExitStack() as stack:
        for site, intervention in interventions.items():
            point = model.hooks[site]
            hook = point.register_forward_hook(lambda _module, _inputs, output, act=intervention: act(output))
            stack.callback(hook.remove)
            if site.endswith("hook_normalized"):
                # The bridge computes what a norm divides for its hooks alone, and with a graph only where it has any.
                known: list[Any] = point.__dict__["fwd_hooks"]
                known.append(hook)
                stack.callback(known.remove, hook)
        yield


def chained(first: Intervention | None, second: Intervention) -> Intervention:
    """Both at one site, the second on what the first leaves."""
    if first is None:
        return second

    def both(activation: Tensor) -> Tensor | None:
        between = first(activation)
        after = second(activation if between is None else between)
        return between if after is None else after

    return both


def leaf_recorder(into: dict[str, Tensor], site: str) -> Intervention:
    """As `recorder`, for a run whose score is differentiated: the activation keeps its gradient, in `into[site].grad`.

    The parameters need no gradients, so that the graph starts at the first activation recorded.
    """

    def record(activation: Tensor) -> Tensor:
        x = activation if activation.requires_grad else activation.detach().requires_grad_()
        x.retain_grad()
        into[site] = x
        return x

    return record


def recorder(into: dict[str, Tensor], site: str) -> Intervention:
    """An intervention that changes nothing and keeps the activation under the site's name."""

    def record(activation: Tensor) -> None:
        into[site] = activation

    return record

"""What evaluating twelve circuits costs, in units of a full forward pass over the same prompts and beside plain hooks.

Twelve sizes of one ranking, each kept and each ablated, are scored on the test prompts of one category. Ours is timed
with all that it needs: the pass that fills the prefix cache, baselines, encoding. The other way is what one would
write first: hooks on the whole model, in which features and errors are dense tensors, mixed with their baseline and
decoded by a matrix product. It has the same packed batches, no gradients, and must give the same scores.

Activations and SAEs are those of the root folder, made first where they are missing.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import category
import harness
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sfc.circuits.baselines import tables_of
from sfc.circuits.faithfulness import ablated_scores, top_circuits
from sfc.circuits.methods import METHODS
from sfc.circuits.problem import Problem, PromptRuns
from sfc.models.batches import PACKED_TOKENS, Batch
from sfc.models.score import score_batch, score_prompts

CIRCUITS = 12
SMALLEST = 10
TOLERANCE, TYPICAL = 1e-2, 1e-4
"""nats: by rounding, a feature on the border of the top k falls on one side here and on the other there"""
"""nats by which the two ways' scores may differ"""


class Effort(NamedTuple):
    """How much is measured."""

    rounds: int
    prompts: int


FULL, QUICK = Effort(3, 10_000), Effort(1, 12)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table and, with --json, the figures."""
    options = category.parser(__doc__).parse_args(arguments)
    effort = QUICK if options.quick else FULL
    problem, test_runs = category.prepared(options)
    figures = measure(problem, test_runs.sample(effort.prompts, seed=0).batches, effort.rounds, options.device)
    harness.emit(report(figures), {**figures, "machine": harness.machine(options.device)}, options.json)


def measure(problem: Problem, batches: Sequence[Batch], rounds: int, device: str) -> dict[str, Any]:
    """Seconds of everything, the units and the ratio.

    Args:
        problem: its discovery prompts rank the nodes.
        batches: the prompts that circuits are evaluated on.

    Raises:
        RuntimeError: the two ways' scores do not agree.
    """
    model, score, ablation = problem.model, problem.score, problem.ablation
    sizes = twelve_sizes(ablation.nodes.n_nodes)
    circuits = top_circuits(METHODS["attribution"].rank(problem).ranking, sizes, ablation.nodes.n_nodes)
    keep = np.concatenate([circuits, ~circuits])
    found: dict[str, Float[np.ndarray, "circuits prompts"]] = {}

    def ours(wanted: Bool[np.ndarray, "circuits nodes"]) -> Float[np.ndarray, "circuits prompts"]:
        runs = PromptRuns.of(model, batches, ablation.nodes.sites[0])
        return ablated_scores(model, score, ablation, runs, wanted)

    seconds = harness.in_turns(
        {
            "full forward pass": lambda: score_prompts(model, score, batches),
            "sfc": lambda: found.update(sfc=ours(keep)),
            "sfc, kept only": lambda: ours(circuits),
            "hooks": lambda: found.update(hooks=hooked_scores(problem, batches, keep)),
        },
        rounds,
        device,
    )
    differences = np.abs(found["sfc"] - found["hooks"])
    largest, typical = float(differences.max()), float(np.median(differences))
    if not (largest <= TOLERANCE and typical <= TYPICAL):
        raise RuntimeError(f"the two ways' scores differ by {largest:.2g} nats, and typically by {typical:.2g}")
    unit = seconds["full forward pass"]
    return {
        "units": harness.paired_ratio(seconds["sfc, kept only"], unit),
        "units_with_complements": harness.paired_ratio(seconds["sfc"], unit),
        "units_hooks": harness.paired_ratio(seconds["hooks"], unit),
        "ratio_hooks": harness.paired_ratio(seconds["hooks"], seconds["sfc"]),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "seconds_by_round": seconds,
        "largest_difference": largest,
        "median_difference": typical,
        "sizes": sizes,
        "prompts": sum(len(batch.prompts) for batch in batches),
        "tokens": sum(int(batch.lengths.sum()) for batch in batches),
    }


def twelve_sizes(n_nodes: int) -> list[int]:
    """From a handful to all nodes, each by the same factor more than the last."""
    return np.geomspace(min(SMALLEST, n_nodes), n_nodes, CIRCUITS).round().astype(int).tolist()


@torch.no_grad()
def hooked_scores(
    problem: Problem, batches: Sequence[Batch], keep: Bool[np.ndarray, "circuits nodes"]
) -> Float[np.ndarray, "circuits prompts"]:
    """What `ablated_scores` gives, by whole runs with dense dictionaries; error mode `node`."""
    scores = np.full((len(keep), sum(len(batch.prompts) for batch in batches)), np.nan)
    for batch in batches:
        at_once = batch.copies_in(PACKED_TOKENS)
        for first in range(0, len(keep), at_once):
            masks = torch.from_numpy(keep[first : first + at_once]).to(problem.model.device, torch.float32)
            packed = batch.repeat(len(masks))
            circuit = torch.arange(len(masks), device=masks.device).repeat_interleave(len(batch.lengths))
            hooks = {
                site: _dense_hook(problem, site, mask[circuit], packed)
                for site, mask in problem.ablation.nodes.split(masks).items()
            }
            result = score_batch(problem.model, problem.score, packed, hooks).view(len(masks), -1)
            scores[first : first + len(masks), batch.prompts.cpu().numpy()] = result.cpu().numpy()
    return scores


def _dense_hook(problem: Problem, site: str, mask: Float[Tensor, "batch nodes"], batch: Batch) -> Callable:
    dictionary, baseline = problem.ablation.dictionaries[site], tables_of(problem.ablation.baseline)
    touchable = batch.touchable
    template_positions = batch.template_positions[touchable]
    keep = mask[:, None].expand(*batch.template_positions.shape, -1)[touchable]
    keep_feature, keep_error = keep[:, :-1], keep[:, -1:]
    f_ref, error_ref = baseline.features[site][template_positions], baseline.errors[site][template_positions]

    def replace(activation: Tensor) -> Tensor:
        x = activation[touchable]
        f = dictionary.encode(x)
        error = x - dictionary.decode(f)
        mixed = torch.lerp(f_ref, f, keep_feature)
        changed = activation.clone()
        changed[touchable] = dictionary.decode(mixed) + torch.lerp(error_ref, error, keep_error)
        return changed

    return replace


def report(figures: Mapping[str, Any]) -> str:
    """The table, and what it was measured on."""
    seconds = figures["seconds"]
    rows = [
        ("full forward pass", seconds["full forward pass"], 1.0, None),
        (f"sfc, {CIRCUITS} circuits kept and ablated", seconds["sfc"], figures["units_with_complements"], None),
        (f"sfc, {CIRCUITS} circuits kept", seconds["sfc, kept only"], figures["units"], "at most 9 units"),
        (
            "hooks on the whole model, kept and ablated",
            seconds["hooks"],
            figures["units_hooks"],
            f"{figures['ratio_hooks']:.2f} times ours; at least 1.8",
        ),
    ]
    table = harness.markdown_table(("what", "seconds", "full forward passes", "wanted"), rows)
    return (
        f"{table}\n\n{figures['prompts']} prompts, {figures['tokens']:,} tokens; scores differ by at most"
        f" {figures['largest_difference']:.1g} nats"
    )


if __name__ == "__main__":
    main()

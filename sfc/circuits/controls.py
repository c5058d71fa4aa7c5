"""What the reported circuit is compared with: the best nodes of one site, and whole curves.

Areas of faithfulness curves follow the Mechanistic Interpretability Benchmark (Mueller et al. 2025), over nodes. CPR
says how well the nodes that raise the score carry it: the area under the curve with nodes ranked by signed effect;
higher is better. CMD says how far the circuit is from the model: the area between the curve and 1 with nodes ranked by
the effect's size; lower is better. On the linear axis sizes are shares of all nodes and the empty circuit counts as 0;
on the logarithmic axis, where small circuits have their place, the curve begins with its smallest size.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from sfc.circuits.faithfulness import faithfulness_of_sizes
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.sites import short_site

Progress = Callable[[int], None]


def single_site_faithfulness(
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    size: int,
    min_denominator: float,
    progress: Progress,
) -> dict[str, float | None]:
    """Faithfulness of the `size` best nodes of each site alone; None where a site has fewer or it is not measurable."""
    nodes, found = problem.ablation.nodes, {}
    for number, site in enumerate(nodes.sites):
        members = ranking[nodes.site_numbers[ranking] == number]
        enough = len(members) >= size
        values = faithfulness_of_sizes(problem, runs, members, [size], min_denominator, progress) if enough else [None]
        found[short_site(site)] = values[0]
    return found


def curve_areas(
    problem: Problem,
    runs: PromptRuns,
    effect: Float[np.ndarray, " nodes"],
    sizes: Sequence[int],
    min_denominator: float,
    progress: Callable[[int], None],
) -> dict[str, float | None]:
    """`cpr`, `cpr_log`, `cmd` and `cmd_log` on the prompts of `runs`; None where faithfulness is not measurable.

    Args:
        effect: signed; nodes that have none are ranked last.
    """
    areas: dict[str, float] = {}
    shares = np.array(sizes) / len(effect)
    known = np.nan_to_num(effect)
    for name, importance in {"cpr": known, "cmd": np.abs(known)}.items():
        ranking = np.argsort(-importance, kind="stable")
        values = np.array(faithfulness_of_sizes(problem, runs, ranking, sizes, min_denominator, progress), dtype=float)
        heights = values if name == "cpr" else np.abs(1 - values)
        start = 0.0 if name == "cpr" else 1.0
        areas[name] = area(np.append(0.0, shares), np.append(start, heights))
        areas[f"{name}_log"] = area(np.log(shares), heights)
    return {name: None if np.isnan(value) else value for name, value in areas.items()}


def area(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> float:
    """The mean height of the line through the points: its area over the width."""
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if x[-1] > x[0] else float(y.mean())

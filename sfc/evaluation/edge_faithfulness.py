"""How faithful a circuit's edges are: its score with these edges alone, on the scale of its nodes."""

from collections.abc import Callable, Sequence

import numpy as np

from sfc.circuits.problem import Problem, PromptRuns
from sfc.evaluation.ablated import ablated_scores, full_scores
from sfc.evaluation.edge_ablation import edge_ablated_scores, why_not_ablatable
from sfc.evaluation.metrics import Scores, metrics_with_intervals


def edge_faithfulness(
    problem: Problem,
    runs: PromptRuns,
    members: Sequence[int],
    edges: Sequence[tuple[int, int]],
    min_denominator: float,
    seed: int,
    progress: Callable[[int], None],
) -> dict[str, float | None]:
    """`f_edges` in nats, and `edge_faithfulness` with the ends of its 95 % interval.

    The ratio is `(F(edges) - F(0)) / (F(M) - F(0))`, F(edges) as `sfc.evaluation.edge_ablation` says. All are None
    where there are no edges, or edges that cannot be ablated; the ratio also where it cannot be measured.

    Args:
        progress: called with the number of pairs of a batch and a site that are done since the last call.
    """
    if not edges or why_not_ablatable(problem.ablation.nodes, members, edges) is not None:
        return dict.fromkeys(("f_edges", "edge_faithfulness", "edge_faithfulness_low", "edge_faithfulness_high"))
    of_edges = edge_ablated_scores(problem, runs, members, edges, progress)
    full = full_scores(problem.model, problem.score, runs)
    nothing = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    empty = ablated_scores(problem.model, problem.score, problem.ablation, runs, nothing)[0]
    metrics = metrics_with_intervals(Scores(full, empty, of_edges, of_edges), min_denominator, seed)
    ratios = {f"edge_{name}": metrics[name] for name in ("faithfulness", "faithfulness_low", "faithfulness_high")}
    return {"f_edges": float(of_edges.mean()), **ratios}

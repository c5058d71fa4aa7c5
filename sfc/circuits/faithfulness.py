r"""Faithfulness and completeness of circuits, from the mean scores of four models, and what they are compared with.

F(M) is the full model, F(C) has everything outside the circuit ablated, F(M\C) the circuit, F(0) everything.

The curve of a ranking says how good its best n nodes are as a circuit, for many n, beside random circuits with as many
features at each site that are as often active, and beside the best nodes of one site alone. Areas of curves follow the
Mechanistic Interpretability Benchmark (Mueller et al. 2025), over nodes. CPR says how well the nodes that raise the
score carry it: the area under the curve with nodes ranked by signed effect; higher is better. CMD says how far the
circuit is from the model: the area between the curve and 1 with nodes ranked by the effect's size; lower is better. On
the linear axis sizes are shares of all nodes and the empty circuit counts as 0; on the logarithmic axis, where small
circuits have their place, the curve begins with its smallest size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int

from sfc.circuits.ablation import Ablation
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.sites import short_site
from sfc.models import engine
from sfc.models.batches import Batch
from sfc.models.engine import NO_EDIT, Alike, Edits, PreparedPrompts, Progress
from sfc.models.interventions import Interventions
from sfc.models.loading import Model
from sfc.models.running import CachedResidual
from sfc.models.score import Score
from sfc.stats import mean_of_draws, resampled_means

_TAILS = (0.025, 0.975)


class Metrics(NamedTuple):
    """Ratios without a unit; None where the denominator cannot be told from zero."""

    faithfulness: float | None
    """`(F(C) - F(0)) / (F(M) - F(0))`: 1 where the mean score comes back in full (Marks et al. 2024)"""
    completeness: float | None
    """`F(M\\C) / F(M)`, as the published pipeline defines it; depends on where the score's zero lies"""
    completeness_normalised: float | None
    """`(F(M\\C) - F(0)) / (F(M) - F(0))`: 0 where nothing is left without the circuit (Marks et al. 2024)"""


class Scores(NamedTuple):
    """The score of every prompt under the four models, in nats; or means of them, all of one shape."""

    model: Float[np.ndarray, " prompts"]
    empty: Float[np.ndarray, " prompts"]
    circuit: Float[np.ndarray, " prompts"]
    complement: Float[np.ndarray, " prompts"]


def circuit_metrics(
    f_model: float, f_empty: float, f_circuit: float, f_complement: float, min_denominator: float
) -> Metrics:
    """The three ratios; a denominator smaller in size than `min_denominator` makes None, never a huge number."""
    means = Scores(*(np.array(f) for f in (f_model, f_empty, f_circuit, f_complement)))
    return Metrics(
        *(
            float(numerator / denominator) if abs(denominator) >= min_denominator else None
            for numerator, denominator in _fractions(means)
        )
    )


def metrics_with_intervals(scores: Scores, min_denominator: float, seed: int) -> dict[str, float | None]:
    """The ratios of the mean scores, each with the ends of its 95 % interval as `…_low` and `…_high`.

    Prompts are drawn again with replacement, the same ones for numerator and denominator, so that both move together.
    A ratio and its interval are None where the denominator is smaller than `min_denominator`, or its own interval
    includes zero.
    """
    f_model, f_empty, f_circuit, f_complement = (float(values.mean()) for values in scores)
    plain = circuit_metrics(f_model, f_empty, f_circuit, f_complement, min_denominator)
    resampled = _fractions(Scores(*resampled_means(np.stack(scores, axis=1), seed).T))
    figures: dict[str, float | None] = {}
    for (name, value), (numerator, denominator) in zip(plain._asdict().items(), resampled, strict=True):
        low, high = np.quantile(denominator, _TAILS)
        measurable = value is not None and (low > 0 or high < 0)
        ends = np.quantile(numerator / denominator, _TAILS).tolist() if measurable else [None, None]
        figures |= {name: value if measurable else None, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return figures


def _fractions(f: Scores) -> list[tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator of each ratio, in the order of `Metrics`."""
    span = f.model - f.empty
    return [(f.circuit - f.empty, span), (f.complement, f.model), (f.complement - f.empty, span)]


@dataclass(frozen=True)
class Ablations(Edits):
    """Circuits as edits: everything outside each one is ablated at the tokens of the prompt.

    Tokens of a reply are not: no prompt says what a reply's baseline would be.
    """

    ablation: Ablation
    keep: Bool[np.ndarray, "circuits nodes"]
    """the nodes of each circuit"""

    def __len__(self) -> int:
        return len(self.keep)

    def alike(self) -> Sequence[Alike]:
        """All of them."""
        return [Alike(range(len(self.keep)), self.ablation.nodes.sites[0])]

    def for_batch(self, model: Model, batch: Batch, start: CachedResidual | None) -> "Ablations":
        """See `Edits`."""
        return replace(self, ablation=self.ablation.for_batch(model, batch, start))

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        """See `Edits`."""
        keep = torch.from_numpy(self.keep[members]).to(batch.ids.device)
        circuit = torch.arange(len(keep), device=keep.device).repeat_interleave(len(batch.lengths) // len(keep))
        # Where all nodes of a site are kept, what would be put there is what is there.
        by_site = self.ablation.nodes.split(keep).items()
        sites = [site for site, kept in by_site if self.ablation.error_mode != "node" or not kept.all()]
        return Interventions(self.ablation.interventions(keep.float(), circuit, batch, sites))


def prepared(model: Model, runs: PromptRuns) -> PreparedPrompts:
    """The prompts of the runs for the engine, with their cached residual streams."""
    return PreparedPrompts.of(model, runs.batches, runs.cached_residuals)


def ablated_scores(
    model: Model,
    score: Score,
    ablation: Ablation,
    runs: PromptRuns,
    keep: Bool[np.ndarray, "circuits nodes"],
    progress: Progress = lambda _runs: None,
) -> Float[np.ndarray, "circuits prompts"]:
    """The score of every prompt with everything outside each circuit ablated.

    Args:
        keep: the nodes of each circuit.
        progress: called with the number of pairs of a circuit and a prompt that are done since the last call.
    """
    return engine.scores(prepared(model, runs), score, Ablations(ablation, keep), progress)


def full_scores(model: Model, score: Score, runs: PromptRuns) -> Float[np.ndarray, " prompts"]:
    """The score of every prompt in the model as it is."""
    return engine.scores(prepared(model, runs), score, NO_EDIT)[0]


FIRING_RATES = (0.0, 0.01, 0.05, 0.2, 0.5)
"""lower ends, but for the first, of the strata within which features are exchanged"""


def random_circuits(
    circuits: Bool[np.ndarray, "circuits nodes"], strata: Int[np.ndarray, " nodes"], draws: int, seed: int
) -> Bool[np.ndarray, "draws circuits nodes"]:
    """For each circuit, random ones with as many nodes of every stratum; nodes of stratum -1 stay as they are."""
    random = np.random.default_rng(seed)
    result = np.zeros((draws, *circuits.shape), dtype=bool)
    result[..., strata < 0] = circuits[:, strata < 0]
    for stratum in range(strata.max() + 1):
        members = np.flatnonzero(strata == stratum)
        for draw, row in np.ndindex(result.shape[:2]):
            count = int(circuits[row, members].sum())
            result[draw, row, random.choice(members, count, replace=False)] = True
    return result


def matching_strata(nodes: Nodes, firing_rates: Float[np.ndarray, " nodes"] | None = None) -> Int[np.ndarray, " nodes"]:
    """A stratum per site and, where rates are given, per range of firing rates; -1 for error nodes.

    Args:
        firing_rates: share of prompts in which a feature is active; error nodes have any value.
    """
    rates = np.zeros(nodes.n_nodes) if firing_rates is None else firing_rates
    within = np.searchsorted(FIRING_RATES, rates, side="left")
    strata = nodes.site_numbers * (len(FIRING_RATES) + 1) + within
    return np.where(nodes.is_error, -1, strata)


def curve_sizes(wanted: Sequence[int], n_ranked: int) -> list[int]:
    """The wanted sizes that the ranking can fill, and the whole ranking."""
    return sorted({size for size in wanted if size < n_ranked} | {n_ranked})


def top_circuits(
    ranking: Int[np.ndarray, " ranked"], sizes: Sequence[int], n_nodes: int
) -> Bool[np.ndarray, "s nodes"]:
    """For each size, the circuit of the best nodes."""
    keep = np.zeros((len(sizes), n_nodes), dtype=bool)
    for row, size in enumerate(sizes):
        keep[row, ranking[:size]] = True
    return keep


NEAR_BEST = 0.9
"""where no size reaches the target, this share of the best one's figure is enough"""


def choose_size(sizes: Int[np.ndarray, " sizes"], figure: Float[np.ndarray, " sizes"], target: float) -> int:
    """The smallest size whose figure reaches the target; where none does, `NEAR_BEST` of the best's.

    Args:
        figure: on discovery prompts; NaN where it is not measurable. Where it is nowhere, the smallest size is chosen.
    """
    if np.isnan(figure).all():
        return int(sizes.min())
    best = np.nanmax(figure)
    return int(sizes[figure >= min(target, best - (1 - NEAR_BEST) * abs(best))].min())


def faithfulness_of_sizes(
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    sizes: Sequence[int],
    min_denominator: float,
    progress: Progress,
) -> list[float | None]:
    """Faithfulness of the best nodes, for each size: a curve without the rest. None where it cannot be measured."""
    circuits = top_circuits(ranking, sizes, problem.ablation.nodes.n_nodes)
    empty = np.zeros_like(circuits[:1])
    f_model = full_scores(problem.model, problem.score, runs).mean()
    f_empty, *f_circuits = _scores(problem, runs, np.concatenate([empty, circuits]), progress).mean(1)
    return [circuit_metrics(f_model, f_empty, f, f_empty, min_denominator).faithfulness for f in f_circuits]


def evaluation_curve(
    problem: Problem,
    runs: PromptRuns,
    ranking: Int[np.ndarray, " ranked"],
    sizes: Sequence[int],
    config: EvaluationOptions,
    seed: int,
    progress: Progress,
) -> pd.DataFrame:
    """One row per size: the four mean scores, the three ratios with 95 % intervals, and other circuits of that size.

    Columns: `size, faithfulness, completeness, completeness_normalised, f_model, f_circuit, f_complement, f_empty`, for
    each ratio its `…_low` and `…_high` (bootstrap over prompts), `random_faithfulness` (mean over the draws, see
    `RandomCircuits`) with `random_low, random_high` (the 95 % interval of that mean), `random_completeness_normalised`
    (the mean of what is left without them), and `last_site_faithfulness`, of the best nodes of the last site alone
    (missing where it has fewer). Scores in nats, ratios without unit. A ratio whose denominator is small, or has zero
    within its interval, is missing.
    """
    nodes = problem.ablation.nodes
    circuits = top_circuits(ranking, sizes, nodes.n_nodes)
    empty = np.zeros_like(circuits[:1])
    at_last_site = ranking[nodes.site_numbers[ranking] == len(nodes.sites) - 1]
    last_site = top_circuits(at_last_site, sizes, nodes.n_nodes)
    scores = _scores(problem, runs, np.concatenate([empty, circuits, ~circuits, last_site]), progress)
    full = full_scores(problem.model, problem.score, runs)
    of_empty, of_circuits, of_complements, of_last_site = np.split(scores, np.cumsum([1, *[len(sizes)] * 2]))
    f_model, f_empty = full.mean(), of_empty.mean()
    tolerance = config.random_width * max(abs(f_model - f_empty), config.min_denominator)
    random = random_scores(problem, runs, circuits, config.random_draws, tolerance, seed, progress)
    rows = []
    for i, size in enumerate(sizes):
        by_prompt = Scores(full, of_empty[0], of_circuits[i], of_complements[i])
        metrics = metrics_with_intervals(by_prompt, config.min_denominator, seed)
        measurable = metrics["faithfulness"] is not None
        span = f_model - f_empty if measurable else np.nan
        last = (of_last_site[i].mean() - f_empty) / span
        low, mean, high = (np.array(mean_of_draws(random[i].alone)) - f_empty) / span
        if span < 0:
            low, high = high, low
        rows.append(
            {
                "size": size,
                **metrics,
                "f_model": f_model,
                "f_circuit": of_circuits[i].mean(),
                "f_complement": of_complements[i].mean(),
                "f_empty": f_empty,
                "random_faithfulness": mean,
                "random_low": low,
                "random_high": high,
                "random_completeness_normalised": (np.mean(random[i].without) - f_empty) / span,
                "last_site_faithfulness": last if size <= len(at_last_site) else None,
            }
        )
    return pd.DataFrame(rows)


FEWEST_DRAWS = 3
"""random circuits of every size: fewer say nothing of how far they lie apart"""


class RandomCircuits(NamedTuple):
    """Mean scores of the random circuits of one size, a number for each that was drawn."""

    alone: list[float]
    """with everything else ablated"""
    without: list[float]
    """with these nodes ablated"""


def random_scores(
    problem: Problem,
    runs: PromptRuns,
    circuits: Bool[np.ndarray, "circuits nodes"],
    most: int,
    tolerance: float,
    seed: int,
    progress: Progress = lambda _runs: None,
) -> list[RandomCircuits]:
    """For each circuit, random ones of its nodes' sites and firing rates, as many as it takes.

    There are three of each; then one more, and again, of those for which the 95 % interval of the mean score is wider
    than the tolerance.

    Args:
        most: random circuits of each.
        tolerance: in nats.
    """
    strata = matching_strata(problem.ablation.nodes, problem.firing_rates)
    drawn = random_circuits(circuits, strata, most, seed)
    found = [RandomCircuits([], []) for _ in circuits]
    fewest = min(FEWEST_DRAWS, most)
    for draws in [range(fewest), *([draw] for draw in range(fewest, most))]:
        wide = [i for i, of in enumerate(found) if not of.alone or _width(of.alone) > tolerance]
        if not wide:
            break
        keep = drawn[draws][:, wide].reshape(-1, circuits.shape[1])
        alone, without = _scores(problem, runs, np.concatenate([keep, ~keep]), progress).mean(1).reshape(2, -1)
        for place, (kept, ablated) in enumerate(zip(alone.tolist(), without.tolist(), strict=True)):
            found[wide[place % len(wide)]].alone.append(kept)
            found[wide[place % len(wide)]].without.append(ablated)
    return found


def _width(values: Sequence[float]) -> float:
    low, _, high = mean_of_draws(values)
    return high - low


def _scores(problem: Problem, runs: PromptRuns, keep: np.ndarray, progress: Progress) -> np.ndarray:
    return ablated_scores(problem.model, problem.score, problem.ablation, runs, keep, progress)


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
    progress: Progress,
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

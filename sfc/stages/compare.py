"""Stage: the circuits of several categories side by side. One mechanism or many?

Rankings are what takes time: one of each category, two of its halves, two of each shuffled pool. Each is written when
it is found, so that a run that was interrupted goes on with the next. Circuits come from discovery prompts, overlaps
from circuits, and all scores from test prompts.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list

from sfc.ablation.nodes import Nodes
from sfc.artifacts import Artifact, read_json, write_csv, write_json
from sfc.circuits.effects import METHODS
from sfc.circuits.problem import Problem, PromptRuns
from sfc.errors import UserError
from sfc.evaluation.ablated import ablated_scores, full_scores
from sfc.evaluation.comparison import (
    Overlaps,
    Weights,
    chance_overlap,
    cluster,
    jaccard,
    shared_core,
    verdict,
    weighted_overlap,
)
from sfc.evaluation.metrics import Scores, metrics_with_intervals
from sfc.progress import progress_bar, say
from sfc.run import Run
from sfc.stages.problem import prepare_problem
from sfc.viewer.comparison import write_comparison_page

FILES = {
    "page": "comparison.html",
    "overlap": "overlap.csv",
    "transfer": "transfer.csv",
    "core": "core.csv",
    "result": "result.json",
}
_OVERLAPS: dict[str, Callable[[Weights, Weights], float]] = {"jaccard": jaccard, "weighted": weighted_overlap}
_BY_PROMPTS = ("learned-mask", "attribution", "integrated-gradients", "exact")


class Found(NamedTuple):
    """The circuits of a comparison, each with the sizes of its nodes' effects."""

    whole: dict[str, Weights]
    halves: dict[str, list[Weights]]
    shuffled: list[list[Weights]]


def make_comparison(run: Run, artifact: Artifact, categories: Sequence[str], rebuild: bool = False) -> None:
    """Find the circuits, compare them, and write tables and a page.

    Raises:
        UserError: the method does not work prompt by prompt, or a category lacks prompts.
    """
    experiment = run.experiment
    if experiment.discovery.method not in _BY_PROMPTS:
        raise UserError(
            f"compare needs a method that halves of the prompts can be given to: one of {', '.join(_BY_PROMPTS)}"
        )
    with artifact.being_made(rebuild) as folder:
        found = _find(run, folder / "rankings", categories)
        tables = {name: _overlaps(found, categories, measure) for name, measure in _OVERLAPS.items()}
        transfer, core, nodes = _on_test_prompts(run, found, categories)
        tables["jaccard"] = tables["jaccard"]._replace(chance=_chance(found, nodes))
        verdicts = {name: verdict(table, experiment.seed)._asdict() for name, table in tables.items()}
        result = {
            "preset": experiment.name,
            "method": experiment.discovery.method,
            "size": experiment.comparison.size,
            "categories": list(categories),
            "order": _order(tables["jaccard"]),
            "overlap": verdicts,
            "verdict": verdicts["jaccard"]["words"],
            "core_nodes": shared_core(list(found.whole.values())),
            "files": FILES,
        }
        overlap = _long_table(tables, found, categories)
        for name, table in {"overlap": overlap, "transfer": transfer, "core": core}.items():
            write_csv(folder / FILES[name], lambda path, table=table: table.to_csv(path, index=False))
        write_comparison_page(folder / FILES["page"], result, tables["jaccard"], transfer, core)
        write_json(folder / FILES["result"], result)
        artifact.finish(result=result)


def _find(run: Run, folder: Path, categories: Sequence[str]) -> Found:
    """All circuits: those that are in the folder already are read, the others found."""
    config, seed = run.experiment.comparison, run.experiment.seed
    pairs = list(itertools.combinations(categories, 2))
    pools = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[: config.shuffles]]
    names = [f"{category}{part}" for category in categories for part in ("", "-half-0", "-half-1")]
    names += [f"{a}-{b}-half-{half}" for a, b in pools for half in (0, 1)]
    missing = {name for name in names if not (folder / f"{name}.json").exists()}
    for number, (name, problem) in enumerate(_problems(run, categories, pools, missing), start=1):
        say(f"{number} of {len(missing)}: circuit of {name}, {problem.runs.n_prompts} prompts")
        write_json(folder / f"{name}.json", _ranked(problem, config.size))

    def read(name: str) -> Weights:
        return read_json(folder / f"{name}.json")

    return Found(
        {category: read(category) for category in categories},
        {category: [read(f"{category}-half-{half}") for half in (0, 1)] for category in categories},
        [[read(f"{a}-{b}-half-{half}") for half in (0, 1)] for a, b in pools],
    )


def _problems(
    run: Run, categories: Sequence[str], pools: Sequence[tuple[str, str]], missing: set[str]
) -> Iterator[tuple[str, Problem]]:
    """What is still to be found, by name; prompts are only prepared where something of theirs is missing."""
    seed = run.experiment.seed
    for category in categories:
        names = [category, f"{category}-half-0", f"{category}-half-1"]
        if missing.isdisjoint(names):
            continue
        problem, _, _ = prepare_problem(run, category)
        parts = [problem.runs, *problem.runs.halves(seed)]
        yield from (
            (name, replace(problem, runs=part)) for name, part in zip(names, parts, strict=True) if name in missing
        )
    for a, b in pools:
        names = [f"{a}-{b}-half-{half}" for half in (0, 1)]
        if missing.isdisjoint(names):
            continue
        problem, other = (prepare_problem(run, category)[0] for category in (a, b))
        # Half of each category's prompts, so that a shuffled half has as many as any other.
        size = (problem.runs.n_prompts + other.runs.n_prompts) // 4
        pool = problem.runs.joined(other.runs).sample(2 * size, seed)
        parts = pool.halves(seed)
        yield from (
            (name, replace(problem, runs=part)) for name, part in zip(names, parts, strict=True) if name in missing
        )


def _ranked(problem: Problem, size: int) -> Weights:
    """The best nodes by the problem's method, best first, with the sizes of their effects."""
    effects, nodes = METHODS[problem.config.method](problem), problem.ablation.nodes
    return {nodes.name(int(node)): float(abs(effects.effect[node])) for node in effects.ranking[:size]}


def _overlaps(found: Found, categories: Sequence[str], measure: Callable[[Weights, Weights], float]) -> Overlaps:
    halves = [found.halves[category] for category in categories]
    within = np.array([measure(*pair) for pair in halves])
    between = np.diag(within)
    for i, j in itertools.permutations(range(len(categories)), 2):
        between[i, j] = np.mean([measure(a, b) for a in halves[i] for b in halves[j]])
    return Overlaps(within, between, np.array([measure(*pair) for pair in found.shuffled]))


def _order(overlaps: Overlaps) -> list[int]:
    """The categories in the order of the leaves of their clustering."""
    return [int(leaf) for leaf in leaves_list(cluster(overlaps.between))]


def _long_table(tables: dict[str, Overlaps], found: Found, categories: Sequence[str]) -> pd.DataFrame:
    """One row per pair of categories: overlaps of halves (`…_halves`) and of the whole circuits."""
    rows = []
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(categories), 2):
        row: dict[str, Any] = {"a": a, "b": b}
        for name, measure in _OVERLAPS.items():
            row[f"{name}_halves"] = tables[name].between[i, j]
            row[name] = measure(found.whole[a], found.whole[b])
        rows.append(row)
    return pd.DataFrame(rows)


def _chance(found: Found, nodes: Nodes) -> float:
    """The overlap of random circuits with as many nodes per site as halves have on average."""
    circuits = [list(half) for halves in found.halves.values() for half in halves]
    numbers = [nodes.number(name) for circuit in circuits for name in circuit]
    counts = np.bincount(nodes.site_numbers[numbers], minlength=len(nodes.sites)) / len(circuits)
    return chance_overlap(counts, np.array(nodes.sizes))


def _on_test_prompts(run: Run, found: Found, categories: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame, Nodes]:
    """What the circuits do on each category's test prompts.

    Returns:
        `transfer`: one row per circuit and category of prompts, with faithfulness and completeness and their intervals;
        `core`: the same for the shared core, and for what is left of the category's own circuit without it; the nodes.
    """
    core = shared_core(list(found.whole.values()))
    transfer, parts, nodes = [], [], None
    with progress_bar("test prompts", len(categories), "categories") as progress:
        for category in categories:
            problem, test_runs, _ = prepare_problem(run, category)
            nodes = problem.ablation.nodes
            rest = [name for name in found.whole[category] if name not in core]
            circuits = [*(list(weights) for weights in found.whole.values()), core, rest]
            names = [*found.whole, "shared core", "the rest of its own"]
            rows = _scored(problem, test_runs, circuits, run)
            for name, circuit, row in zip(names, circuits, rows, strict=True):
                row = {"circuit": name, "prompts": category, "nodes": len(circuit), **row}
                (transfer if name in found.whole else parts).append(row)
            progress(1)
    assert nodes is not None, "there are at least two categories"
    return pd.DataFrame(transfer), pd.DataFrame(parts), nodes


def _scored(problem: Problem, runs: PromptRuns, circuits: Sequence[Sequence[str]], run: Run) -> list[dict[str, Any]]:
    nodes = problem.ablation.nodes
    keep = np.zeros((1 + len(circuits), nodes.n_nodes), dtype=bool)
    for row, circuit in enumerate(circuits, start=1):
        keep[row, [nodes.number(name) for name in circuit]] = True
    packed = np.concatenate([keep, ~keep[1:]])
    scores = ablated_scores(problem.model, problem.score, problem.ablation, runs, packed)
    full, smallest = full_scores(problem.model, problem.score, runs), run.experiment.evaluation.min_denominator
    return [
        metrics_with_intervals(Scores(full, scores[0], kept, ablated), smallest, run.experiment.seed)
        for kept, ablated in zip(scores[1 : len(keep)], scores[len(keep) :], strict=True)
    ]

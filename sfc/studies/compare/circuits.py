"""The circuits of a comparison: one of each category, two of its halves, two of each shuffled pool of two categories.

Finding them is what takes time. Each is written when it is found, so that a run that was interrupted goes on with the
next.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from sfc.circuits.edges import Edge, attribution_weights
from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES, Nodes
from sfc.circuits.options import DiscoveryOptions
from sfc.circuits.problem import Problem
from sfc.core.artifacts import read_model, write_json
from sfc.core.progress import say
from sfc.data.schema import keyed_ranks
from sfc.run import Run
from sfc.session import Session
from sfc.studies.compare.options import ComparisonOptions
from sfc.studies.compare.overlap import Weights
from sfc.studies.discover.problem import prepare_problem


class Circuit(BaseModel):
    """A circuit's nodes and its edges, by their names, with the sizes of their effects."""

    nodes: dict[str, float]
    edges: dict[str, float] | None = None
    """None where edges are not compared"""


class Found(NamedTuple):
    """The circuits of a comparison: of each its nodes, or its edges, with the sizes of their effects."""

    whole: dict[str, Weights]
    halves: dict[str, list[Weights]]
    shuffled: list[list[Weights]]


def find_circuits(session: Session, folder: Path, categories: Sequence[str]) -> dict[str, Found]:
    """All circuits' `nodes` and, where they are wanted, `edges`: those in the folder are read, the others found."""
    experiment = session.run.experiment
    options = ComparisonOptions.of(experiment)
    pairs = list(itertools.combinations(categories, 2))
    drawn = np.random.default_rng(experiment.seed).permutation(len(pairs))[: options.shuffles]
    pools = [pairs[number] for number in drawn]
    names = [f"{category}{part}" for category in categories for part in ("", "-half-0", "-half-1")]
    names += [f"{a}-{b}-half-{half}" for a, b in pools for half in (0, 1)]
    missing = {name for name in names if not (folder / f"{name}.json").exists()}
    for number, (name, problem) in enumerate(problems(session, categories, pools, missing), start=1):
        say(f"{number} of {len(missing)}: circuit of {name}, {problem.runs.n_prompts} prompts")
        write_json(folder / f"{name}.json", _circuit(problem, options).model_dump(exclude_none=True))
    circuits: dict[str, dict[str, Weights]] = {
        name: read_model(folder / f"{name}.json", Circuit).model_dump(exclude_none=True) for name in names
    }
    return {
        part: Found(
            {category: circuits[category][part] for category in categories},
            {category: [circuits[f"{category}-half-{half}"][part] for half in (0, 1)] for category in categories},
            [[circuits[f"{a}-{b}-half-{half}"][part] for half in (0, 1)] for a, b in pools],
        )
        for part in circuits[categories[0]]
    }


def problems(
    session: Session, categories: Sequence[str], pools: Sequence[tuple[str, str]], missing: set[str]
) -> Iterator[tuple[str, Problem]]:
    """What is still to be found, by name; prompts are only prepared where something of theirs is missing."""
    if DiscoveryOptions.of(session.run.experiment).baseline_choice == "counterfactual":
        return _paired_problems(session, categories, pools, missing)
    return _averaged_problems(session, categories, pools, missing)


def _paired_problems(
    session: Session, categories: Sequence[str], pools: Sequence[tuple[str, str]], missing: set[str]
) -> Iterator[tuple[str, Problem]]:
    """Prompts are dealt out before they are paired: no prompt is in two halves, as a counterfactual either."""
    parts: dict[str, tuple[tuple[str, ...], int, int]] = {}
    for category in categories:
        parts[category] = ((category,), 1, 0)
        parts |= {f"{category}-half-{half}": ((category,), 2, half) for half in (0, 1)}
    for pool in pools:
        # Half of each category's prompts, so that a shuffled half has as many as any other.
        parts |= {f"{'-'.join(pool)}-half-{half}": (pool, 4, half) for half in (0, 1)}
    for name, (group, n_parts, number) in parts.items():
        if name in missing:
            run = _about_part(session.run, group, n_parts, number)
            yield name, prepare_problem(session.for_run(run), group[0])[0]


def _about_part(run: Run, categories: Sequence[str], n_parts: int, number: int) -> Run:
    """The run with one of several equal parts of the categories' discovery prompts; they become one category."""
    frame, seed = run.prompts.frame, run.experiment.seed
    is_own = frame["category"].isin(categories)
    places = keyed_ranks(frame, ["category", "dataset_type", "split"], f"parts {seed}")
    elsewhere = is_own & (frame["split"] == "discovery") & (places % n_parts != number)
    named = frame["category"].mask(is_own, categories[0])
    return run.with_prompts(frame.assign(category=named)[~elsewhere].reset_index(drop=True))


def _averaged_problems(
    session: Session, categories: Sequence[str], pools: Sequence[tuple[str, str]], missing: set[str]
) -> Iterator[tuple[str, Problem]]:
    """Means are of other prompts, so that those that are explained can be dealt out afterwards."""
    seed = session.run.experiment.seed
    for category in categories:
        names = [category, f"{category}-half-0", f"{category}-half-1"]
        if missing.isdisjoint(names):
            continue
        problem, _, _ = prepare_problem(session, category)
        parts = [problem.runs, *problem.runs.halves(seed)]
        yield from (
            (name, replace(problem, runs=part)) for name, part in zip(names, parts, strict=True) if name in missing
        )
    for a, b in pools:
        names = [f"{a}-{b}-half-{half}" for half in (0, 1)]
        if missing.isdisjoint(names):
            continue
        problem, other = (prepare_problem(session, category)[0] for category in (a, b))
        # Half of each category's prompts, so that a shuffled half has as many as any other.
        size = (problem.runs.n_prompts + other.runs.n_prompts) // 4
        pool = problem.runs.joined(other.runs).sample(2 * size, seed)
        parts = pool.halves(seed)
        yield from (
            (name, replace(problem, runs=part)) for name, part in zip(names, parts, strict=True) if name in missing
        )


def _circuit(problem: Problem, options: ComparisonOptions) -> Circuit:
    """The best nodes by the problem's method, best first, and the strongest edges between them by attribution."""
    effects, nodes = METHODS[problem.config.method].rank(problem), problem.ablation.nodes
    members = effects.ranking[: options.size].tolist()
    circuit = Circuit(nodes={nodes.name(node): float(abs(effects.effect[node])) for node in members})
    if options.edges and NODES[problem.config.nodes].has_edges:
        strongest = sorted(_edges(problem, members), key=lambda edge: -abs(edge.weight))[: options.edges]
        circuit.edges = {_edge_name(nodes, edge): abs(edge.weight) for edge in strongest}
    return circuit


def _edges(problem: Problem, members: Sequence[int]) -> Iterator[Edge]:
    """Every edge between the members that is not zero."""
    for sources, targets, weight, absolute in attribution_weights(problem, members):
        for row, column in zip(*np.nonzero(weight), strict=True):
            ends = int(sources[row]), int(targets[column])
            yield Edge(*ends, float(weight[row, column]), float(absolute[row, column]))


def _edge_name(nodes: Nodes, edge: Edge) -> str:
    return f"{nodes.name(edge.source)} -> {nodes.name(edge.target)}"

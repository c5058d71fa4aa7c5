"""The circuits of several categories side by side: what they share, and what each does on the others' prompts.

Circuits come from discovery prompts, overlaps from circuits, and all scores and replies from test prompts.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool
from pydantic import BaseModel
from scipy.cluster.hierarchy import leaves_list

from sfc.circuits.edge_kinds import Edge, attribution_weights
from sfc.circuits.faithfulness import Ablations, Scores, ablated_scores, full_scores, metrics_with_intervals
from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import NODES, Nodes
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.problem import Problem
from sfc.circuits.proof import judged_replies
from sfc.circuits.stability import chance_overlap
from sfc.circuits.work import ablated, edges
from sfc.core.artifacts import read_csv, read_model, write_csv, write_json
from sfc.core.config import Experiment
from sfc.core.progress import progress_bar, say
from sfc.core.ranks import dealt, is_leader, wait_for_all
from sfc.core.work import Amounts, Work, total
from sfc.data.schema import keyed_ranks
from sfc.models.engine import NO_EDIT
from sfc.models.work import rows_of, some_of
from sfc.run import Run
from sfc.session import Session
from sfc.stats import judged_rate
from sfc.studies.compare import Compare, ComparisonOptions
from sfc.studies.compare.overlap import (
    OVERLAP_MEASURES,
    Found,
    Weights,
    between_halves,
    cluster,
    measured_transfer,
    overlap_in_words,
    overlap_table,
    overlaps_of,
    shared_core,
    transfer_in_words,
    verdict,
)
from sfc.studies.discover.evidence import Evidence, judge
from sfc.studies.discover.problem import prepare_problem
from sfc.studies.discover.work import preparing, question, ranking, replying, running
from sfc.studies.sketch import Sketch
from sfc.studies.study import Made, made_in_parts


class Circuit(BaseModel):
    """A circuit's nodes and its edges, by their names, with the sizes of their effects."""

    nodes: dict[str, float]
    edges: dict[str, float] | None = None
    """None where edges are not compared"""


def find_circuits(session: Session, folder: Path, categories: Sequence[str]) -> dict[str, Found]:
    """All circuits' `nodes` and, where they are wanted, `edges`: those in the folder are read, the others found.

    Several processes share them, by category and by pool.
    """
    experiment = session.run.experiment
    options = ComparisonOptions.of(experiment)
    pairs = list(itertools.combinations(categories, 2))
    drawn = np.random.default_rng(experiment.seed).permutation(len(pairs))[: options.shuffles]
    pools = [pairs[number] for number in drawn]
    parts = [(category,) for category in categories] + pools
    names = {part: [f"{'-'.join(part)}{half}" for half in _HALVES[len(part) - 1 :]] for part in parts}
    for number, (part, is_own) in enumerate(dealt(parts), start=1):
        missing = {name for name in names[part] if is_own and not (folder / f"{name}.json").exists()}
        for name, problem in problems(session, part, missing):
            say(f"{number} of {len(parts)}: circuit of {name}, {problem.runs.n_prompts} prompts")
            write_json(folder / f"{name}.json", _circuit(problem, options).model_dump(exclude_none=True))
    wait_for_all()
    circuits: dict[str, dict[str, Weights]] = {
        name: read_model(folder / f"{name}.json", Circuit).model_dump(exclude_none=True)
        for of_part in names.values()
        for name in of_part
    }
    return {
        part: Found(
            {category: circuits[category][part] for category in categories},
            {category: [circuits[f"{category}-half-{half}"][part] for half in (0, 1)] for category in categories},
            [[circuits[f"{a}-{b}-half-{half}"][part] for half in (0, 1)] for a, b in pools],
        )
        for part in circuits[categories[0]]
    }


_HALVES = ("", "-half-0", "-half-1")
"""what the names of a category's circuits end with; a pool of two has halves alone"""


def problems(session: Session, group: tuple[str, ...], missing: set[str]) -> Iterator[tuple[str, Problem]]:
    """What is still to be found of a category, or of a pool of two; prompts are only prepared where something is."""
    if not missing:
        return iter(())
    if DiscoveryOptions.of(session.run.experiment).baseline_choice == "counterfactual":
        return _paired_problems(session, group, missing)
    return _averaged_problems(session, group, missing)


def _paired_problems(session: Session, group: tuple[str, ...], missing: set[str]) -> Iterator[tuple[str, Problem]]:
    """Prompts are dealt out before they are paired: no prompt is in two halves, as a counterfactual either."""
    # Half of each category's prompts, so that a shuffled half has as many as any other.
    n_parts, name = 2 * len(group), "-".join(group)
    parts = {name: (1, 0)} | {f"{name}-half-{half}": (n_parts, half) for half in (0, 1)}
    for part, (n_parts, number) in parts.items():
        if part in missing:
            run = _about_part(session.run, group, n_parts, number)
            yield part, prepare_problem(session.for_run(run), group[0])[0]


def _about_part(run: Run, categories: Sequence[str], n_parts: int, number: int) -> Run:
    """The run with one of several equal parts of the categories' discovery prompts; they become one category."""
    frame, seed = run.prompts.frame, run.experiment.seed
    is_own = frame["category"].isin(categories)
    places = keyed_ranks(frame, ["category", "dataset_type", "split"], f"parts {seed}")
    elsewhere = is_own & (frame["split"] == "discovery") & (places % n_parts != number)
    named = frame["category"].mask(is_own, categories[0])
    # No circuit is judged here: its test prompts need not be run.
    left = frame.assign(category=named)[~elsewhere & (frame["split"] != "test")]
    return run.with_prompts(left.reset_index(drop=True))


def _averaged_problems(session: Session, group: tuple[str, ...], missing: set[str]) -> Iterator[tuple[str, Problem]]:
    """Means are of other prompts, so that those that are explained can be dealt out afterwards."""
    seed = session.run.experiment.seed
    problem, *others = (prepare_problem(session, category)[0] for category in group)
    runs = problem.runs
    for other in others:
        # Half of each category's prompts, so that a shuffled half has as many as any other.
        size = (runs.n_prompts + other.runs.n_prompts) // 4
        runs = runs.joined(other.runs).sample(2 * size, seed)
    for half, part in zip(_HALVES, [runs, *runs.halves(seed)], strict=True):
        if (name := f"{'-'.join(group)}{half}") in missing:
            yield name, replace(problem, runs=part)


def _circuit(problem: Problem, options: ComparisonOptions) -> Circuit:
    """The best nodes by the problem's method, best first, and the strongest edges between them by attribution.

    They come from the problem's own prompts alone: what circuits learned from in common would make them alike.
    """
    problem = replace(problem, pooled=None)
    effects, nodes = METHODS[problem.config.method].rank(problem), problem.ablation.nodes
    members = effects.ranking[: options.size].tolist()
    circuit = Circuit(nodes={nodes.name(node): float(abs(effects.effect[node])) for node in members})
    if options.edges and NODES[problem.config.nodes].has_edges:
        strongest = sorted(_edges(problem, members), key=lambda edge: -abs(edge.weight))[: options.edges]
        circuit.edges = {
            f"{nodes.name(edge.source)} -> {nodes.name(edge.target)}": abs(edge.weight) for edge in strongest
        }
    return circuit


def _edges(problem: Problem, members: Sequence[int]) -> Iterator[Edge]:
    """Every edge between the members that is not zero."""
    for between in attribution_weights(problem, members):
        for row, column in zip(*np.nonzero(between.weight), strict=True):
            ends = int(between.sources[row]), int(between.targets[column])
            yield Edge(*ends, float(between.weight[row, column]), float(between.absolute[row, column]))


CORE, REST, OWN = "shared core", "the rest of its own", "its own circuit"


class _OfCategory(BaseModel):
    """The file of one category: its rows of the two tables, and the nodes that circuits are made of."""

    transfer: list[dict[str, Any]]
    core: list[dict[str, Any]]
    nodes: Nodes


class Judged(NamedTuple):
    """The figures of all circuits on all categories' test prompts."""

    transfer: pd.DataFrame
    """one row per circuit and category of prompts: `FIGURES` of both sides, faithfulness and completeness, each with
    its interval"""
    core: pd.DataFrame
    """the same for the shared core, the category's own circuit, and what is left of that one without the core; beside
    it the shares of replies that show the behavior: on the positive side as the model is (`refused`) and with these
    nodes ablated (`refused_ablated`), on the negative side as it is (`refused_safe`) and with these nodes alone
    (`refused_safe_alone`)"""
    nodes: Nodes


def judge_circuits(session: Session, folder: Path, circuits: Mapping[str, Weights]) -> Judged:
    """Score the circuits of all categories on each category's test prompts; what the folder has is read."""
    core = shared_core(list(circuits.values()))

    def judged_on(category: str) -> dict[str, Any]:
        own = circuits[category]
        parts = {CORE: core, REST: [name for name in own if name not in core], OWN: list(own)}
        return _judged(session, category, circuits, parts)

    with progress_bar("test prompts", len(circuits), "categories") as progress:
        made_in_parts(folder, list(circuits), judged_on, progress)
    judged = [read_model(folder / f"{category}.json", _OfCategory) for category in circuits]
    transfer = pd.DataFrame([row for one in judged for row in one.transfer])
    parts = pd.DataFrame([row for one in judged for row in one.core])
    return Judged(transfer, parts, judged[0].nodes)


def _judged(
    session: Session, category: str, circuits: Mapping[str, Weights], parts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """What is written for one category: rows of `transfer` and `core`, and the nodes."""
    experiment = session.run.experiment
    # Whoever reads the category from the run's options reads this one.
    own = session.for_run(session.run.having(DiscoveryOptions, category=category))
    problem, runs, _ = prepare_problem(own, category)
    evidence = Evidence.of(own, problem, runs)
    names, listed = [*circuits, *parts], [*map(list, circuits.values()), *parts.values()]
    keep = masks(problem.ablation.nodes, listed)
    sides, published = judge(evidence, keep, experiment.seed), _published(evidence, keep, experiment)
    rows = [
        {"circuit": name, "prompts": category, "nodes": len(circuit), **figures, **of_sides.figures}
        for name, circuit, figures, of_sides in zip(names, listed, published, sides, strict=True)
    ]
    transfer, core = rows[: len(circuits)], rows[len(circuits) :]
    if ComparisonOptions.of(experiment).replies and problem.judge is not None:
        replies = _replied(evidence, keep[len(circuits) :], experiment)
        core = [{**row, **figures} for row, figures in zip(core, replies, strict=True)]
    return {"transfer": transfer, "core": core, "nodes": asdict(problem.ablation.nodes)}


def masks(nodes: Nodes, circuits: Sequence[Sequence[str]]) -> Bool[np.ndarray, "circuits nodes"]:
    """The circuits, given by their nodes' names, as rows over all nodes."""
    keep = np.zeros((len(circuits), nodes.n_nodes), dtype=bool)
    for row, circuit in enumerate(circuits):
        keep[row, [nodes.number(name) for name in circuit]] = True
    return keep


def _published(
    evidence: Evidence, keep: Bool[np.ndarray, "circuits nodes"], experiment: Experiment
) -> list[dict[str, Any]]:
    """Faithfulness and completeness of each circuit."""
    problem, runs = evidence.published
    packed = np.concatenate([np.zeros_like(keep[:1]), keep, ~keep])
    empty, *scores = ablated_scores(problem.model, problem.score, problem.ablation, runs, packed)
    full = full_scores(problem.model, problem.score, runs)
    smallest = EvaluationOptions.of(experiment).min_denominator
    return [
        metrics_with_intervals(Scores(full, empty, kept, ablated), smallest, experiment.seed)
        for kept, ablated in zip(scores[: len(keep)], scores[len(keep) :], strict=True)
    ]


def _replied(
    evidence: Evidence, circuits: Bool[np.ndarray, "circuits nodes"], experiment: Experiment
) -> list[dict[str, Any]]:
    """How many replies show the behavior: those to prompts that call for it with each circuit ablated, and those to
    others with it alone, which refuse where a circuit refuses whatever it is asked.
    """
    config, (problem, runs) = ComparisonOptions.of(experiment), evidence.published
    asked = [("refused", "ablated", runs, ~circuits)]
    if evidence.means is not None and not (positive := evidence.means.prompts["positive"].to_numpy()).all():
        asked.append(("refused_safe", "alone", evidence.means.runs.subset(np.flatnonzero(~positive)), circuits))
    rows: list[dict[str, Any]] = [{} for _ in circuits]
    for name, how, whole, keep in asked:
        some = whole.sample(config.replies, experiment.seed)
        [model] = judged_replies(problem, some, NO_EDIT, config.reply_tokens)
        of_circuits = judged_replies(problem, some, Ablations(problem.ablation, keep), config.reply_tokens)
        for row, shown in zip(rows, of_circuits, strict=True):
            rate = judged_rate(shown)
            row |= {f"n_{name}": rate["n"], name: float(model.mean()), f"{name}_{how}": rate["rate"]}
            row |= {f"{name}_{how}_low": rate["low"], f"{name}_{how}_high": rate["high"]}
    return rows


def measure(study: Compare, session: Session, folder: Path) -> Made:
    """Find the circuits, compare them, and write the tables into the folder.

    Circuits that are in its folder `rankings`, and categories that are in `judged`, are not computed again. Several
    processes share both.

    Raises:
        UserError: a category lacks prompts.
    """
    experiment, categories = session.run.experiment, study.categories(session.run)
    found = find_circuits(session, folder / "rankings", categories)
    session.clock.lap("circuits")
    circuits = found["nodes"].whole
    judged = judge_circuits(session, folder / "judged", circuits)
    session.clock.lap("test prompts")
    if not is_leader():
        return Made({})
    measures = {name: measure for name, measure in OVERLAP_MEASURES.items() if measure.part in found}
    tables = {name: overlaps_of(found[part], categories, overlap) for name, (_, part, overlap) in measures.items()}
    tables["jaccard"] = tables["jaccard"]._replace(chance=_chance(found["nodes"], judged.nodes))
    verdicts = {name: verdict(table, experiment.seed) for name, table in tables.items()}
    transfer = measured_transfer(judged.transfer, experiment.seed)
    overlap = overlap_table(tables, found, measures, categories)
    for name, table in {"overlap": overlap, "transfer": judged.transfer, "core": judged.core}.items():
        write_csv(folder / f"{name}.csv", table)
    # From the file, as the page reads it: a last digit may decide which of two pairs the tree joins first.
    between = between_halves(read_csv(folder / "overlap.csv"), categories)
    return Made(
        {
            "preset": experiment.name,
            "method": DiscoveryOptions.of(experiment).method,
            "size": ComparisonOptions.of(experiment).size,
            "categories": list(categories),
            "order": [int(leaf) for leaf in leaves_list(cluster(between))],
            "overlap": {name: measured._asdict() for name, measured in verdicts.items()},
            "transfer": {name: measured._asdict() for name, measured in transfer.items()},
            "verdict": f"{overlap_in_words(verdicts)} {transfer_in_words(transfer)}",
            "core_nodes": shared_core(list(circuits.values())),
        }
    )


def _chance(found: Found, nodes: Nodes) -> float:
    """The overlap of random circuits with as many nodes per site as halves have on average."""
    circuits = [list(half) for halves in found.halves.values() for half in halves]
    numbers = [nodes.number(name) for circuit in circuits for name in circuit]
    counts = np.bincount(nodes.site_numbers[numbers], minlength=len(nodes.sites)) / len(circuits)
    return chance_overlap(counts, np.array(nodes.sizes))


_OF_HALVES, _RESTS = 2, 3
"""circuits of a category beside its own; and those judged on its prompts beside those of all categories"""
_FILES = 6_000_000
"""bytes of its page and tables, most of them plotly's own script"""


def work(study: Compare, sketch: Sketch) -> list[Work]:
    """The steps of `sfc compare`: circuits of all categories, of their halves and of pools, on every one's prompts.

    Raises:
        UserError: a category lacks prompts.
    """
    options, categories = study.of(sketch.run), study.categories(sketch.run)
    asked = [question(sketch, category) for category in categories]
    # Circuits to be compared come from their own prompts alone.
    asked = [asks._replace(asked=asks.asked._replace(pooled=())) for asks in asked]
    n_pools = min(options.shuffles, len(list(itertools.combinations(categories, 2))))
    n_judged, prompts = len(categories) + _RESTS, sketch.run.experiment.prompts
    of_discovery = prompts.discovery / (prompts.discovery + prompts.test)  # circuits are found without test prompts
    # A pool's two halves have as many prompts as a category's.
    halves = _OF_HALVES * (1 + n_pools / len(categories))
    found, judged = [], []
    for asks in asked:
        prepared, discovery = preparing(sketch, asks).amounts, asks.asked.discovery
        found += [(prepared * of_discovery + ranking(sketch, asks).amounts) * (1 + halves)]
        if options.edges:
            half = some_of(discovery, rows_of(discovery) // 2)
            found += [edges(asks.asked, discovery, options.size), edges(asks.asked, half, options.size) * halves]
        judged += [prepared, ablated(asks.asked, asks.by_means, 2 * n_judged + 1)]
        judged += [ablated(asks.asked, asks.test, n_judged + 1), ablated(asks.asked, asks.positives, 2 * n_judged + 1)]
        if options.replies:
            judged += [replying(sketch, asks, 2 * options.replies, _RESTS, options.reply_tokens).amounts]
    largest = max(asked, key=lambda asks: rows_of(asks.asked.discovery))
    rank, scoring = ranking(sketch, largest), running(sketch, largest, "", largest.test, Amounts())
    return [
        sketch.loading(),
        Work("circuits", total(found), rank.device, rank.host, note=rank.note),
        Work("test prompts", total(judged), scoring.device, kept=_FILES),
    ]

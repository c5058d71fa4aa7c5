"""Circuits from files, ours or others', judged on the test prompts of one group."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.circuits.controls import p_value
from sfc.circuits.edge_ablation import edge_faithfulness, random_edges, why_not_ablatable
from sfc.circuits.faithfulness import curve_sizes, evaluation_curve, top_circuits
from sfc.circuits.listed import DictionaryNames, ListedCircuit, numbered, read_listed
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.artifacts import write_csv
from sfc.core.progress import progress_bar, say
from sfc.core.sites import short_site
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.problem import prepare_problem
from sfc.studies.study import Made


class _Circuit(NamedTuple):
    """One of the circuits: what its file says, and its nodes and edges by their numbers."""

    name: str
    listed: ListedCircuit
    members: list[int]
    edges: list[tuple[int, int]]


def evaluate(session: Session, folder: Path, category: str, paths: Sequence[Path]) -> Made:
    """Judge the circuits in the files, and write their curves.

    Raises:
        UserError: a file is not a circuit, or one of dictionaries that are not in use; the category lacks prompts.
    """
    run, clock = session.run, session.clock
    listed = [read_listed(path) for path in paths]
    problem, test_runs, facts = prepare_problem(session, category)
    nodes = problem.ablation.nodes
    names = DictionaryNames.of(run.saes.folder, nodes.sites, run.experiment.saes.source)
    circuits = [
        _Circuit(name, what, *numbered(what, names, nodes))
        for name, what in zip(circuit_names(paths), listed, strict=True)
    ]
    clock.lap("prepare")
    curves = pd.concat([_curve(run, problem, test_runs, circuit) for circuit in circuits], ignore_index=True)
    clock.lap("evaluation")
    result = {
        "preset": run.experiment.name,
        "category": category,
        "population": facts["population"],
        "baseline": run.behavior.words.said(problem.config.baseline_choice),
        "error_mode": EvaluationOptions.of(run.experiment).error_mode,
        "n_prompts": test_runs.n_prompts,
        "circuits": [_figures(problem, circuit, curves) for circuit in circuits],
    }
    for circuit, figures in zip(circuits, result["circuits"], strict=True):
        figures |= _edge_figures(run, problem, test_runs, circuit)
        measurable = figures["faithfulness"] is not None
        figures["p_value"] = _p_value(run, problem, test_runs, circuit) if measurable else None
    clock.lap("edges and random circuits")
    write_csv(folder / "curves.csv", curves)
    write_csv(folder / "prompts.csv", facts.pop("prompts"))
    return Made(result, facts=facts)


def circuit_names(paths: Sequence[Path]) -> list[str]:
    """What the circuits are called: their files, or the folders of those called `circuit.json`, numbered if alike."""
    names = [path.resolve().parent.name if path.name == "circuit.json" else path.stem for path in paths]
    often = Counter(names)
    return [f"{name} ({i + 1})" if often[name] > 1 else name for i, name in enumerate(names)]


def _curve(run: Run, problem: Problem, runs: PromptRuns, circuit: _Circuit) -> pd.DataFrame:
    """The circuit's figures, and where it is ranked those of its best nodes."""
    config, size = EvaluationOptions.of(run.experiment), len(circuit.members)
    say(f"{circuit.name}: {circuit.listed.format}, {size:,} nodes")
    sizes = curve_sizes(config.sizes, size) if circuit.listed.is_ranked else [size]
    total = (1 + (3 + config.random_draws) * len(sizes)) * runs.n_prompts
    with progress_bar("evaluating", total, "runs") as progress:
        curve = evaluation_curve(problem, runs, np.array(circuit.members), sizes, config, run.experiment.seed, progress)
    curve.insert(0, "circuit", circuit.name)
    return curve


def _edge_figures(run: Run, problem: Problem, runs: PromptRuns, circuit: _Circuit) -> dict[str, float | None]:
    """How faithful the circuit's edges are, and as many random ones into each node; None without such edges."""
    nodes, smallest, seed = (
        problem.ablation.nodes,
        EvaluationOptions.of(run.experiment).min_denominator,
        run.experiment.seed,
    )
    reason = why_not_ablatable(nodes, circuit.members, circuit.edges)
    if reason is not None:
        say(f"{circuit.name}: edges are not judged: {reason}")
    drawn = random_edges(nodes, circuit.members, circuit.edges, seed) if reason is None else []
    with progress_bar("ablating edges", 2 * len(nodes.sites) * len(runs.batches), "sites") as progress:
        figures, at_random = (
            edge_faithfulness(problem, runs, circuit.members, edges, smallest, seed, progress)
            for edges in (circuit.edges, drawn)
        )
    figures["random_edge_faithfulness"] = at_random["edge_faithfulness"]
    return {name: _figure(value) for name, value in figures.items()}


def _p_value(run: Run, problem: Problem, runs: PromptRuns, circuit: _Circuit) -> float:
    """The circuit's p-value among random ones."""
    config = EvaluationOptions.of(run.experiment)
    mask = top_circuits(np.array(circuit.members), [len(circuit.members)], problem.ablation.nodes.n_nodes)[0]
    with progress_bar("random circuits", (config.p_value_draws + 2) * runs.n_prompts, "runs") as progress:
        return p_value(problem, runs, mask, config.p_value_draws, run.experiment.seed, progress)


def _figures(problem: Problem, circuit: _Circuit, curves: pd.DataFrame) -> dict[str, Any]:
    """What is reported of a circuit; figures that cannot be measured are None."""
    nodes, members = problem.ablation.nodes, np.array(circuit.members)
    per_site = np.bincount(nodes.site_numbers[members], minlength=len(nodes.sites)).tolist()
    row = curves[(curves["circuit"] == circuit.name) & (curves["size"] == len(members))].iloc[0]
    figures = row.drop(["circuit", "size"]).astype(object)
    return {
        "name": circuit.name,
        "format": circuit.listed.format,
        "is_ranked": circuit.listed.is_ranked,
        "n_nodes": len(members),
        "n_errors": int(nodes.is_error[members].sum()),
        "n_edges": len(circuit.edges),
        **{str(name): _figure(value) for name, value in figures.items()},
        "nodes_per_site": dict(zip(map(short_site, nodes.sites), per_site, strict=True)),
    }


def _figure(value: Any) -> float | None:
    return None if pd.isna(value) else round(float(value), 4)

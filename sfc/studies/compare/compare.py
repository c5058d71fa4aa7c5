"""Stage: the circuits of several categories side by side. One mechanism or many?

Circuits come from discovery prompts, overlaps from circuits, and all scores and replies from test prompts.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list

from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import DiscoveryOptions
from sfc.circuits.overlap import (
    Overlaps,
    Weights,
    chance_overlap,
    cluster,
    in_words,
    jaccard,
    shared_core,
    verdict,
    weighted_overlap,
)
from sfc.core.artifacts import Artifact, write_csv, write_json
from sfc.core.errors import UserError
from sfc.run import Run
from sfc.studies.compare.circuits import Found, find_circuits
from sfc.studies.compare.judged import judge_circuits
from sfc.studies.compare.options import ComparisonOptions
from sfc.studies.compare.page import write_comparison_page

FILES = {
    "page": "comparison.html",
    "overlap": "overlap.csv",
    "transfer": "transfer.csv",
    "core": "core.csv",
    "result": "result.json",
}


class _Measure(NamedTuple):
    """Of what the overlap is taken, and how."""

    part: str
    overlap: Callable[[Weights, Weights], float]


_MEASURES = {
    "jaccard": _Measure("nodes", jaccard),
    "weighted": _Measure("nodes", weighted_overlap),
    "edge_jaccard": _Measure("edges", jaccard),
    "edge_weighted": _Measure("edges", weighted_overlap),
}


def make_comparison(run: Run, artifact: Artifact, categories: Sequence[str], rebuild: bool = False) -> None:
    """Find the circuits, compare them, and write tables and a page.

    Raises:
        UserError: the method does not work prompt by prompt, or a category lacks prompts.
    """
    experiment = run.experiment
    if not METHODS[DiscoveryOptions.of(experiment).method].per_prompt:
        known = ", ".join(method.name for method in METHODS if method.per_prompt)
        raise UserError(f"compare needs a method that halves of the prompts can be given to: one of {known}")
    with artifact.being_made(rebuild) as folder:
        found = find_circuits(run, folder / "rankings", categories)
        circuits = found["nodes"].whole
        judged = judge_circuits(run, folder / "judged", circuits)
        measures = {name: measure for name, measure in _MEASURES.items() if measure.part in found}
        tables = {name: _overlaps(found[part], categories, overlap) for name, (part, overlap) in measures.items()}
        tables["jaccard"] = tables["jaccard"]._replace(chance=_chance(found["nodes"], judged.nodes))
        verdicts = {name: verdict(table, experiment.seed) for name, table in tables.items()}
        result = {
            "preset": experiment.name,
            "method": DiscoveryOptions.of(experiment).method,
            "size": ComparisonOptions.of(experiment).size,
            "categories": list(categories),
            "order": _order(tables["jaccard"]),
            "overlap": {name: measured._asdict() for name, measured in verdicts.items()},
            "verdict": in_words(verdicts),
            "core_nodes": shared_core(list(circuits.values())),
            "files": FILES,
        }
        whole = {name: (found[part].whole, overlap) for name, (part, overlap) in measures.items()}
        overlap = _long_table(tables, whole, categories)
        for name, table in {"overlap": overlap, "transfer": judged.transfer, "core": judged.core}.items():
            write_csv(folder / FILES[name], table)
        write_comparison_page(folder / FILES["page"], result, tables["jaccard"], judged.transfer, judged.core)
        write_json(folder / FILES["result"], result)
        artifact.finish(result=result)


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


def _long_table(
    tables: dict[str, Overlaps],
    whole: dict[str, tuple[dict[str, Weights], Callable[[Weights, Weights], float]]],
    categories: Sequence[str],
) -> pd.DataFrame:
    """One row per pair of categories: overlaps of halves (`…_halves`) and of the whole circuits."""
    rows = []
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(categories), 2):
        row: dict[str, Any] = {"a": a, "b": b}
        for name, (circuits, measure) in whole.items():
            row[f"{name}_halves"] = tables[name].between[i, j]
            row[name] = measure(circuits[a], circuits[b])
        rows.append(row)
    return pd.DataFrame(rows)


def _chance(found: Found, nodes: Nodes) -> float:
    """The overlap of random circuits with as many nodes per site as halves have on average."""
    circuits = [list(half) for halves in found.halves.values() for half in halves]
    numbers = [nodes.number(name) for circuit in circuits for name in circuit]
    counts = np.bincount(nodes.site_numbers[numbers], minlength=len(nodes.sites)) / len(circuits)
    return chance_overlap(counts, np.array(nodes.sizes))

"""The circuits of several categories side by side: what they share, and what each does on the others' prompts.

Circuits come from discovery prompts, overlaps from circuits, and all scores and replies from test prompts.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list

from sfc.circuits.nodes import Nodes
from sfc.circuits.options import DiscoveryOptions
from sfc.circuits.stability import chance_overlap
from sfc.core.artifacts import write_csv
from sfc.session import Session
from sfc.studies.compare import transfer as transfers
from sfc.studies.compare.circuits import Found, find_circuits
from sfc.studies.compare.judged import judge_circuits
from sfc.studies.compare.options import ComparisonOptions
from sfc.studies.compare.overlap import (
    Overlaps,
    Weights,
    between_halves,
    cluster,
    in_words,
    jaccard,
    shared_core,
    verdict,
    weighted_overlap,
)
from sfc.studies.study import Made


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


def measure(session: Session, categories: Sequence[str], folder: Path) -> Made:
    """Find the circuits, compare them, and write the tables into the folder.

    Circuits that are in its folder `rankings`, and categories that are in `judged`, are not computed again.

    Raises:
        UserError: a category lacks prompts.
    """
    experiment = session.run.experiment
    found = find_circuits(session, folder / "rankings", categories)
    session.clock.lap("circuits")
    circuits = found["nodes"].whole
    judged = judge_circuits(session, folder / "judged", circuits)
    session.clock.lap("test prompts")
    measures = {name: measure for name, measure in _MEASURES.items() if measure.part in found}
    tables = {name: _overlaps(found[part], categories, overlap) for name, (part, overlap) in measures.items()}
    tables["jaccard"] = tables["jaccard"]._replace(chance=_chance(found["nodes"], judged.nodes))
    verdicts = {name: verdict(table, experiment.seed) for name, table in tables.items()}
    transfer = transfers.measured(judged.transfer, experiment.seed)
    overlap = _long_table(tables, found, measures, categories)
    for name, table in {"overlap": overlap, "transfer": judged.transfer, "core": judged.core}.items():
        write_csv(folder / f"{name}.csv", table)
    # From the file, as the page reads it: a last digit may decide which of two pairs the tree joins first.
    between = between_halves(pd.read_csv(folder / "overlap.csv"), categories)
    return Made(
        {
            "preset": experiment.name,
            "method": DiscoveryOptions.of(experiment).method,
            "size": ComparisonOptions.of(experiment).size,
            "categories": list(categories),
            "order": [int(leaf) for leaf in leaves_list(cluster(between))],
            "overlap": {name: measured._asdict() for name, measured in verdicts.items()},
            "transfer": {name: measured._asdict() for name, measured in transfer.items()},
            "verdict": f"{in_words(verdicts)} {transfers.in_words(transfer)}",
            "core_nodes": shared_core(list(circuits.values())),
        }
    )


def _overlaps(found: Found, categories: Sequence[str], measure: Callable[[Weights, Weights], float]) -> Overlaps:
    halves = [found.halves[category] for category in categories]
    within = np.array([measure(*pair) for pair in halves])
    between = np.diag(within)
    for i, j in itertools.permutations(range(len(categories)), 2):
        between[i, j] = np.mean([measure(a, b) for a in halves[i] for b in halves[j]])
    return Overlaps(within, between, np.array([measure(*pair) for pair in found.shuffled]))


def _long_table(
    tables: Mapping[str, Overlaps],
    found: Mapping[str, Found],
    measures: Mapping[str, _Measure],
    categories: Sequence[str],
) -> pd.DataFrame:
    """One row per pair of categories: overlaps of halves (`…_halves`) and of the whole circuits."""
    rows = []
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(categories), 2):
        row: dict[str, Any] = {"a": a, "b": b}
        for name, (part, overlap) in measures.items():
            row[f"{name}_halves"] = tables[name].between[i, j]
            row[name] = overlap(found[part].whole[a], found[part].whole[b])
        rows.append(row)
    return pd.DataFrame(rows)


def _chance(found: Found, nodes: Nodes) -> float:
    """The overlap of random circuits with as many nodes per site as halves have on average."""
    circuits = [list(half) for halves in found.halves.values() for half in halves]
    numbers = [nodes.number(name) for circuit in circuits for name in circuit]
    counts = np.bincount(nodes.site_numbers[numbers], minlength=len(nodes.sites)) / len(circuits)
    return chance_overlap(counts, np.array(nodes.sizes))

"""What the circuits of a comparison do on test prompts: scores and, where nodes are ablated, replies.

Each category's figures are written when they are known, so that a run that was interrupted goes on with the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool
from pydantic import BaseModel

from sfc.circuits.faithfulness import Ablations, Scores, ablated_scores, full_scores, metrics_with_intervals
from sfc.circuits.nodes import Nodes
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.replies import judged_replies
from sfc.core.artifacts import read_model, write_json
from sfc.core.config import Experiment
from sfc.core.progress import progress_bar
from sfc.models.engine import NO_EDIT
from sfc.session import Session
from sfc.stats import judged_rate
from sfc.studies.compare.options import ComparisonOptions
from sfc.studies.compare.overlap import Weights, shared_core
from sfc.studies.discover.evidence import Evidence, judge
from sfc.studies.discover.problem import prepare_problem

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
    judged = []
    with progress_bar("test prompts", len(circuits), "categories") as progress:
        for category, own in circuits.items():
            path = folder / f"{category}.json"
            if not path.exists():
                parts = {CORE: core, REST: [name for name in own if name not in core], OWN: list(own)}
                write_json(path, _judged(session, category, circuits, parts))
            judged.append(read_model(path, _OfCategory))
            progress(1)
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

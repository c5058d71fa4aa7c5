"""Circuits from files, ours or others', judged on one group's test prompts, or on prompts of files in their place.

Each circuit's figures are written when it is judged, so that several processes can share them.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sfc.behaviors.behavior import HARD, NEGATIVE, POSITIVE
from sfc.circuits.edge_ablation import edge_faithfulness, random_edges, why_not_ablatable
from sfc.circuits.faithfulness import curve_sizes, top_circuits
from sfc.circuits.listed import DictionaryNames, ListedCircuit, numbered, read_listed
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.proof import counts_by_kind, replies_by_kind
from sfc.core.artifacts import json_records, write_csv
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.core.ranks import is_leader
from sfc.core.sites import short_site
from sfc.data.read import LABELS, UNLABELLED, load_prompt_file
from sfc.data.schema import ALL, keyed_ranks
from sfc.run import Run
from sfc.session import Session
from sfc.stats import reported
from sfc.studies.discover.evidence import FIGURES, Evidence, judged_curve, kl_without, told
from sfc.studies.discover.problem import prepare_problem
from sfc.studies.evaluate import EvaluateOptions, PromptFile
from sfc.studies.nulls import beside
from sfc.studies.study import PARTS, Made, made_in_parts

_TABLES = ("curves", "scores", "replies")
_KINDS = dict(zip(LABELS, (POSITIVE, HARD, NEGATIVE), strict=True))


class _Circuit(NamedTuple):
    """One of the circuits: what its file says, and its nodes and edges by their numbers."""

    name: str
    listed: ListedCircuit
    members: list[int]
    edges: list[tuple[int, int]]


def evaluate(
    session: Session,
    run: Run,
    folder: Path,
    paths: Sequence[Path],
    files: Sequence[PromptFile] = (),
    nulls: pd.DataFrame | None = None,
) -> Made:
    """Judge the circuits in the files, and write their curves.

    Args:
        run: whose category's test prompts judge.
        files: of prompts that judge in place of those.
        nulls: what null dictionaries have, where it can be compared.

    Raises:
        UserError: a file is not a circuit, or one of dictionaries that are not in use; the category lacks prompts, or a
            file of prompts does not say which side they are on.
    """
    clock, category = session.clock, run.group(EvaluateOptions.of(run.experiment).category)
    listed = [read_listed(path) for path in paths]
    judging = session.for_run(_with_test_prompts(run, category, files) if files else run)
    problem, test_runs, facts = prepare_problem(judging, category)
    evidence, nodes = Evidence.of(judging, problem, test_runs), problem.ablation.nodes
    names = DictionaryNames.of(run.saes.folder, nodes.sites, run.experiment.saes.source)
    circuits = [
        _Circuit(name, what, *numbered(what, names, nodes))
        for name, what in zip(circuit_names(paths), listed, strict=True)
    ]
    clock.lap("prepare")
    parts = {f"{number:04d}": circuit for number, circuit in enumerate(circuits)}

    def judged(part: str) -> dict[str, Any]:
        circuit = parts[part]
        figures, *tables = _judged(run, evidence, circuit, nulls)
        for rows in tables:
            rows.insert(0, "circuit_name" if "circuit" in rows else "circuit", circuit.name)
        clock.lap(circuit.name)
        # With their columns: a table may have no rows.
        written = [[list(rows.columns), json_records(rows, digits=None)] for rows in tables]
        return {"figures": figures, "tables": dict(zip(_TABLES, written, strict=True))}

    found = list(made_in_parts(folder / PARTS, list(parts), judged).values())
    if not is_leader():
        return Made({})
    result = {
        "preset": run.experiment.name,
        "category": category,
        "asked": [file.path.name for file in files],
        "population": facts["population"],
        "baseline": run.behavior.words.said(problem.config.baseline_choice),
        "error_mode": EvaluationOptions.of(run.experiment).error_mode,
        "n_prompts": int(evidence.answered[1]["id"].nunique()),
        "n_pairs": test_runs.n_prompts if test_runs.are_pairs else None,
        "circuits": [each["figures"] for each in found],
    }
    for name in _TABLES:
        tables = [
            pd.DataFrame(records, columns=columns) for columns, records in (each["tables"][name] for each in found)
        ]
        write_csv(folder / f"{name}.csv", pd.concat(tables, ignore_index=True), digits=6)
    write_csv(folder / "prompts.csv", facts.pop("prompts"))
    return Made(result, facts=facts)


def circuit_names(paths: Sequence[Path]) -> list[str]:
    """What the circuits are called: their files, or the folders of those called `circuit.json`, numbered if alike."""
    names = [path.resolve().parent.name if path.name == "circuit.json" else path.stem for path in paths]
    often = Counter(names)
    return [f"{name} ({i + 1})" if often[name] > 1 else name for i, name in enumerate(names)]


def _with_test_prompts(run: Run, category: str, files: Sequence[PromptFile]) -> Run:
    """The run with the prompts of the files as the category's test prompts; the category's own fill a side that lacks.

    Raises:
        UserError: a file is malformed, or does not say which side its prompts are on.
    """
    own, seed = run.prompts.frame, run.experiment.seed
    asked = pd.concat([_labelled(file) for file in files]).drop_duplicates("id")
    asked = asked[keyed_ranks(asked, ["dataset_type"], f"limit {seed}") < EvaluateOptions.of(run.experiment).limit]
    learned = asked["id"].isin(own.loc[own["split"] != "test", "id"])
    if learned.any():
        say(f"left out: {learned.sum():,} prompts that circuits are found with or baselines are means of")
    asked, is_test = asked[~learned], own["split"] == "test"
    for side in {True, False} - set(asked["refusal_label"]):
        lacking = own[is_test & (own["refusal_label"] == side) & (own["category"].eq(category) | (category == ALL))]
        kinds = [name for name, kind in _KINDS.items() if kind in set(lacking["dataset_type"])]
        say(f"no {' or '.join(kinds)} prompts in the files: {len(lacking):,} test prompts of {category} stand in")
        asked = pd.concat([asked, lacking])
    return run.with_prompts(pd.concat([own[~is_test], asked.assign(category=category)], ignore_index=True))


def _labelled(file: PromptFile) -> pd.DataFrame:
    """The file's prompts as rows of the prepared table, without a category."""
    rows = load_prompt_file(file.path)
    labels = rows["label"].mask(rows["label"] == UNLABELLED, file.label)
    if labels.isna().any():
        raise UserError(
            f"{file.path} does not say which side its prompts are on ({labels.isna().sum():,} have no label): write"
            f" --prompts {file.path}=toxic, or =hard, or =safe"
        )
    kinds = labels.map(_KINDS)
    return pd.DataFrame(
        {
            "id": rows["id"],
            "prompt": rows["prompt"],
            "refusal_label": kinds == POSITIVE,
            "dataset_type": kinds,
            "original_source": file.path.name,
            "split": "test",
        }
    )


def _judged(
    run: Run, evidence: Evidence, circuit: _Circuit, nulls: pd.DataFrame | None
) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The circuit's figures; its curve, where it is ranked also of its best nodes; its scores, and its replies."""
    config, seed, size = EvaluationOptions.of(run.experiment), run.experiment.seed, len(circuit.members)
    nodes, members = evidence.problem.ablation.nodes, np.array(circuit.members)
    say(f"{circuit.name}: {circuit.listed.format}, {size:,} nodes")
    sizes = curve_sizes(config.sizes, size) if circuit.listed.is_ranked else [size]
    curve, scores = judged_curve(evidence, members, sizes, size, nulls)
    mask = top_circuits(members, [size], nodes.n_nodes)[0]
    (problem, runs), prompts = evidence.answered
    replies = replies_by_kind(problem, runs, prompts, mask, config.replies, config.reply_tokens, seed)
    per_site = np.bincount(nodes.site_numbers[members], minlength=len(nodes.sites)).tolist()
    row = curve[curve["size"] == size].iloc[0].drop("size")
    figures = {
        "name": circuit.name,
        "format": circuit.listed.format,
        "is_ranked": circuit.listed.is_ranked,
        "n_nodes": size,
        "n_errors": int(nodes.is_error[members].sum()),
        "n_edges": len(circuit.edges),
        **dict.fromkeys(FIGURES),
        **{str(name): reported(value) for name, value in row.items()},
        "kl_without_safe": kl_without(evidence, mask),
        "nodes_per_site": dict(zip(map(short_site, nodes.sites), per_site, strict=True)),
        **_edge_figures(run, evidence, circuit),
        "refused": counts_by_kind(replies),
    }
    figures |= beside(nulls, size, figures.get("agreement"))
    # An evaluation has no target that the circuit could miss.
    figures["says"] = told(
        figures | {"reached_target": True}, config.target, evidence.problem.config.contrast, run.behavior.words
    )
    return figures, curve, scores, replies


def _edge_figures(run: Run, evidence: Evidence, circuit: _Circuit) -> dict[str, float | None]:
    """How faithful the circuit's edges are, and as many random ones into each node; None without such edges, and where
    a circuit has more nodes than edges are looked for between.
    """
    problem, runs = evidence.problem, evidence.runs
    nodes, smallest = problem.ablation.nodes, EvaluationOptions.of(run.experiment).min_denominator
    seed = run.experiment.seed
    reason = why_not_ablatable(nodes, circuit.members, circuit.edges)
    looked_at = problem.config.edge_nodes
    if reason is None and circuit.edges and len(circuit.members) > looked_at:
        reason = f"they are looked for between {looked_at} nodes; raise discovery.edge_nodes to have them ablated"
    if reason is not None:
        say(f"{circuit.name}: edges are not judged: {reason}")
    edges = circuit.edges if reason is None else []
    drawn = random_edges(nodes, circuit.members, edges, seed)
    with progress_bar("ablating edges", 2 * len(nodes.sites) * len(runs.batches), "sites") as progress:
        figures, at_random = (
            edge_faithfulness(problem, runs, circuit.members, edges, smallest, seed, progress)
            for edges in (edges, drawn)
        )
    figures["random_edge_faithfulness"] = at_random["edge_faithfulness"]
    return {name: reported(value) for name, value in figures.items()}

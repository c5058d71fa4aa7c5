"""Stage: circuits from files, ours or others', judged on the test prompts of one category.

The page of an evaluation: what each circuit leaves of the score, alone and when it is gone.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from sfc.circuits.controls import p_value
from sfc.circuits.edge_ablation import edge_faithfulness, random_edges, why_not_ablatable
from sfc.circuits.faithfulness import curve_sizes, evaluation_curve, top_circuits
from sfc.circuits.listed import DictionaryNames, ListedCircuit, numbered, read_listed
from sfc.circuits.options import EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.replies import with_refusals
from sfc.core.artifacts import Artifact, write_csv, write_json
from sfc.core.progress import progress_bar, say
from sfc.core.sites import short_site
from sfc.pages.document import figure_html, guide_html, header_html, write_document
from sfc.pages.style import AMBER, BLUE, INK, LINE, QUIET, VERMILION, axis, styled_figure
from sfc.pages.tables import figures_table
from sfc.pages.text import count_text, hover_text, number_text, printable
from sfc.run import Run
from sfc.session import Session
from sfc.studies.discover.discover import Clock
from sfc.studies.discover.problem import prepare_problem

FILES = {"page": "evaluation.html", "curves": "curves.csv", "prompts": "prompts.csv", "result": "result.json"}


class _Circuit(NamedTuple):
    """One of the circuits: what its file says, and its nodes and edges by their numbers."""

    name: str
    listed: ListedCircuit
    members: list[int]
    edges: list[tuple[int, int]]


def make_evaluation(run: Run, artifact: Artifact, category: str, paths: Sequence[Path], rebuild: bool = False) -> None:
    """Judge the circuits in the files, and write tables and page.

    Raises:
        UserError: a file is no circuit, or one of dictionaries that are not in use; the category lacks prompts.
    """
    clock = Clock()
    listed = [read_listed(path) for path in paths]
    with artifact.being_made(rebuild) as folder:
        problem, test_runs, facts = prepare_problem(Session(run), category)
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
            "reference": problem.config.reference_choice,
            "error_mode": EvaluationOptions.of(run.experiment).error_mode,
            "n_prompts": test_runs.n_prompts,
            "circuits": [_figures(problem, circuit, curves) for circuit in circuits],
        }
        for circuit, figures in zip(circuits, result["circuits"], strict=True):
            figures |= _edge_figures(run, problem, test_runs, circuit)
            measurable = figures["faithfulness"] is not None
            figures["p_value"] = _p_value(run, problem, test_runs, circuit) if measurable else None
        clock.lap("edges and random circuits")
        write_csv(folder / FILES["curves"], curves)
        write_csv(folder / FILES["prompts"], facts.pop("prompts"))
        write_evaluation_page(folder / FILES["page"], result)
        result |= {"files": FILES, "seconds": clock.laps}
        write_json(folder / FILES["result"], result)
        artifact.finish(result=result, **facts)


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
    total = (1 + (3 + config.random_draws) * len(sizes)) * len(runs.batches)
    with progress_bar("evaluating", total, "runs") as progress:
        curve = evaluation_curve(problem, runs, np.array(circuit.members), sizes, config, run.experiment.seed, progress)
    curve = with_refusals(curve, problem, runs, np.array(circuit.members), size, config, run.experiment.seed)
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
    with progress_bar("random circuits", (config.p_value_draws + 2) * len(runs.batches), "runs") as progress:
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


_SCORES = {
    "f_model": ("F(M): full model", INK, "line-ns-open"),
    "f_empty": ("F(0): everything ablated", QUIET, "line-ns-open"),
    "f_circuit": ("F(C): the circuit alone", VERMILION, "circle"),
    "f_complement": ("F(M\\C): all but the circuit", BLUE, "diamond"),
}
_COLUMNS = {
    "nodes": "n_nodes",
    "faithfulness": "faithfulness",
    "from": "faithfulness_low",
    "to": "faithfulness_high",
    "of random circuits": "random_faithfulness",
    "p": "p_value",
    "completeness, normalised": "completeness_normalised",
    "completeness, as published": "completeness",
    "edges": "n_edges",
    "faithfulness of edges": "edge_faithfulness",
    "of random edges": "random_edge_faithfulness",
    "F(M)": "f_model",
    "F(C)": "f_circuit",
    "F(M\\C)": "f_complement",
    "F(0)": "f_empty",
}
_GUIDE = (
    "<b>Scores.</b> F is the mean refusal score, in nats, of the test prompts: of the full model M, of the circuit C "
    "alone with everything else set to its reference, of the model without it (M\\C), and with everything ablated (0). "
    "A good circuit has its circle at F(M) and its diamond at F(0).",
    "<b>Faithfulness</b> = (F(C) − F(0)) / (F(M) − F(0)): 1 where the circuit alone does what the model does. "
    "<b>Completeness</b>, normalised = (F(M\\C) − F(0)) / (F(M) − F(0)): 0 where nothing is left without it; as "
    "published it is F(M\\C) / F(M). Where a denominator is too small to divide by, a figure is not measurable.",
    "<b>Random circuits</b> have as many features at each site and the same error nodes: what size alone gives. "
    "p is the share of circuits, among this and random ones, whose score is as far from F(0). Faithfulness has its "
    "95 % interval over prompts beside it.",
    "<b>Edges.</b> Their faithfulness is that of the circuit when its nodes hear of each other along these edges "
    "alone: each node gets a run of its own in which everything but its sources has its reference. With every edge "
    "between neighbouring sites it would be the circuit's own. Random edges lead from other nodes of the circuit, as "
    "many into each node.",
)


def write_evaluation_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all; equal input makes equal bytes.

    Args:
        result: what `evaluate --json` prints.
    """
    title = f"Evaluation · {result['category']} · {result['preset']}"
    body = f"""{header_html(title, _sentence(result))}
<section class="card graph">{figure_html("scores", scores_figure(result))}</section>
<section class="card scroll"><h2>Figures</h2>{_table(result)}</section>
<section class="card"><h2>How to read this page</h2>{guide_html(_GUIDE)}</section>"""
    write_document(path, title, body)


def scores_figure(result: Mapping[str, Any]) -> go.Figure:
    """A row per circuit, in the order of the files: the four mean scores in nats."""
    circuits = result["circuits"]
    rows = [hover_text(circuit["name"]) for circuit in circuits]
    figure = styled_figure("Mean refusal score on the test prompts", 150 + 44 * len(circuits))
    for circuit, row in zip(circuits, rows, strict=True):
        span = [circuit["f_empty"], circuit["f_model"]]
        figure.add_scatter(
            x=span, y=[row, row], mode="lines", line={"color": LINE, "width": 6}, hoverinfo="skip", showlegend=False
        )
    for key, (name, colour, symbol) in _SCORES.items():
        figure.add_scatter(
            x=[circuit[key] for circuit in circuits],
            y=rows,
            mode="markers",
            name=name,
            marker={"color": colour, "symbol": symbol, "size": 13, "line": {"width": 2, "color": colour}},
            hovertemplate=f"%{{y}}<br>{name}: %{{x:.3f}} nats<extra></extra>",
        )
    return figure.update_layout(
        xaxis=axis("nats", zeroline=True, zerolinecolor=AMBER),
        yaxis=axis("", autorange="reversed", automargin=True, type="category"),
        showlegend=True,
    )


def _sentence(result: Mapping[str, Any]) -> str:
    return (
        f"{count_text(len(result['circuits']), 'circuit')} on {count_text(result['n_prompts'], 'test prompt')} "
        f"({result['category']}, {result['population']}); reference {result['reference']}, "
        f"error mode {result['error_mode']}."
    )


def _table(result: Mapping[str, Any]) -> str:
    rows = [
        (
            printable(circuit["name"]),
            *(_text(key, circuit[key]) for key in _COLUMNS.values()),
        )
        for circuit in result["circuits"]
    ]
    return figures_table(("circuit", *_COLUMNS), rows)


def _text(key: str, value: float | None) -> str:
    return f"{value:,}" if key.startswith("n_") else number_text(value)

"""Discovery: from node effects to the circuit, its evaluation, and what its features mean.

Three splits, three jobs: nodes are scored and the size is chosen on discovery prompts, reference values come from
reference prompts or counterfactuals, and every reported figure from test prompts.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from jaxtyping import Int

from sfc.circuits.circuit import build_circuit, effects_by_role, role_names
from sfc.circuits.edge_ablation import EDGE_FIGURES, edge_faithfulness
from sfc.circuits.edge_kinds import EDGES, Edge, without_dead_ends
from sfc.circuits.faithfulness import curve_areas, curve_sizes, single_site_faithfulness, top_circuits
from sfc.circuits.files import load_circuit, save_circuit
from sfc.circuits.methods import METHODS, NATS, Effects
from sfc.circuits.methods.exact import approximation_check
from sfc.circuits.nodes import NODES
from sfc.circuits.options import DiscoveryOptions, EvaluationOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.proof import counts_by_kind, replies_by_kind
from sfc.circuits.stability import agreement_of_halves, with_intervals, with_stability
from sfc.core.artifacts import package_versions, write_csv, write_json
from sfc.core.errors import UserError
from sfc.core.progress import progress_bar, say
from sfc.features.activity import AFTER, BEFORE
from sfc.features.cards import feature_cards, neuronpedia_page, token_effects
from sfc.features.explainer import Endpoint, LabelOptions, explain, unexplained
from sfc.features.labels import CARDS_FILE, read_cards
from sfc.pages.graph import strongest_nodes
from sfc.run import Run
from sfc.saes.architectures import read_config
from sfc.saes.dictionary import Dictionary
from sfc.saes.store import Store, read_prompts
from sfc.session import Session
from sfc.stats import reported
from sfc.studies.discover.base import BASE_FILE, base_changes
from sfc.studies.discover.evidence import FIGURES, Evidence, all_features, chosen_size, judged_curve, kl_without, told
from sfc.studies.discover.problem import prepared_once
from sfc.studies.nulls import beside, nulls_of
from sfc.studies.study import Made

SHOWN_NODES = 300
"""nodes that are drawn, and so have cards: those of largest |effect|"""


def write_cards(
    session: Session, graph: nx.DiGraph, dictionaries: Mapping[str, Dictionary], folder: Path
) -> dict[str, Any]:
    """Make the cards (see `sfc.features.cards`) of the circuit's strongest features, and write `features.json`."""
    run, tokenizer = session.run, session.model.tokenizer
    prompts = read_prompts(run.store.folder)
    names = strongest_nodes(graph, SHOWN_NODES)
    say(f"reading what {len(names)} nodes fire on")
    cards, _ = feature_cards(
        session.store, dictionaries, graph, names, prompts, lambda token: tokenizer.decode([token]), run.behavior.words
    )
    if NODES[DiscoveryOptions.of(run.experiment).nodes].needs_saes:
        configs = {site: read_config(run.saes.folder / site) for site in dictionaries}
        for name, card in cards["features"].items():
            config = configs[graph.nodes[name]["site"]].model_dump()
            page = neuronpedia_page(config, int(name.rpartition("/F")[2]))
            card |= {"neuronpedia": page} if page else {}
    write_json(folder / CARDS_FILE, cards)
    return cards


_EDGE_WEIGHTS = {
    "attribution": "{unit} that pass along the edge",
    "correlation": "Pearson's r of feature values over discovery prompts",
}


def discover(session: Session, folder: Path, fingerprint: str) -> Made:
    """Score nodes, choose the circuit, judge it, and write it all.

    Args:
        fingerprint: of the artifact, which the circuit's file names.

    Raises:
        UserError: the group of prompts is too small, or an artifact that discovery needs is damaged.
    """
    run, clock, seed = session.run, session.clock, session.run.experiment.seed
    config, evaluation = DiscoveryOptions.of(run.experiment), EvaluationOptions.of(run.experiment)
    problem, test_runs, facts = prepared_once(session, run.group(config.category))
    nodes, evidence = problem.ablation.nodes, Evidence.of(session, problem, test_runs)
    clock.lap("prepare")
    say(f"scoring {nodes.n_nodes:,} nodes by {config.method}")
    effects = METHODS[config.method].rank(problem)
    if len(effects.ranking) == 0:
        raise UserError(f"method {config.method!r} ranks no node: nothing here has an effect")
    clock.lap("effects")
    ranking, sizes = effects.ranking, curve_sizes(evaluation.sizes, len(effects.ranking))
    size, on_discovery = chosen_size(problem, ranking, sizes)
    members = ranking[:size].tolist()
    clock.lap("choosing a size")
    edges = EDGES[config.edges](problem, members[: config.edge_nodes]) if NODES[config.nodes].has_edges else []
    clock.lap("edges")
    if config.drop_dead_ends:
        kept, edges = without_dead_ends(nodes, members, edges)
        say(f"{len(members) - len(kept)} of {len(members)} nodes lead nowhere and are left out")
        # The kept nodes come first, so that the reported circuit is again the best nodes of a ranking.
        ranking, members = np.concatenate([kept, ranking[~np.isin(ranking, kept)]]), kept
        sizes = sorted({len(kept), *sizes})
        _, on_discovery = chosen_size(problem, ranking, sizes)
        clock.lap("without dead ends")
    mask = top_circuits(ranking, [len(members)], nodes.n_nodes)[0]
    nulls = nulls_of(run)
    curve, scores = judged_curve(evidence, ranking, sizes, len(members), nulls)
    curve.insert(1, "on_discovery", on_discovery)
    clock.lap("evaluation")
    answered, rows = evidence.answered
    replies = replies_by_kind(*answered, rows, mask, evaluation.replies, evaluation.reply_tokens, seed)
    clock.lap("replies")
    effects, stability = _with_stability(run, problem, effects, members)
    clock.lap("stability")
    effects, roles = _with_roles(problem, effects)
    check = approximation_check(problem, effects, seed)
    top, others = (check[group]["rank_correlation"] for group in ("top", "random"))
    say(f"check against exact effects: rank correlation {top} on the strongest nodes, {others} on random ones")
    clock.lap("approximation check")
    about = _about(run, problem, effects) | {
        "population": facts["population"],
        "fingerprint": fingerprint,
        "roles": roles,
        "approximation_check": check,
    }
    graph = build_circuit(nodes, effects, members, edges, about)
    _add_token_effects(graph, problem)
    write_cards(session, graph, problem.ablation.dictionaries, folder)
    clock.lap("features")
    result = _result(run, graph, curve, effects, problem) | stability
    result |= beside(nulls, len(members), result["agreement"]) | all_features(evidence)
    result["kl_without_safe"] = kl_without(evidence, mask)
    result |= _controls(evidence, effects, ranking[: len(members)], sizes, result["faithfulness"] is not None)
    clock.lap("controls")
    result |= _faithfulness_of_edges(run, problem, test_runs, members, edges)
    clock.lap("ablating edges")
    result["refused"] = counts_by_kind(replies)
    result["reached_target"] = bool(on_discovery[sizes.index(len(members))] >= evaluation.target)
    result["says"] = told(result, evaluation.target, config.contrast, run.behavior.words)
    write_csv(folder / "scores.csv", scores, digits=6)
    write_csv(folder / "replies.csv", replies, digits=4)
    save_circuit(graph, folder / "circuit.json")
    write_csv(folder / "curve.csv", curve)
    write_csv(folder / "prompts.csv", facts.pop("prompts"))
    if config.contrast != "model-base":
        return Made(result, facts=facts)
    changes, result["base"] = base_changes(session, problem, test_runs, members)
    write_csv(folder / BASE_FILE, changes, digits=5)
    return Made(result, {"base": BASE_FILE}, facts)


def _about(run: Run, problem: Problem, effects: Effects) -> dict[str, Any]:
    """The facts that the circuit's graph carries."""
    config, words = problem.config, run.behavior.words
    # The group is spelt out, so that a circuit is the same whether it was named or is the usual one.
    experiment = run.having(DiscoveryOptions, category=run.group(config.category)).experiment
    return {
        "behavior": run.experiment.behavior,
        "words": words._asdict(),
        "data": run.data,
        "category": run.group(config.category),
        "method": config.method,
        "baseline": words.said(config.baseline_choice),
        "effect_unit": words.unit if effects.unit == NATS else effects.unit,
        "edges": config.edges,
        "edge_weight": _EDGE_WEIGHTS[config.edges].format(unit=words.unit),
        "versions": package_versions(),
        "experiment": experiment.model_dump(mode="json"),
        "sites": list(problem.ablation.nodes.sites),
    }


def _with_roles(problem: Problem, effects: Effects) -> tuple[Effects, dict[str, str]]:
    """The effects with their parts from each role as attributes, and what these attributes stand for."""
    if effects.by_position is None:
        return effects, {}
    layout = problem.ablation.baseline.layout
    attributes = {**effects.attributes, **effects_by_role(effects.by_position, layout)}
    return effects._replace(attributes=attributes), role_names(problem.model, problem.runs.batches, layout)


def _with_stability(
    run: Run, problem: Problem, effects: Effects, members: Sequence[int]
) -> tuple[Effects, dict[str, float | None]]:
    """The effects with what a bootstrap over discovery prompts says of the members, and the circuit's own figures."""
    seed, config = run.experiment.seed, problem.config
    effects, figures = with_stability(with_intervals(effects, members, seed), members, config.method, seed)
    halves = agreement_of_halves(problem, len(members), seed) if config.halves else None
    figures |= {"halves_jaccard": halves and halves.jaccard, "halves_chance": halves and halves.chance}
    return effects, {name: reported(value) for name, value in figures.items()}


def _add_token_effects(graph: nx.DiGraph, problem: Problem) -> None:
    """Give the strongest features of the graph the tokens they raise and lower, where these stand out."""
    strongest = strongest_nodes(graph, SHOWN_NODES)
    for site, dictionary in problem.ablation.dictionaries.items():
        names = [n for n in strongest if graph.nodes[n]["site"] == site and graph.nodes[n]["kind"] == "feature"]
        if names:
            features = [int(name.rpartition("/F")[2]) for name in names]
            effects = token_effects(problem.model, dictionary.W_dec.float(), features)
            for name, tokens in zip(names, effects, strict=True):
                graph.nodes[name].update({key: texts for key, texts in tokens._asdict().items() if texts})


def _result(run: Run, graph: nx.DiGraph, curve: pd.DataFrame, effects: Effects, problem: Problem) -> dict[str, Any]:
    """The figures of the reported circuit, all from the test split; what cannot be measured is None."""
    row = curve[curve["size"] == len(graph)].iloc[0]
    names = [name for name in curve.columns if name != "size"]
    figures = {name: reported(row[name]) for name in names}
    total = float(np.nansum(np.abs(effects.effect)))
    errors = float(np.nansum(np.abs(effects.effect[problem.ablation.nodes.is_error])))
    return {
        "preset": run.experiment.name,
        "category": run.group(problem.config.category),
        "method": problem.config.method,
        "baseline": run.behavior.words.said(problem.config.baseline_choice),
        "n_nodes": graph.number_of_nodes(),
        "n_errors": sum(kind == "error" for _, kind in graph.nodes(data="kind")),
        "n_edges": graph.number_of_edges(),
        **dict.fromkeys(FIGURES),
        **figures,
        "error_share": round(errors / total, 4) if effects.unit == NATS and total > 0 else None,
    }


def _controls(
    evidence: Evidence, effects: Effects, members: Int[np.ndarray, " members"], sizes: Sequence[int], measurable: bool
) -> dict[str, Any]:
    """Sites alone, and the areas of the curves of the method's effects, by means where the task has them.

    Where faithfulness is not measurable (`measurable` is False), neither is what is made of it.
    """
    problem, runs = evidence.published
    nodes, smallest = problem.ablation.nodes, EvaluationOptions.of(problem.experiment).min_denominator
    sizes = sorted({*sizes, nodes.n_nodes})
    total = (2 * len(nodes.sites) + 2 * (len(sizes) + 1)) * runs.n_prompts
    with progress_bar("sites and areas", total, "runs") as progress:
        alone = single_site_faithfulness(problem, runs, effects.ranking, len(members), smallest, progress)
        areas = curve_areas(problem, runs, effects.effect, sizes, smallest, progress)
    of_site = np.bincount(nodes.site_numbers[members], minlength=len(nodes.sites)).tolist()
    return {
        "single_site_faithfulness": {site: reported(value if measurable else None) for site, value in alone.items()},
        "nodes_per_site": dict(zip(alone, of_site, strict=True)),
        **{name: reported(value if measurable else None) for name, value in areas.items()},
    }


def _faithfulness_of_edges(
    run: Run, problem: Problem, test_runs: PromptRuns, members: Sequence[int], edges: Sequence[Edge]
) -> dict[str, float | None]:
    """Of the edges that are drawn, on the test split; None where they were not looked for between all nodes."""
    if len(members) > problem.config.edge_nodes:
        return dict.fromkeys(EDGE_FIGURES)
    smallest, ends = EvaluationOptions.of(run.experiment).min_denominator, [edge[:2] for edge in edges]
    n_sites = len(problem.ablation.nodes.sites) * len(test_runs.batches)
    with progress_bar("ablating edges", n_sites, "sites") as progress:
        figures = edge_faithfulness(problem, test_runs, members, ends, smallest, run.experiment.seed, progress)
    return {name: reported(value) for name, value in figures.items()}


_LONGEST_TEXT = 600


def explain_circuit(session: Session, folder: Path) -> None:
    """Ask for the explanations that the features of a circuit lack, and write them into its `features.json`.

    What was explained before an error is kept.

    Raises:
        UserError: the endpoint cannot be asked.
    """
    run, tokenizer = session.run, session.model.tokenizer
    options = LabelOptions.of(run.experiment)
    endpoint, names = Endpoint(options), unexplained(folder, options)
    prompts, cards = read_prompts(run.store.folder), read_cards(folder)
    say(f"asking {endpoint.address} about {len(names)} features: contexts of their prompts are sent to it")

    def token_text(token: int) -> str:
        return tokenizer.decode([token])

    graph = load_circuit(folder / "circuit.json")
    _, evidence = feature_cards(
        session.store, session.dictionaries, graph, names, prompts, token_text, run.behavior.words
    )
    text_of = _texts(session.store, prompts, token_text)
    try:
        with progress_bar("explaining", len(names), "features") as progress:
            for name in names:
                cards["features"][name]["explanation"] = explain(endpoint, evidence[name], text_of)
                progress(1)
    finally:
        write_json(folder / CARDS_FILE, cards)


def _texts(store: Store, prompts: pd.DataFrame, token_text: Callable[[int], str]) -> Callable[[int, bool], str]:
    """What is shown of a context: the prompt, or the tokens around the one in question, which is marked."""

    def text_of(row: int, whole: bool) -> str:
        prompt = store.tokens.prompt[row]
        if whole:
            return " ".join(str(prompts["prompt"].iloc[prompt]).split())[:_LONGEST_TEXT]
        rows = np.arange(max(0, row - BEFORE), min(store.n_tokens, row + AFTER + 1))
        rows = rows[store.tokens.prompt[rows] == prompt]
        texts = [token_text(int(store.tokens.token[other])) for other in rows]
        marked = [f"«{text}»" if other == row else text for text, other in zip(texts, rows, strict=True)]
        return " ".join("".join(marked).split())[:_LONGEST_TEXT]

    return text_of

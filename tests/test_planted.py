"""Planted circuits: the models compute them, ablation and path patching agree on them, and the methods find them.

Planted cheats: who looks at one side takes them for a circuit, and the proof shows it. Superposed models: they compute
their circuits from features that interfere, and what dictionaries have of the truth is told from what they lack.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import planted_cheats
import planted_learned
import pytest
import torch
from planted import BY_CORRELATION, MINIMAL, measure, report, summary
from planted_circuits import AGAINST, FOR, KINDS, N_LAYERS, OUTPUT, OUTPUT_LOGITS, Circuit, Node, planted_graph
from planted_learned import TRAININGS, Setting, corpus, likeness, recovery
from planted_models import CONSTANT, D_MODEL
from planted_problems import ACTIVATIONS, MARGIN, Planted, exact_margin, load_planted_model, plant
from planted_superposed import Superposed, Superposition, superpose
from torch import Tensor

from sfc.circuits.methods import METHODS
from sfc.circuits.nodes import Nodes
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.interventions import recorder
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore, score_batch, score_prompts
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.nulls import random_dictionaries


@pytest.fixture(scope="module", params=KINDS)
def problem(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(request.param, 0, tmp_path_factory.mktemp("planted"))


def _computed(circuits: Sequence[Circuit], sources: Mapping[str, float]) -> tuple[list[dict[str, float]], float]:
    """What the circuits make of the sources at the last position: features after each block, and the score."""
    values = dict.fromkeys((feature for circuit in circuits for feature in circuit.born), 0.0)
    after: list[dict[str, float]] = [dict(values)]
    values |= {source.upper(): value for source, value in sources.items()}
    for block in range(1, N_LAYERS):
        before = dict(values)
        for unit in (unit for circuit in circuits for unit in circuit.units if unit.block == block):
            on = max(sum(weight * before[feature] for feature, weight in unit.reads.items()) + unit.bias, 0)
            for feature, weight in unit.writes.items():
                values[feature] += weight * on
        after.append(dict(values))
    weights = {OUTPUT: OUTPUT_LOGITS} | {f: w for circuit in circuits for f, w in circuit.logits.items()}
    return after, sum((w.get(FOR, 0) - w.get(AGAINST, 0)) * values[f] for f, w in weights.items())


def test_the_model_computes_its_circuits_and_the_dictionaries_see_them(problem: Planted) -> None:
    model, dictionaries = problem.problem.model, problem.problem.ablation.dictionaries
    (batch, _), seen = next(iter(problem.problem.runs)), dict[str, Tensor]()
    with torch.no_grad():
        interventions = {site: recorder(seen, site) for site in dictionaries}
        scores = problem.problem.score(last_logits(model, batch, interventions))
    features = torch.cat([dictionaries[site].encode(x[:, -1]) for site, x in seen.items()], dim=1)
    of_site = np.cumsum([0, *(dictionary.d_sae for dictionary in dictionaries.values())])
    first_node = np.cumsum([0, *problem.problem.ablation.nodes.sizes])
    for row, ids in enumerate(batch.ids.tolist()):
        words = model.tokenizer.convert_ids_to_tokens(ids)
        firing = {source: value for word in words for source, value in problem.words[word].items()}
        after, score = _computed(problem.circuits, firing)
        assert float(scores[row]) == pytest.approx(score, rel=0.02, abs=1e-3)
        for node, number in problem.numbers.items():
            value = float(features[row, of_site[node.layer] + number - first_node[node.layer]])
            expected = after[node.layer][node.feature] * problem.basis.scales[node.feature]
            assert value == pytest.approx(expected, rel=0.01, abs=2e-3), node


def test_what_is_planted_acts_and_nothing_else_does(problem: Planted) -> None:
    assert exact_margin(problem) > 100


def test_a_circuit_that_ablation_contradicts_is_not_planted(tmp_path: Path) -> None:
    chain = plant("chain", 2, tmp_path)
    distractor = min(set(chain.numbers.values()) - chain.nodes)
    for nodes in (chain.nodes | {distractor}, chain.nodes - {min(chain.nodes)}):
        with pytest.raises(RuntimeError, match="not planted"):
            exact_margin(replace(chain, nodes=nodes))


def test_planted_graphs_by_hand() -> None:
    a, A, f, out2, out3 = Node(0, "a"), Node(1, "A"), Node(2, "f"), Node(2, OUTPUT), Node(3, OUTPUT)
    copy, b, B = Node(2, "A"), Node(0, "b"), Node(1, "B")
    assert planted_graph(KINDS["chain"]) == ({a, A, f, out3}, {(a, A), (A, f), (f, out3)})
    skip = {(a, A), (A, f), (A, copy), (f, out3), (copy, out3)}
    assert planted_graph(KINDS["skip"]) == ({a, A, f, copy, out3}, skip)
    joined = {(a, A), (b, B), (A, out2), (B, out2), (out2, out3)}
    assert planted_graph(KINDS["or"]) == ({a, b, A, B, out2, out3}, joined)


@pytest.mark.parametrize("kind", ["sum", "inhibitor", "skip"])
def test_planted_edges_are_those_that_path_patching_finds(kind: str, tmp_path: Path) -> None:
    planted = plant(kind, 1, tmp_path)
    effects = _path_patched(planted)
    weakest = min(abs(effects[edge]) for edge in planted.edges)
    assert weakest > MARGIN * max(abs(effect) for edge, effect in effects.items() if edge not in planted.edges)


@torch.no_grad()
def _path_patched(planted: Planted) -> dict[tuple[int, int], float]:
    """What ablating a source does when only one target hears of it, for all targets that move at all."""
    problem, ablation, nodes = planted.problem, planted.problem.ablation, planted.problem.ablation.nodes
    ((batch, prefix),) = problem.runs
    clean: dict[str, Tensor] = {}
    recorders = {site: recorder(clean, site) for site in nodes.sites}
    score = score_batch(problem.model, problem.score, batch, recorders, prefix).mean()
    firsts, effects = np.cumsum([0, *nodes.sizes]), {}
    for source in range(firsts[-2]):
        i = nodes.site_numbers[source]
        here, there = nodes.sites[i : i + 2]
        keep = torch.ones(1, nodes.n_nodes)
        keep[0, source] = 0
        changed: dict[str, Tensor] = {}
        ablated = {here: ablation.interventions(keep, torch.zeros_like(batch.lengths), batch)[here]}
        score_batch(problem.model, problem.score, batch, ablated | {there: recorder(changed, there)}, prefix)
        dictionary = ablation.dictionaries[there]
        moves = (dictionary.encode(changed[there]) - dictionary.encode(clean[there])) * batch.touchable[..., None]
        for feature in np.flatnonzero(moves.abs().amax((0, 1)) > 1e-3).tolist():
            hears = {there: lambda x, f=feature, m=moves, d=dictionary: x + m[..., f, None] * d.W_dec[f]}
            patched = score_batch(problem.model, problem.score, batch, hears, prefix).mean()
            effects[source, int(firsts[i + 1]) + feature] = float(score - patched)
    return effects


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return pd.concat([measure(["chain", "and", "inhibitor"], [0]), measure(["or"], [0])])


def test_causal_methods_find_all_that_is_planted(measured: pd.DataFrame) -> None:
    figures = summary(measured[measured["kind"] != "or"])
    assert list(figures) == METHODS.names()
    for method in set(METHODS.names()) - {*BY_CORRELATION, *MINIMAL}:
        of_nodes = {name: value for name, value in figures[method].items() if name.startswith("node")}
        assert set(of_nodes.values()) == {1.0}, method
    for method in MINIMAL:
        assert figures[method]["node_precision_min"] == 1 and figures[method]["node_recall_mean"] < 1
    for method in BY_CORRELATION:
        assert figures[method]["node_auroc_mean"] < 0.9


def test_the_report_says_why_the_gradient_misses_redundant_nodes(measured: pd.DataFrame) -> None:
    assert summary(measured[measured["kind"] == "or"])["attribution"]["node_recall_mean"] == pytest.approx(
        1 / 3, abs=1e-4
    )
    lines = report(measured).splitlines()
    assert any(line.startswith("or, nodes by attribution: past the bound") for line in lines)
    assert not any(line.endswith("unexplained") for line in lines)
    assert sum(line.startswith("| chain") for line in lines) == 4


def test_one_side_takes_offsets_for_a_circuit_and_both_sides_find_the_planted_one() -> None:
    measured = planted_cheats.measure([0], ["learned-mask", "magnitude"])
    rows = {(row["method"], row["asked"]): row for row in measured.to_dict("records")}
    assert len(measured) == 3 == len(rows), "what looks at stored values alone is asked once"
    cheat, honest = (rows["learned-mask", asked] for asked in planted_cheats.ASKED.values())
    assert cheat["faithfulness"] > 0.9 and cheat["prompt_free"] == pytest.approx(cheat["faithfulness"])
    assert cheat["precision"] <= 0.5 and cheat["recall"] < 0.2, "of what is planted, the last nodes alone"
    for figure in ("recovered_toxic", "recovered_safe", "agreement", "gap_kept"):
        assert abs(cheat[figure]) < 0.02 and honest[figure] > 0.95, figure
    assert cheat["separation"] == pytest.approx(0.5, abs=0.05) and honest["separation"] == 1
    assert honest["precision"] == honest["recall"] == 1 and abs(honest["prompt_free"]) < 0.02


@pytest.fixture(scope="module")
def superposed(tmp_path_factory: pytest.TempPathFactory) -> Superposed:
    return superpose("chain", Superposition(128, 3), 12, 0, tmp_path_factory.mktemp("superposed"))


def test_a_superposed_model_computes_its_circuits_from_all_that_it_reads(superposed: Superposed) -> None:
    model, basis = load_planted_model(superposed.folder), superposed.basis
    prompts = model.tokenize([*superposed.prompts.toxic, *superposed.prompts.safe])
    batches = make_batches(prompts, TemplateLayout.of(prompts), ACTIVATIONS.batch_tokens, model.device)
    scores = score_prompts(model, RefusalScore.of(model), batches)
    sources = [source for circuit in superposed.circuits for source in circuit.sources]
    interference = 0.0
    for score, prompt in zip(scores, prompts, strict=True):
        words = [superposed.words[word] for word in model.tokenizer.convert_ids_to_tokens(prompt.ids)]
        total = sum((basis.writing(word) for word in words), torch.zeros(D_MODEL))
        read = {source: float(basis.reading({source: 1}) @ total) for source in sources}
        assert float(score) == pytest.approx(_computed(superposed.circuits, read)[1], rel=0.02, abs=0.02)
        interference = max(interference, *(abs(read[s] - sum(word.get(s, 0) for word in words)) for s in sources))
    assert interference > 0.05, "features are read through others"
    assert scores[:12].min() > scores[12:].mean() + 1


def test_there_are_more_features_than_dimensions_at_every_site(superposed: Superposed) -> None:
    for site in ACTIVATIONS.sites:
        directions = superposed.directions(superposed.features_at(site))
        assert len(directions) > D_MODEL > torch.linalg.matrix_rank(directions)
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(len(directions)))


def test_recovery_is_all_of_the_truth_and_nothing_of_chance(superposed: Superposed) -> None:
    true = {site: _true_dictionary(superposed, site) for site in ACTIVATIONS.sites}
    held_out = corpus(superposed, "held out", 40, seed=0)
    of_true, of_random = (recovery(superposed, each, held_out) for each in (true, random_dictionaries(true, seed=0)))
    assert of_true.recovered == of_true.planted_recovered == 1 and of_true.explained > of_random.explained + 0.2
    assert of_random.recovered == of_random.planted_recovered == 0
    firsts = Nodes.of({site: dictionary.d_sae for site, dictionary in true.items()}).first_numbers
    numbers = [
        first + superposed.features_at(site).index(node.feature)
        for layer, (site, first) in enumerate(zip(true, firsts, strict=True))
        for node in superposed.planted
        if node.layer == layer
    ]
    circuit = np.zeros(firsts[-1] + true[ACTIVATIONS.sites[-1]].d_sae + 1, dtype=bool)
    circuit[numbers[1:]] = True
    alike = likeness(superposed, true, circuit)
    assert alike.shape == (len(superposed.planted), len(superposed.planted) - 1)
    assert (alike.max(0) > 0.99).all() and (alike.max(1) > 0.99).sum() == len(superposed.planted) - 1


def _true_dictionary(superposed: Superposed, site: str) -> TopKDictionary:
    rows = superposed.directions(superposed.features_at(site))
    centre = CONSTANT * superposed.basis.constant
    return TopKDictionary(
        {"W_enc": rows.T, "b_enc": torch.zeros(len(rows)), "W_dec": rows, "b_dec": centre}, k=6, site=site
    )


def test_learned_dictionaries_hold_more_of_the_truth_than_random_ones_and_so_do_their_circuits() -> None:
    setting = Setting(Superposition(96, 2), expansion=2, k=8, steps=40, prompts=400, mask_steps=20)
    measured = planted_learned.measure([setting], ["chain"])
    assert measured["training"].tolist() == [name for name in TRAININGS for _ in range(2)]
    assert set(measured["width"]) == {2 * D_MODEL}
    kmeans, null = measured.iloc[0], measured.iloc[1]
    assert kmeans["nodes"] == null["nodes"]
    assert kmeans["recovered"] > 0.2 and null["recovered"] == 0
    assert kmeans["all_features_agree"] > null["all_features_agree"]
    assert kmeans["agreement"] > max(null["agreement"], 0.1)

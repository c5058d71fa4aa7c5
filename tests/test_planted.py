"""Planted circuits: the models compute them, ablation and path patching agree on them, and the methods find them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted import BY_CORRELATION, measure, report, summary
from planted_circuits import AGAINST, FOR, KINDS, N_LAYERS, OUTPUT, OUTPUT_LOGITS, Circuit, Node, planted_graph
from planted_problems import MARGIN, Planted, exact_margin, plant
from torch import Tensor

from sfc.circuits.methods import METHODS
from sfc.models.interventions import recorder
from sfc.models.running import last_logits
from sfc.models.score import score_batch


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
    return pd.concat([measure(["chain", "and", "inhibitor"], range(2)), measure(["or"], [0])])


def test_causal_methods_find_all_that_is_planted(measured: pd.DataFrame) -> None:
    figures = summary(measured[measured["kind"] != "or"])
    assert list(figures) == METHODS.names()
    for method in set(METHODS.names()) - set(BY_CORRELATION):
        of_nodes = {name: value for name, value in figures[method].items() if name.startswith("node")}
        assert set(of_nodes.values()) == {1.0}, method
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

"""The figures of a proof, each on cases whose answer is known by hand."""

from dataclasses import replace

import numpy as np
import pytest
from paired_prompts import features, paired_problem, random_architecture

from sfc.circuits.ablation import Ablation
from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.problem import Problem, PromptRuns
from sfc.circuits.proof import (
    PairScores,
    SideScores,
    figures_by_size,
    pair_figures,
    pair_scores,
    says,
    side_figures,
    side_scores,
)  # fmt: skip
from sfc.models.batches import TemplateLayout, make_batches
from sfc.stats import bootstrap_auroc, bootstrap_gap, bootstrap_ratio

N = 30
RANDOM = np.random.default_rng(0)
POSITIVE = np.repeat([True, False], 2 * N)
PROMPT = np.repeat(np.arange(2 * N), 2)
"""each prompt is in two pairs"""
MODEL = np.where(POSITIVE, 5.0, -3.0) + RANDOM.normal(size=len(POSITIVE))
EMPTY = np.where(POSITIVE, -3.0, 5.0) + RANDOM.normal(size=len(POSITIVE))
KL_EMPTY = RANDOM.uniform(1, 2, len(POSITIVE))


def pairs(circuit: np.ndarray, kl_circuit: np.ndarray) -> PairScores:
    return PairScores(MODEL, EMPTY, circuit, KL_EMPTY, kl_circuit, POSITIVE, PROMPT)


def values(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value for name, value in figures.items() if not name.endswith(("_low", "_high"))}


def same_everywhere(value: float) -> dict[str, object]:
    names = ("recovered_toxic", "recovered_safe", "kl_recovered_toxic", "kl_recovered_safe", "agreement")
    return dict.fromkeys(names, pytest.approx(value, abs=1e-9))


def test_the_model_itself_recovers_all_and_its_counterfactual_nothing() -> None:
    assert values(pair_figures(pairs(MODEL, 0 * KL_EMPTY), 0.5, 0)) == same_everywhere(1)
    assert values(pair_figures(pairs(EMPTY, KL_EMPTY), 0.5, 0)) == same_everywhere(0)


def test_what_goes_a_share_of_the_way_in_every_pair() -> None:
    figures = pair_figures(pairs(EMPTY + 0.6 * (MODEL - EMPTY), 0.25 * KL_EMPTY), 0.5, 0)
    assert figures["recovered_toxic"] == figures["recovered_safe"] == pytest.approx(0.6)
    assert figures["agreement"] == pytest.approx(1 - 0.4**2)
    assert figures["kl_recovered_toxic"] == pytest.approx(0.75)
    for name in values(figures):
        low, high = figures[f"{name}_low"], figures[f"{name}_high"]
        assert low == pytest.approx(figures[name]) and high == pytest.approx(figures[name]), "no draw differs"


def test_a_constant_refusal_recovers_one_side_only() -> None:
    """5 on each pair: right on positive prompts, and on negative ones what their counterfactuals score."""
    figures = pair_figures(pairs(np.full(len(MODEL), 5.0), np.where(POSITIVE, 0, KL_EMPTY)), 0.5, 0)
    assert figures["recovered_toxic"] == pytest.approx(1, abs=0.1)
    assert figures["recovered_safe"] == pytest.approx(0, abs=0.1)
    assert figures["kl_recovered_toxic"] == 1 and figures["kl_recovered_safe"] == 0
    assert figures["recovered_safe_low"] < figures["recovered_safe"] < figures["recovered_safe_high"]


def test_nothing_is_measured_where_pairs_score_alike_or_a_side_is_missing() -> None:
    alike = PairScores(MODEL, MODEL, MODEL, KL_EMPTY, KL_EMPTY, POSITIVE, PROMPT)
    assert pair_figures(alike, 0.5, 0)["recovered_toxic"] is None
    assert pair_figures(alike, 0.5, 0)["agreement"] is None
    one_sided = PairScores(*(each[POSITIVE] for each in pairs(MODEL, KL_EMPTY)))
    assert pair_figures(one_sided, 0.5, 0)["recovered_safe"] is None


def sides(circuit: np.ndarray, prompt_free: np.ndarray) -> SideScores:
    return SideScores(MODEL, np.full(len(MODEL), -4.0), circuit, prompt_free, POSITIVE)


def test_figures_of_all_prompts_by_hand() -> None:
    nothing = np.full(len(MODEL), -4.0)
    model = values(side_figures(sides(MODEL, nothing), 0.5, 0))
    assert model["gap_kept"] == pytest.approx(1) and model["prompt_free"] == 0
    assert model["separation"] == model["separation_model"] == 1
    refuser = values(side_figures(sides(np.full(len(MODEL), 5.0), np.full(len(MODEL), 5.0)), 0.5, 0))
    assert refuser["gap_kept"] == 0 and refuser["separation"] == 0.5
    assert refuser["prompt_free"] == pytest.approx(9 / (MODEL[POSITIVE].mean() + 4))
    half = values(side_figures(sides(0.5 * MODEL + 7, nothing), 0.5, 0))
    assert half["gap_kept"] == pytest.approx(0.5) and half["separation"] == 1


def test_ratios_are_drawn_by_subject() -> None:
    """Two rows of a subject count as one: copies of all rows make no interval narrower."""
    numerator, denominator = RANDOM.normal(2, 1, 40), RANDOM.normal(4, 1, 40)
    once = bootstrap_ratio(numerator, denominator, np.arange(40), 0)
    thrice = bootstrap_ratio(np.tile(numerator, 3), np.tile(denominator, 3), np.tile(np.arange(40), 3), 0)
    assert once == pytest.approx(thrice) and once.low < once.value < once.high
    assert once.value == pytest.approx(numerator.sum() / denominator.sum())
    assert bootstrap_ratio(numerator, numerator - numerator.mean(), np.arange(40), 0).value is None
    assert once.complement.low == pytest.approx(1 - once.high)


def test_gaps_and_separations_by_hand() -> None:
    positive = np.array([True, True, False, False])
    values, reference = np.array([3.0, 1.0, 1.0, 0.0]), np.array([4.0, 4.0, 0.0, 0.0])
    assert bootstrap_gap(values, reference, positive, 0).value == pytest.approx(1.5 / 4)
    assert bootstrap_auroc(values, positive, 0).value == pytest.approx(3.5 / 4)
    assert bootstrap_gap(values, reference, np.ones(4, dtype=bool), 0).value is None


def test_a_sentence_says_what_the_figures_allow() -> None:
    figures = {"recovered_toxic": 0.44, "recovered_safe": 0.38, "agreement": 0.65, "null_agreement": -0.001}
    refused = {"safe": (1, 1, 20), "hard": (4, 3, 35)}
    assert says({**figures, "gap_kept": 0.8, "separation": 0.9, "prompt_free": 0.02}, refused).split("; ") == [
        "restores 0.44 of the difference on toxic prompts and 0.38 on safe ones, agreement 0.65",
        "random features agree 0.00",
        "under mean ablation it keeps 0.80 of the gap between the sides",
        "1 of 20 replies to safe prompts refuse (the model's: 1)",
        "3 of 35 replies to hard prompts refuse (the model's: 4)",
    ]
    constant = {"recovered_toxic": 0.01, "recovered_safe": -0.001, "agreement": 0.0, "gap_kept": 0.0, "separation": 0.5}
    assert says(constant | {"prompt_free": 0.89}).split("; ") == [
        "restores none of the difference between toxic and safe prompts (0.01, 0.00)",
        "under mean ablation it scores toxic and safe prompts alike, so it does not decide",
        "0.89 of its faithfulness under mean ablation is left where the prompt cannot enter",
    ]
    assert "too much alike" in says(dict.fromkeys(figures))


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return paired_problem(random_architecture("Llama", tmp_path_factory.mktemp("model")), features(), "ablate")[0]


def test_scores_of_pairs_obey_the_laws(paired: Problem) -> None:
    """Nothing heard, nothing recovered; with errors kept as well, everything is."""
    nodes = paired.ablation.nodes
    keep = np.ones((2, nodes.n_nodes), dtype=bool)
    keep[0, nodes.site_numbers == 0] = False
    deaf, features_alone = pair_scores(paired.model, paired.score, paired.ablation, paired.runs, keep)
    np.testing.assert_allclose(deaf.circuit, deaf.empty, atol=1e-5)
    np.testing.assert_allclose(deaf.kl_circuit, deaf.kl_empty, atol=1e-5)
    figures = pair_figures(deaf, 1e-4, 0)
    assert figures["agreement"] == pytest.approx(0, abs=1e-3)
    with_errors = replace(paired, ablation=replace(paired.ablation, error_mode="node"))
    (everything,) = pair_scores(paired.model, paired.score, with_errors.ablation, paired.runs, keep[1:])
    np.testing.assert_allclose(everything.circuit, everything.model, atol=1e-4)
    assert np.abs(everything.kl_circuit).max() < 1e-4 < everything.kl_empty.max()
    assert np.abs(features_alone.circuit - features_alone.model).max() > 1e-2
    # Scores are the plain ones, whichever side is explained.
    directed = full_scores(paired.model, paired.score, paired.runs)
    np.testing.assert_allclose(np.where(deaf.positive, 1, -1) * deaf.model, directed, atol=1e-5)


def test_sizes_are_measured_on_discovery_pairs(paired: Problem) -> None:
    ranking = np.flatnonzero(paired.ablation.nodes.is_feature)
    curve = figures_by_size(paired, ranking, [5, 96], 1e-4)
    assert len(curve) == 2 and list(curve.columns) == ["agreement", "recovered"]
    assert curve["agreement"].iloc[0] == pytest.approx(0, abs=1e-3), "five nodes of one site"


def test_scores_of_sides_have_the_first_site_cut(paired: Problem) -> None:
    model = paired.model
    prompts = model.tokenize(["Pick my lock", "Burn a house", "Bake my cake", "Draw my cats"])
    layout = TemplateLayout.of(prompts)
    batches = make_batches(prompts, layout, 200, model.device)
    spaces, nodes = paired.ablation.dictionaries, paired.ablation.nodes
    ablation = Ablation(nodes, spaces, mean_baseline(model, spaces, batches, layout), "ablate")
    problem = replace(paired, score=paired.score.score, ablation=ablation)  # pyright: ignore
    runs = PromptRuns.of(model, batches, nodes.sites[0])
    keep = np.random.default_rng(0).random((2, nodes.n_nodes)) < 0.5
    found = side_scores(problem, runs, np.array([True, True, False, False]), keep)
    cut = keep & (nodes.site_numbers == 1)
    for scores, kept, free in zip(found, keep, cut, strict=True):
        slow = ablated_scores(model, problem.score, ablation, runs, np.stack([np.zeros_like(kept), kept, free]))
        np.testing.assert_allclose(np.stack([scores.empty, scores.circuit, scores.prompt_free]), slow, atol=1e-5)
    assert np.ptp(found[0].prompt_free) == pytest.approx(0, abs=1e-3), "nothing of the prompt enters but its length"

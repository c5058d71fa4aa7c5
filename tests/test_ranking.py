"""The ranking of patches: effects, intervals and tests against slow or exact ways to get them."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, pearsonr, spearmanr

from sfc.studies.patch import ComponentKind
from sfc.studies.patch.ranking import Patch, PatchRuns, agreement, effect_table, ratio_interval, sign_flip_test

floats = st.floats(-5, 5, allow_subnormal=False)


@given(st.lists(floats, min_size=1, max_size=8))
def test_the_sign_flip_test_counts_all_patterns(changes: list[float]) -> None:
    sums = [abs(np.dot(signs, changes)) for signs in itertools.product((-1, 1), repeat=len(changes))]
    at_least = np.mean(np.array(sums) >= abs(sum(changes)) - 1e-9 * np.abs(changes).sum())
    assert sign_flip_test(np.array([changes]), 10_000, 0)[0] == pytest.approx(at_least)


def test_random_flips_approach_all_of_them() -> None:
    changes = np.random.default_rng(3).normal(0.3, 1, (40, 12))
    exact, drawn = sign_flip_test(changes, 2**12, 0), sign_flip_test(changes, 2**12 - 1, 0)
    assert np.abs(exact - drawn).max() < 0.03
    assert drawn.min() >= 1 / 2**12
    assert exact.max() <= 1 and drawn.max() <= 1


def test_p_values_of_nothing_are_uniform() -> None:
    p = sign_flip_test(np.random.default_rng(0).normal(size=(400, 10)), 2000, 0)
    assert np.mean(p <= 0.1) == pytest.approx(0.1, abs=0.045)
    assert sign_flip_test(np.zeros((1, 5)), 1000, 0)[0] == 1
    assert sign_flip_test(np.array([[3.0]]), 1000, 0)[0] == 1, "one pair proves nothing"


@given(floats, st.lists(st.floats(0.5, 5), min_size=2, max_size=8))
def test_the_interval_of_a_constant_ratio_is_that_ratio(ratio: float, gaps: list[float]) -> None:
    low, high = ratio_interval(ratio * np.array([gaps]), np.array(gaps), 200, 0)
    assert (low[0], high[0]) == pytest.approx((ratio, ratio), abs=1e-9)


def test_the_interval_covers_the_ratio_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(0), []
    for trial in range(200):
        gaps = random.normal(8, 2, 30)
        low, high = ratio_interval(0.4 * gaps + random.normal(0, 1, (1, 30)), gaps, 500, trial)
        covered.append(low[0] <= 0.4 <= high[0])
    assert 0.88 <= np.mean(covered) <= 0.99


def test_one_pair_has_no_interval() -> None:
    low, high = ratio_interval(np.ones((3, 1)), np.ones(1), 200, 0)
    assert np.isnan(low).all() and np.isnan(high).all() and low.shape == (3,)


def _runs(direction: str, kind: ComponentKind, changes: np.ndarray, gaps: np.ndarray) -> PatchRuns:
    base = np.arange(len(gaps), dtype=float)
    patches = [Patch(kind, layer, layer) for layer in range(len(changes))]
    numbers = list(range(len(gaps)))
    return PatchRuns(direction, "last", patches, numbers, base, base + gaps, base + changes, 2 * changes)


def _table(*runs: PatchRuns, min_denominator: float = 0.5) -> pd.DataFrame:
    return effect_table(runs, draws=300, flips=5000, min_denominator=min_denominator, seed=0)


def test_the_effect_is_a_ratio_of_means_by_hand() -> None:
    gaps, changes = np.array([1.0, 9.0]), np.array([[1.0, 0.0], [0.5, 4.5], [-2.0, -3.0]])
    table = _table(_runs("denoise", "mlp", changes, gaps)).set_index("component")
    assert table["effect"].to_dict() == pytest.approx({"mlp.0": 0.1, "mlp.1": 0.5, "mlp.2": -0.5})
    assert table["attribution"].to_dict() == pytest.approx({"mlp.0": 0.2, "mlp.1": 1.0, "mlp.2": -1.0})
    assert table["rank"].to_dict() == {"mlp.1": 1, "mlp.2": 2, "mlp.0": 3}, "by size, the sign kept"
    assert table["p_value"].to_dict() == pytest.approx({"mlp.0": 1, "mlp.1": 0.5, "mlp.2": 0.5})


def test_noising_is_denoising_with_all_signs_turned() -> None:
    random = np.random.default_rng(0)
    gaps, changes = random.normal(8, 1, 12), random.normal(1, 1, (5, 12))
    denoise, noise = (_table(_runs(d, "attn", s * changes, s * gaps)) for d, s in (("denoise", 1), ("noise", -1)))
    pd.testing.assert_frame_equal(denoise.drop(columns="direction"), noise.drop(columns="direction"))


def test_false_discoveries_are_controlled_within_direction_and_kind() -> None:
    random = np.random.default_rng(0)
    runs = [
        _runs(direction, kind, random.normal(0.5, 1, (9, 11)), random.normal(8, 1, 11))
        for direction in ("denoise", "noise")
        for kind in ("mlp", "attn")
    ]
    table = _table(*runs)
    assert len(table) == 36
    for _, family in table.groupby(["direction", "kind"]):
        np.testing.assert_allclose(family["q_value"], false_discovery_control(family["p_value"].to_numpy()))
        assert family["rank"].tolist() == list(range(1, 10))
        assert family["effect"].abs().is_monotonic_decreasing


def test_a_gap_too_small_to_divide_by_makes_no_effect() -> None:
    table = _table(_runs("denoise", "mlp", np.ones((2, 3)), np.full(3, 0.1)))
    assert table[["effect", "low", "high", "attribution"]].isna().all(axis=None)
    assert table["p_value"].notna().all()
    assert agreement(table).empty


def test_agreement_is_scipys_and_counts_the_strongest() -> None:
    random = np.random.default_rng(0)
    exact, gaps = random.normal(size=(20, 6)), np.full(6, 2.0)
    runs = _runs("denoise", "mlp", exact, gaps)._replace(attribution=exact + random.normal(size=(20, 6)))
    row = agreement(_table(runs)).iloc[0]
    effect, fast = exact.mean(1) / 2, runs.attribution.mean(1) / 2
    assert row["pearson"] == pytest.approx(pearsonr(effect, fast)[0])
    assert row["spearman"] == pytest.approx(spearmanr(effect, fast)[0])
    assert row["mean_difference"] == pytest.approx(np.abs(effect - fast).mean())
    strongest = [set(np.argsort(-np.abs(values))[:10]) for values in (effect, fast)]
    assert (row["n"], row["best"], row["shared"]) == (20, 10, len(strongest[0] & strongest[1]))
    few = agreement(_table(_runs("denoise", "mlp", exact[:2], gaps))).iloc[0]
    assert few["pearson"] is None and few["shared"] == 2

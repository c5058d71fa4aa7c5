"""Refusal direction and probe: planted directions, no signal at all, and the command."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import random_model
from commands import sfc
from hypothesis import given
from hypothesis import strategies as st

from sfc.core.config import ModelConfig
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.loading import Model, load_model
from sfc.studies.probe.measure import (
    cross_validated_probe,
    difference_of_means,
    last_residuals,
    probe_table,
    ridge,
    separation,
    separation_interval,
    stratified_folds,
)


def _planted(n: int, d: int, gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of unit variance whose two sides' means lie `gap` apart along the first axis."""
    rows = np.random.default_rng(seed).standard_normal((n, d))
    toxic = np.arange(n) % 2 == 0
    rows[toxic, 0] += gap
    return rows, toxic


def test_a_planted_direction_is_found_with_its_separation_at_its_layer() -> None:
    layers = [_planted(400, 20, gap, seed)[0] for seed, gap in enumerate((0.0, 3.0))]
    toxic = _planted(400, 20, 0)[1]
    split = ["discovery" if i < 200 else "test" for i in range(400)]
    table = probe_table(np.stack(layers).astype(np.float32), toxic, split, seed=0)
    nothing, planted = table.to_dict("records")
    assert planted["separation"] == pytest.approx(3.0, abs=0.35)
    assert planted["separation_low"] < 3.0 < planted["separation_high"]
    assert planted["norm"] == pytest.approx(3.0, abs=0.4) and planted["auroc"] > 0.95
    assert planted["accuracy"] == pytest.approx(0.933, abs=0.03), "Phi(1.5), what the best threshold does"
    assert planted["p_value"] == pytest.approx(1 / 201)
    assert nothing["separation_low"] < 0 < nothing["separation_high"]
    assert nothing["accuracy"] < nothing["control_high"] and nothing["p_value"] > 0.05
    for row in (nothing, planted):
        assert row["control"] == pytest.approx(0.5, abs=0.02)


def test_the_separation_by_hand() -> None:
    toxic = np.array([True, True, False, False])
    # Means 5 and 1; both sides have squares of 2 about their mean, so that the pooled variance is 4 / 2.
    assert separation(np.array([4.0, 6.0, 0.0, 2.0]), toxic) == pytest.approx(4 / np.sqrt(2))
    assert separation(np.array([3.0, 3.0, 1.0, 1.0]), toxic) is None
    assert difference_of_means(np.array([[4.0], [6.0], [0.0], [2.0]]), toxic).tolist() == [4.0]
    with pytest.raises(ValueError, match="both sides"):
        difference_of_means(np.ones((4, 1)), np.ones(4, dtype=bool))


def test_the_interval_is_that_of_drawing_prompts_again_one_by_one() -> None:
    projections, toxic = _planted(60, 1, 1.0)[0][:, 0], _planted(60, 1, 1.0)[1]
    random = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        rows = np.concatenate([random.choice(np.flatnonzero(side), side.sum()) for side in (toxic, ~toxic)])
        drawn.append(separation(projections[rows], toxic[rows]))
    low, high = np.percentile(np.array(drawn, dtype=float), [2.5, 97.5])
    ends = separation_interval(projections, toxic, seed=0)
    assert ends.low == pytest.approx(low, abs=0.06) and ends.high == pytest.approx(high, abs=0.06)
    constant = separation_interval(np.zeros(4), np.array([True, True, False, False]), seed=0)
    assert np.isnan(constant.low) and np.isnan(constant.high)


def test_ridge_in_its_dual_form_is_ridge() -> None:
    rows, _ = _planted(30, 7, 1.0)
    rows = np.column_stack([rows, np.ones(30)])  # a dimension that never varies carries nothing
    labels, others = np.random.default_rng(2).standard_normal((30, 3)), rows[:5] + 0.3
    mean, deviation = rows[:, :7].mean(0), rows[:, :7].std(0) * np.sqrt(8)
    fitted, wanted = (rows[:, :7] - mean) / deviation, (others[:, :7] - mean) / deviation
    weights = np.linalg.solve(fitted.T @ fitted + np.eye(7), fitted.T @ (labels - labels.mean(0)))
    np.testing.assert_allclose(ridge(rows, labels, others), wanted @ weights + labels.mean(0), atol=1e-10)


def test_more_dimensions_than_prompts_do_not_make_a_signal() -> None:
    """Fitted to the very rows it is judged on, a probe of 500 dimensions tells 60 random rows apart without a miss."""
    rows, toxic = _planted(60, 500, 0.0)
    fitted = ridge(rows, np.where(toxic, 1.0, -1.0)[:, None], rows)[:, 0] > 0
    assert (fitted == toxic).mean() == 1.0
    probe = cross_validated_probe(rows, toxic, seed=0)
    assert 0.3 < probe.accuracy < 0.7 and probe.control == pytest.approx(0.5, abs=0.03)
    assert probe.accuracy_low < probe.accuracy < probe.accuracy_high


@given(st.lists(st.booleans(), min_size=4, max_size=60).filter(lambda sides: 2 <= sum(sides) <= len(sides) - 2))
def test_every_fold_has_its_share_of_both_sides(sides: list[bool]) -> None:
    toxic = np.array(sides)
    folds = stratified_folds(toxic, np.random.default_rng(0))
    for side in (toxic, ~toxic):
        counts = np.bincount(folds[side], minlength=folds.max() + 1)
        assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="two rows"):
        stratified_folds(np.array([True, False, False]), np.random.default_rng(0))


def _last_hidden_states(model: Model, texts: list[str]) -> np.ndarray:
    """The slow way: one prompt at a time, through Hugging Face alone. Its last state is after the final norm."""
    states = []
    for prompt in model.tokenize(texts):
        output = model.hf(torch.tensor(prompt.ids)[None], output_hidden_states=True)
        states.append(torch.stack([state[0, -1] for state in output.hidden_states[1:-1]]))
    return torch.stack(states, 1).numpy()


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "GPTNeoX", "Qwen2"])
def test_residuals_are_those_of_the_last_real_token(architecture: str, tmp_path: Path) -> None:
    random_model(architecture, tmp_path)
    model = load_model(ModelConfig(source=str(tmp_path), template="plain", refusal_tokens=["I"]))  # pyright: ignore
    texts = ["Hello there", "What?", "Name three rivers of Europe."]
    batches: list[Batch] = make_batches(prompts := model.tokenize(texts), TemplateLayout.of(prompts), 80, model.device)
    done: list[int] = []
    residuals = last_residuals(model, batches, done.append)
    assert residuals.shape == (3, 3, 32) and sum(done) == 3
    np.testing.assert_allclose(residuals[:-1], _last_hidden_states(model, texts), atol=1e-4)


def test_the_command(tmp_path: Path) -> None:
    result = sfc("probe", "--preset", "tiny", "--json", root=tmp_path).result
    assert {"preset", "category", "n_prompts", "n_discovery", "n_test", "n_folds", "layers", "files"} <= set(result)
    assert result["n_discovery"] + result["n_test"] < result["n_prompts"], "the probe has the reference prompts as well"
    layers = pd.read_csv(tmp_path / result["files"]["layers"])
    assert layers["layer"].tolist() == [0, 1] and layers["accuracy"].between(0, 1).all()
    assert result["layers"][1]["separation"] == pytest.approx(layers["separation"][1], abs=1e-4)
    page = (tmp_path / result["files"]["page"]).read_text(encoding="utf-8")
    assert page.count('class="figure"') == 2 and "shuffled" in page
    assert json.loads(sfc("probe", "--preset", "tiny", "--category", "all", "--json", root=tmp_path).stdout)

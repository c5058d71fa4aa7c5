"""`sfc discover` judges its circuit on test prompts of both sides: figures, sentence and picture."""

from pathlib import Path

import pandas as pd
import pytest
from commands import sfc

from sfc.models.score import auroc

FEW = [
    part
    for setting in (
        "evaluation.random_draws=2", "evaluation.replies=2", "discovery.checked_nodes=3", "learned_mask.steps=20",
        "evaluation.sizes=[8, 32]",
    )
    for part in ("--set", setting)
]  # fmt: skip


def discovered(root: Path, *options: str) -> tuple[dict, pd.DataFrame]:
    result = sfc("discover", "--preset", "tiny", *FEW, *options, "--json", root=root).result
    return result, pd.read_csv(root / result["files"]["scores"])


def test_under_mean_ablation_every_test_prompt_of_the_category_is_judged(root: Path) -> None:
    result, scores = discovered(root, "--set", "discovery.baseline=safe-mean")
    assert set(scores["kind"]) == {"toxic", "hard", "safe"} and scores["id"].is_unique
    toxic = (scores["kind"] == "toxic").to_numpy()
    for figure, column in (("separation_model", "model"), ("separation", "circuit")):
        assert result[figure] == pytest.approx(auroc(scores[column].to_numpy(), toxic), abs=1e-3)
    assert result["separation_low"] <= result["separation"] <= result["separation_high"]
    assert scores.loc[toxic, "model"].mean() == pytest.approx(result["f_model"], abs=1e-3)
    assert result["recovered_toxic"] is None and result["agreement"] is None, "figures of pairs, and there are none"
    page = Path(result["files"]["page"]).read_text()
    assert "What the figures say." in page and "Does the circuit decide?" in page


def test_a_circuit_is_judged_by_pairs_in_both_directions_by_means_and_beside_nulls(root: Path) -> None:
    result, scores = discovered(root, "--set", "evaluation.min_denominator=0.001")
    assert result["baseline"] == "counterfactual" and result["n_errors"] == 0
    assert {"toxic", "safe"} <= set(scores["kind"])
    assert len(scores) > scores["id"].nunique(), "a prompt is in several pairs"
    for figure in ("agreement", "null_agreement", "rotated_agreement"):
        assert result[f"{figure}_low"] <= result[figure] <= result[f"{figure}_high"]
    toxic = scores["kind"] == "toxic"
    assert not set(scores.loc[toxic, "id"]) & set(scores.loc[toxic, "counterfactual"]), "of the other side"
    assert result["separation"] is not None and result["f_model"] is not None, "by means as well"
    assert result["p_value"] in (pytest.approx(1 / 3, abs=1e-4), pytest.approx(2 / 3, abs=1e-4), 1)
    assert {"toxic", "safe"} <= set(result["refused"])
    assert all(n["circuit"] <= n["n"] <= 2 for n in result["refused"].values())
    curve = pd.read_csv(result["files"]["curve"])
    reported = curve[curve["size"] == result["n_nodes"]].iloc[0]
    assert reported["agreement"] == pytest.approx(result["agreement"], abs=1e-4)
    assert "restore" in result["says"] and "restored" in Path(result["files"]["page"]).read_text()
    nulls = sfc("nulls", "--preset", "tiny", *FEW, "--json", root=root)
    assert "up to date" in nulls.stderr and "nulls" in nulls.result["files"]


def test_counterfactuals_explain_both_sides_so_that_a_population_is_refused(root: Path) -> None:
    options = ("--population", "safe", "--set", "discovery.baseline=counterfactual")
    refused = sfc("discover", "--preset", "tiny", *options, root=root)
    assert refused.status == 2 and "leave population out" in refused.stderr


def test_pairs_with_answers_of_their_own_are_each_others_counterfactuals(root: Path, tmp_path: Path) -> None:
    records = [
        f'{{"clean_prefix": "My {word}s", "patch_prefix": "My {word}z", "clean_answer": "!", "patch_answer": "?"}}'
        for word in ("cat", "dog", "sun", "hat", "cup", "pen", "box", "map")
    ]
    path = tmp_path / "endings.jsonl"
    path.write_text("\n".join(records))
    result, scores = discovered(root, "--pairs", str(path))
    assert result["says"] and result["gap_kept"] is None
    assert scores["counterfactual"].isin(scores["id"]).all() and set(scores["kind"]) == {"clean", "patch"}

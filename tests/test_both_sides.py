"""`sfc discover` judges its circuit on test prompts of both sides: figures, sentence and picture."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import sfc

from sfc.models.score import auroc

FEW = [
    part
    for setting in (
        "evaluation.random_draws=2", "evaluation.p_value_draws=5", "evaluation.replies=0", "discovery.checked_nodes=3",
    )
    for part in ("--set", setting)
]  # fmt: skip


def discovered(root: Path, *options: str) -> tuple[dict, pd.DataFrame]:
    result = sfc("discover", "--preset", "tiny", *FEW, *options, "--json", root=root).result
    return result, pd.read_csv(root / result["files"]["scores"])


def test_under_mean_ablation_every_test_prompt_of_the_category_is_judged(root: Path) -> None:
    result, scores = discovered(root)
    assert set(scores["kind"]) == {"toxic", "hard", "safe"} and scores["id"].is_unique
    toxic = (scores["kind"] == "toxic").to_numpy()
    for figure, column in (("separation_model", "model"), ("separation", "circuit")):
        assert result[figure] == pytest.approx(auroc(scores[column].to_numpy(), toxic), abs=1e-3)
    assert result["separation_low"] <= result["separation"] <= result["separation_high"]
    assert scores.loc[toxic, "model"].mean() == pytest.approx(result["f_model"], abs=1e-3)
    assert result["recovered_toxic"] is None and result["agreement"] is None, "figures of pairs, and there are none"
    page = Path(result["files"]["page"]).read_text()
    assert "What the figures say." in page and "Does the circuit decide?" in page


def test_under_counterfactual_ablation_pairs_in_both_directions_are_judged(root: Path) -> None:
    result, scores = discovered(root, "--set", "discovery.baseline=counterfactual")
    assert set(scores["kind"]) == {"toxic", "safe"}
    assert result["gap_kept"] is None and result["agreement"] is not None
    assert result["agreement_low"] <= result["agreement"] <= result["agreement_high"]
    assert np.isfinite(scores[["model", "circuit"]].to_numpy()).all()
    assert "restores" in result["says"] or "restored" in result["says"]


def test_pairs_with_answers_of_their_own_have_no_two_sides(root: Path, tmp_path: Path) -> None:
    records = [
        f'{{"clean_prefix": "My {word}s", "patch_prefix": "My {word}z", "clean_answer": "!", "patch_answer": "?"}}'
        for word in ("cat", "dog", "sun", "hat", "cup", "pen", "box", "map")
    ]
    path = tmp_path / "endings.jsonl"
    path.write_text("\n".join(records))
    result, scores = discovered(root, "--pairs", str(path))
    assert result["says"] is None and result["gap_kept"] is None and scores.empty

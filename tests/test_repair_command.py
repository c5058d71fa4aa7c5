"""`sfc repair` as a user types it, on the tiny preset: files, figures, and what it exports."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import sfc
from safetensors.torch import load_file

from sfc.core.experiments import load_experiment
from sfc.models.batches import make_batches
from sfc.models.loading import load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore
from sfc.run import Run
from sfc.saes.format import Dictionaries
from sfc.stats import wilson
from sfc.studies.repair.edits import load_repair, project_weights

SIZES = (2, 5)
# A random model refuses nothing, so that nothing may be asked of its scores.
TINY = (
    "repair", "--preset", "tiny", "--limit", "3", "--sizes", ",".join(map(str, SIZES)),
    "--set", "repair.refused_above=-99", "--set", "repair.ordinary_prompts=3", "--set", "repair.ordinary_tokens=4",
    "--set", "repair.reply_tokens=3", "--set", "repair.random_draws=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def repaired(root: Path) -> dict:
    return sfc(*TINY, "--json", root=root).result


def test_the_command_ends_with_the_promised_json_and_files(repaired: dict, root: Path) -> None:
    assert set(repaired) == {
        "preset", "category", "n_features", "n_qualified", "n_scored", "n_tried", "toxic_share", "most_lost",
        "unedited", "chosen", "weights_difference", "files", "seconds",
    }  # fmt: skip
    assert all((root / path).is_file() for path in repaired["files"].values())
    assert set(repaired["chosen"]) == {"hook", "weights"} and repaired["category"] == "all"
    assert repaired["chosen"]["hook"]["size"] in SIZES
    page = (root / repaired["files"]["page"]).read_text(encoding="utf-8")
    assert page.count('class="figure"') == 3


def test_every_edit_has_a_row_per_prompt_and_rates_with_intervals(repaired: dict, root: Path) -> None:
    replies = pd.read_csv(root / repaired["files"]["replies"], keep_default_na=False)
    edits = 1 + 2 * len(SIZES) * (1 + 2)
    assert len(replies) == edits * 3 * 3
    assert replies.groupby("group")["dataset_type"].unique().map(list).to_dict() == {
        "hard": ["hard"], "safe": ["safe_80k"], "toxic": ["toxic"],
    }  # fmt: skip
    rates = pd.read_csv(root / repaired["files"]["rates"])
    assert len(rates) == edits * 3
    for row in rates.to_dict("records"):
        assert (row["low"], row["high"]) == pytest.approx(wilson(row["refusals"], row["n"]), abs=1e-5)
    assert (rates.loc[rates["kind"] == "none", "loss_rise"] == 0).all()
    # A random edit may be of features that never fire.
    assert (rates.loc[~rates["kind"].isin(["none", "random"]), "loss_rise"] != 0).any()
    scores = rates.pivot(index=["kind", "size", "draw"], columns="group", values="score")
    point = repaired["chosen"]["hook"]
    assert point["hard_score"] == pytest.approx(scores.loc["hook", point["size"], -1]["hard"], abs=1e-3)


def test_the_features_of_the_repair_matter_for_hard_prompts_and_not_for_toxic_ones(repaired: dict, root: Path) -> None:
    features = pd.read_csv(root / repaired["files"]["features"])
    placed = features[features["place"].notna()].sort_values("place")
    assert placed["place"].tolist()[:3] == [1, 2, 3]
    assert placed["hard"].is_monotonic_decreasing and (placed["hard"] > 0).all()
    assert (placed["toxic"] <= repaired["toxic_share"] * placed["hard"] + 1e-6).all()
    unplaced = features[features["place"].isna() & (features["hard"] > placed["hard"].iloc[-1] + 1e-6)]
    assert (unplaced["toxic"] > repaired["toxic_share"] * unplaced["hard"] - 1e-6).all()


def test_what_is_exported_does_to_a_fresh_model_what_was_measured(repaired: dict, root: Path) -> None:
    run = Run(load_experiment("tiny"), root)
    model = load_model(run.experiment.model)
    replies = pd.read_csv(root / repaired["files"]["replies"], keep_default_na=False)
    repair = load_repair(root / repaired["files"]["hook"])
    assert repair.dictionaries == run.saes.folder.name
    dictionaries = Dictionaries(run.saes.folder, run.experiment.activations.sites)

    def measured(kind: str) -> pd.DataFrame:
        of_kind = replies[(replies["kind"] == kind) & (replies["size"] == repaired["chosen"][kind]["size"])]
        return of_kind[of_kind["draw"] == -1]

    def scores(kind: str, hooked: bool) -> np.ndarray:
        values = []
        for prompt in measured(kind)["prompt"]:
            (batch,) = make_batches(model.tokenize([prompt]), repair.layout, 999, model.device)
            interventions = repair.interventions(dictionaries, batch) if hooked else {}
            values.append(float(RefusalScore.of(model)(last_logits(model, batch, interventions))))
        return np.array(values)

    np.testing.assert_allclose(scores("hook", hooked=True), measured("hook")["score"], atol=1e-4)
    project_weights(model, load_file(root / repaired["files"]["weights"]))
    np.testing.assert_allclose(scores("weights", hooked=False), measured("weights")["score"], atol=1e-4)
    assert repaired["weights_difference"] < 1e-3

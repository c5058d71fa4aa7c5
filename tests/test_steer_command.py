"""`sfc steer` as a user types it, on the tiny preset, and its page."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import assert_one_line, sfc
from safetensors.torch import load_file

from sfc.stats import wilson
from sfc.studies.steer.sweep import best_defence, trade_off

# A random model refuses nothing, so that nothing may be asked of its directions.
LENIENT = (
    "--set", "steering.min_induced=-99", "--set", "steering.max_kl=99", "--set", "steering.latest=1",
    "--set", "steering.reply_tokens=3", "--set", "steering.ordinary_prompts=3", "--set", "steering.ordinary_tokens=4",
    "--set", "steering.random_directions=2", "--set", "steering.shuffled_directions=3",
    "--set", "steering.tried_prompts=4",
)  # fmt: skip
TINY = ("steer", "--preset", "tiny")
SMALL = (*TINY, "--limit", "4", "--alphas=-0.5,0,0.5", "--set", "steering.contrasts=[toxic-safe,hard-score]", *LENIENT)
POINT_KEYS = {
    "alpha", "prompts", "eligible", "changed", "changed_rate", "changed_low", "changed_high", "score_change",
    "loss_rise", "later_loss_rise", "kl", "held_out_rate", "held_out_loss_rise", "random_mean", "random_highest",
    "shuffled_mean", "shuffled_highest",
}  # fmt: skip


@pytest.fixture(scope="module")
def xstest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("xstest") / "xstest.csv"
    path.write_text(
        "id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,x\n2,Bake it?,<b>odd,safe,bake,x\n"
        "3,Rob Bob?,contrast_homonyms,unsafe,rob,x\n"
    )
    return path


@pytest.fixture(scope="module")
def steered(root: Path, xstest: Path) -> dict:
    return sfc(*SMALL, "--xstest", xstest, "--json", root=root).result


def test_the_command_ends_with_the_promised_json_and_files(steered: dict, root: Path) -> None:
    assert set(steered) == {
        "preset", "category", "direction", "edit", "units", "positions", "during_reply", "site", "layer", "token",
        "norm", "length", "n_candidates", "n_rejected", "max_loss", "unsteered", "operating_points", "xstest",
        "conditional", "files", "seconds",
    }  # fmt: skip
    assert all((root / path).is_file() for path in steered["files"].values())
    assert set(steered["operating_points"]) == {"force", "suppress"}
    assert all(set(point) == POINT_KEYS for point in steered["operating_points"].values())
    assert steered["operating_points"]["force"]["alpha"] == 0.5
    candidates = pd.read_csv(root / steered["files"]["candidates"], keep_default_na=False)
    assert len(candidates) == steered["n_candidates"] == 2 * 2, "two layers, two tokens of template after the prompt"
    vectors = load_file(root / steered["files"]["vectors"])
    assert set(vectors) == {"chosen", "toxic-safe", "hard-score"}
    assert (vectors["chosen"] == vectors["toxic-safe"]).all()


def test_the_sweep_has_a_row_per_prompt_layer_and_alpha_with_score_and_reply(steered: dict, root: Path) -> None:
    rows = pd.read_csv(root / steered["files"]["sweep"], keep_default_na=False)
    swept = rows[rows["direction"] == "toxic-safe"]
    assert len(swept) == 8 * 2 * 3 == len(swept[["prompt", "layer", "alpha"]].drop_duplicates())
    assert swept["label"].value_counts().to_dict() == {"safe": 24, "toxic": 24}
    still = swept[swept["alpha"] == 0]
    np.testing.assert_allclose(still["score"], still["unsteered_score"], atol=1e-4)
    assert (swept.loc[swept["alpha"] != 0, "score"] - swept.loc[swept["alpha"] != 0, "unsteered_score"]).abs().min() > 0
    controls = rows[rows["direction"] != "toxic-safe"]
    assert controls["direction"].value_counts().to_dict() == dict.fromkeys(
        ["shuffled labels 0", "shuffled labels 1", "shuffled labels 2", "random 0", "random 1"], 8
    )
    assert set(controls["label"].where(controls["alpha"] > 0).dropna()) == {"safe"}
    rates = pd.read_csv(root / steered["files"]["rates"])
    assert len(rates) == 2 * 3 * 2
    for row in rates.to_dict("records"):
        group = swept[(swept[["layer", "alpha", "label"]] == [row["layer"], row["alpha"], row["label"]]).all(axis=1)]
        assert (row["n"], row["score"]) == (len(group), pytest.approx(group["score"].mean(), rel=1e-3))
        assert (row["low"], row["high"]) == pytest.approx(wilson(row["refusals"], row["n"]), abs=1e-5)
    np.testing.assert_allclose(rates.loc[rates["alpha"] == 0, ["loss_rise", "kl"]], 0, atol=1e-5)


def test_xstest_is_counted_by_type_and_alpha(steered: dict, root: Path) -> None:
    assert (steered["xstest"]["n_unsafe"], steered["xstest"]["n_safe"]) == (1, 2)
    types = pd.read_csv(root / steered["files"]["xstest_rates"])
    assert types.groupby("category")["alpha"].nunique().to_dict() == {
        "<b>odd": 3,
        "contrast_homonyms": 3,
        "homonyms": 3,
    }
    points = pd.read_csv(root / steered["files"]["trade_off"])
    assert points["direction"].value_counts().to_dict() == {"toxic-safe": 3, "random 0": 2, "random 1": 2}


def test_the_page_holds_its_figures(steered: dict, root: Path) -> None:
    page = (root / steered["files"]["page"]).read_text(encoding="utf-8")
    assert page.count('class="figure"') == 6


def test_a_condition_leaves_prompts_without_the_feature_as_they_are(root: Path, xstest: Path) -> None:
    few = ("--limit", "8", "--alphas=-2,0,2", "--set", "steering.contrasts=[]", "--layers", "1-1")
    result = sfc(*TINY, *few, *LENIENT, "--when", "best", "--xstest", xstest, "--json", root=root).result
    table = pd.read_csv(root / result["files"]["conditional"])
    assert len(table) == 2 * 3 * (3 + 2), "dials, alphas, and groups of the test prompts and of XSTest"
    steered = table.pivot_table(index=["data", "group", "alpha"], columns="dial", values=["steered", "n"])
    assert (steered["steered"]["unconditional"] == steered["n"]["unconditional"]).all()
    assert (steered["steered"]["conditional"] <= steered["n"]["conditional"]).all()
    facts = result["conditional"]
    assert facts["feature"].startswith("resid_post.") and set(facts["matched"]) == {"test", "xstest"}
    assert facts["holds_on_discovery"]["toxic"] > facts["holds_on_discovery"]["safe"]
    page = (root / result["files"]["page"]).read_text(encoding="utf-8")
    assert page.count('class="figure"') == 7 and "both dials where equally many toxic prompts are refused" in page


OTHERS = {
    "projecting out everywhere": ("--edit", "project-out", "--everywhere", "--positions", "prompt"),
    "clamping in the reply too": ("--edit", "clamp", "--during-reply", "--alphas=0.5", "--positions", "last-2"),
    "a probe, raw": ("--direction", "probe", "--units", "raw", "--layers", "1-1", "--alphas=-1,1"),
    "one category": ("--category", "violence", "--direction", "hard-score", "--alphas=1"),
    "a feature": ("--direction", "resid_post.1/F5", "--alphas=-1,1", "--features"),
    "where a feature fires": ("--when", "resid_post.0/F3", "--alphas=1", "--set", "steering.when_above=0.1"),
    "a circuit": ("--direction", "circuit", "--category", "violence", "--alphas=1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_directions_and_edits(case: str, root: Path) -> None:
    few = ("--limit", "2", "--set", "steering.contrasts=[]")
    result = sfc(*TINY, *few, *LENIENT, *OTHERS[case], "--json", root=root).result
    wanted = {"project-out": {"suppress"}, "clamp": {"force"}}.get(result["edit"])
    assert wanted is None or set(result["operating_points"]) == wanted
    if result["direction"] in ("circuit", "resid_post.1/F5"):
        assert result["token"] is None
        assert all(point["shuffled_highest"] is None for point in result["operating_points"].values())
    if "features" in result["files"]:
        features = pd.read_csv(root / result["files"]["features"])
        assert features["feature"][0] == result["direction"] and features["cosine"][0] == pytest.approx(1)
    writers = pd.read_csv(root / result["files"]["writers"])
    assert writers["share"].sum() == pytest.approx(1, abs=1e-3)


def test_where_no_direction_passes_all_are_listed_with_the_reason(tmp_path: Path) -> None:
    few = ("--set", "steering.contrasts=[]", "--set", "steering.tried_prompts=2", "--set", "steering.min_induced=50")
    assert_one_line(sfc(*TINY, *few, root=tmp_path), "no direction passes, of 4: 4 induces too little")
    table = pd.read_csv(next(tmp_path.rglob("candidates.csv")))
    assert table["rejected"].notna().all() and not list(tmp_path.rglob("manifest.json"))


def test_the_best_defence_raises_one_rate_and_not_the_other() -> None:
    def at(alpha: float, unsafe: int, safe: int) -> pd.DataFrame:
        """Ten prompts a side, of which five unsafe and two safe ones were refused before."""
        sides = [("toxic", unsafe, 5), ("safe", safe, 2)]
        return pd.concat(
            [
                pd.DataFrame(
                    {
                        "direction": "d", "alpha": alpha, "label": label, "refused": np.arange(10) < refused,
                        "unsteered_refused": np.arange(10) < before,
                    }
                )
                for label, refused, before in sides
            ]
        )  # fmt: skip

    curve = trade_off(pd.concat([at(0.0, 5, 2), at(0.1, 7, 2), at(0.2, 7, 1), at(0.3, 9, 3), at(-0.1, 4, 0)]))
    assert best_defence(curve) == 0.2
    (third,) = curve[curve["alpha"] == 0.3].to_dict("records")
    assert (third["unsafe"], third["safe"], third["unsafe_unsteered"]) == (0.9, 0.3, 0.5)
    assert best_defence(curve[curve["alpha"] != 0.2]) == 0.1
    assert best_defence(curve[~curve["alpha"].isin([0.1, 0.2])]) is None


def test_a_contrast_that_cannot_be_made_is_left_out_of_the_comparison_and_said(root: Path) -> None:
    few = ("--limit", "2", "--alphas=1", "--set", "steering.contrasts=[refused-complied]")
    finished = sfc(*TINY, *few, *LENIENT, "--json", root=root)
    assert "left out of the comparison: the contrast refused-complied has 0 against" in finished.stderr
    directions = pd.read_csv(root / finished.result["files"]["directions"])
    assert directions["direction"].tolist() == ["toxic-safe"]
    assert_one_line(sfc(*TINY, *few, *LENIENT, "--direction", "refused-complied", root=root), "has 0 against")

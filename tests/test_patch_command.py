"""`sfc patch` as a user types it, on the tiny preset, and its page."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import assert_one_line, sfc

from sfc.behaviors.behavior import Words
from sfc.core.artifacts import write_csv, write_json
from sfc.models.judge import is_refusal, judged_somewhere
from sfc.pages.html import page_html
from sfc.studies.patch.page import heads_figure, positions_figure
from sfc.studies.patch.ranking import Patch, PatchRuns, agreement, effect_table, single_patches
from sfc.studies.study import STUDIES, Finished

TINY = ("patch", "--preset", "tiny")
BY_SCORE = (*TINY, "--require", "score", "--limit", "12")
KEYS = {
    "preset", "pairs", "require", "n_layers", "n_tried", "n_pairs", "lost", "n_pairs_at", "wrappers", "clean_score",
    "corrupted_score", "n_components", "n_critical", "critical", "agreement", "files", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def patched(root: Path) -> dict:
    return sfc(
        *BY_SCORE, "--positions", "content,suffix,content[0],suffix[-1]", "--cumulative", "--json", root=root
    ).result


def test_the_command_ends_with_the_promised_json_and_files(patched: dict, root: Path) -> None:
    assert set(patched) == KEYS
    assert patched["n_tried"] == 12 == patched["n_pairs"] + sum(patched["lost"].values())
    assert all((root / path).is_file() for path in patched["files"].values())
    effects = pd.read_csv(root / patched["files"]["effects"])
    assert set(effects["kind"]) == {"resid", "attn", "mlp", "head"}
    assert set(effects["direction"]) == {"denoise", "noise"}
    singles = effects[~effects["is_range"]]
    n_sets = effects["positions"].nunique()
    assert len(singles) == patched["n_components"] == 2 * n_sets * (2 * 3 + 2 * 4)
    assert len(effects) - len(singles) == 2 * n_sets * 3
    assert {"content", "content[0]", "suffix[-1]"} <= set(effects["positions"])
    last = singles[(singles["component"] == "resid.1") & (singles["positions"] == "suffix[-1]")]
    assert last["effect"].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert not (singles["low"] > singles["effect"] + 1e-6).any() and singles["low"].notna().any()
    assert not (singles["effect"] > singles["high"] + 1e-6).any()


def test_effects_that_cannot_be_measured_are_not_critical(root: Path) -> None:
    unmeasurable = ("--set", "evaluation.min_denominator=9.0e+15", "--component", "resid")
    result = sfc("patch", "--preset", "tiny", "--require", "score", *unmeasurable, "--json", root=root).result
    effects = pd.read_csv(root / result["files"]["effects"])
    assert effects["effect"].isna().all() and (effects["q_value"] <= 0.05).any()
    assert result["n_critical"] == 0 and result["critical"] == []


def test_pairs_that_cannot_be_aligned_somewhere_are_counted_and_named(patched: dict, root: Path) -> None:
    pairs = pd.read_csv(root / patched["files"]["pairs"], keep_default_na=False)
    assert len(pairs) == 12
    used = pairs[pairs["used"]]
    assert len(used) == patched["n_pairs"] == patched["n_pairs_at"]["suffix[-1]"]
    unaligned = used["unaligned"].str.contains("content: ")
    assert 0 < unaligned.sum() == len(used) - patched["n_pairs_at"]["content"]
    assert pairs.loc[~pairs["used"], "lost"].value_counts().to_dict() == patched["lost"]


def test_the_effects_are_those_of_the_scores(patched: dict, root: Path) -> None:
    scores = pd.read_csv(root / patched["files"]["scores"])
    effects = pd.read_csv(root / patched["files"]["effects"])
    keys = ["direction", "positions", "component"]
    for column, changed in (("effect", "patched"), ("attribution", "attribution")):
        moved = scores.assign(change=scores[changed] - scores["base"], gap=scores["source"] - scores["base"])
        sums = moved.groupby(keys)[["change", "gap"]].sum(min_count=1)
        expected = (sums["change"] / sums["gap"]).loc[[tuple(row) for row in effects[keys].to_numpy()]]
        np.testing.assert_allclose(effects[column], expected, atol=2e-3)


def test_the_page_holds_its_figures_and_says_how_pairs_were_chosen(patched: dict, root: Path) -> None:
    page = (root / patched["files"]["page"]).read_text(encoding="utf-8")
    assert "NOT read" in page and "content[0]" in page and "resid.1" in page
    assert page.count('class="figure"') == 2 * 2 + 2, "positions and heads in both directions, ranges, agreement"


def test_wrapped_pairs_and_a_choice_of_everything(root: Path) -> None:
    options = ("--component", "head,mlp", "--direction", "noise", "--layers", "1-1", "--category", "violence")
    result = sfc(*BY_SCORE, "--pairs", "wrapped", *options, "--json", root=root).result
    assert list(result["n_pairs_at"]) == ["last"] and sum(result["wrappers"].values()) == result["n_pairs"] > 0
    effects = pd.read_csv(root / result["files"]["effects"])
    assert sorted(effects["component"]) == ["head.1.0", "head.1.1", "head.1.2", "head.1.3", "mlp.1"]
    assert set(effects["direction"]) == {"noise"}


def test_pairs_and_wrappers_of_ones_own(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"toxic": "Rob", "safe": "Bob"}\n{"toxic": "Bob", "safe": "Rob"}\n')
    result = sfc(*BY_SCORE, "--pairs", tmp_path / "mine.jsonl", "--positions", "each", "--json", root=root).result
    assert (result["n_tried"], result["n_pairs"]) == (2, 1)
    assert list(result["n_pairs_at"]) == ["content[0]", "content[1]", "content[-1]", "suffix[-2]", "suffix[-1]"]
    assert result["critical"] == [], "one pair proves nothing"
    (tmp_path / "wrap.csv").write_text("name,template\nodd,Zz {prompt} zZ\n")
    options = ("--pairs", "wrapped", "--wrappers", tmp_path / "wrap.csv", "--json")
    assert set(sfc(*BY_SCORE, *options, root=root).result["wrappers"]) <= {"odd"}


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["toxic-safe", "wrapped"])
def test_pairs_of_the_embedded_model_are_those_it_was_judged_to_treat_differently(pairs: str, tmp_path: Path) -> None:
    options = ("--component", "resid", "--layers", "15,29", "--direction", "denoise", "--positions", "last")
    result = sfc("patch", "--pairs", pairs, "--limit", "5", *options, "--json", root=tmp_path).result
    table = pd.read_csv(result["files"]["pairs"], keep_default_na=False)
    used = table[table["used"]]
    assert 0 < len(used) == result["n_pairs"] and result["require"] == "behaviour"
    assert all(is_refusal(reply) for reply in used["clean_reply"])
    assert not any(judged_somewhere(is_refusal, reply) for reply in used["prefill"] + used["corrupted_reply"])
    assert (table["lost"] != "").sum() == sum(result["lost"].values()) == 5 - len(used)
    effects = pd.read_csv(result["files"]["effects"]).set_index("component")["effect"]
    assert effects["resid.29"] == pytest.approx(1, abs=1e-3) and 0 < effects["resid.15"] < 1


def test_where_the_model_never_refuses_no_pair_is_used_and_the_way_out_is_named(tmp_path: Path) -> None:
    finished = sfc(*TINY, "--limit", "3", "--set", "patching.reply_tokens=4", root=tmp_path)
    assert_one_line(
        finished, "no pair can be used: 3 pairs tried", "3: the clean prompt was not refused", "--require score"
    )
    assert not list(tmp_path.rglob("manifest.json"))
    pairs = pd.read_csv(next(tmp_path.rglob("pairs.csv")))
    assert not pairs["used"].any() and pairs["clean_reply"].notna().all()


def _page(tmp_path: Path, gaps: np.ndarray, positions: str) -> str:
    random = np.random.default_rng(0)
    patches = [Patch("mlp", 0, 0), Patch("head", 0, 0, 0), Patch("mlp", 0, 1)]
    patched = random.normal(size=(3, len(gaps)))
    runs = PatchRuns("denoise", positions, patches, [0, 1, 2], np.zeros(3), gaps, patched, patched)
    effects = effect_table([runs], 200, 1000, 0.5, 0)
    folder = tmp_path / "patching-page-12345678"
    folder.mkdir()
    write_csv(folder / "effects.csv", effects, digits=6)
    result = {
        "preset": "<script>", "pairs": "</script><b>", "require": "behaviour", "n_tried": 4, "n_pairs": 3,
        "lost": {"<i>no</i>": 1}, "clean_score": 1.0, "corrupted_score": -1.0, "n_critical": 1, "n_components": 2,
        "n_pairs_at": {positions: 3}, "critical": [], "agreement": agreement(effects).to_dict("records"),
    }  # fmt: skip
    write_json(folder / "result.json", result)
    return page_html(STUDIES["patch"].page(Finished(folder, {"words": Words()._asdict()})))


def test_maps_stand_in_the_order_of_heads_layers_and_positions_and_not_of_effects() -> None:
    random = np.random.default_rng(0)
    patches = single_patches(["mlp", "head"], range(3), 4)
    sets, n = ["suffix", "last", "all"], len(patches)
    runs = [
        PatchRuns("noise", name, patches, [0, 1], np.zeros(2), np.ones(2), random.normal(size=(n, 2)), np.zeros((n, 2)))
        for name in sets
    ]
    effects = effect_table(runs, 200, 1000, 0.5, 0)
    (by_position,) = positions_figure(effects, "noise", sets).data
    assert list(by_position.x) == sets and list(by_position.y) == [0, 1, 2]
    for run, heat_map in zip(runs, heads_figure(effects, "noise", sets).data, strict=True):
        assert list(heat_map.x) == [0, 1, 2, 3] and list(heat_map.y) == [0, 1, 2]
        np.testing.assert_allclose(np.array(heat_map.z, dtype=float), run.patched[3:].mean(1).reshape(3, 4))
    expected = np.stack([run.patched[:3].mean(1) for run in runs], axis=1)
    np.testing.assert_allclose(np.array(by_position.z, dtype=float), expected)


def test_the_page_of_effects_that_cannot_be_measured(tmp_path: Path) -> None:
    page = _page(tmp_path, np.full(3, 0.01), "last")
    assert "not measurable" in page
    for part in page.split('<script type="application/json"')[1:]:
        assert json.loads(part[part.index(">") + 1 : part.index("</script>")])

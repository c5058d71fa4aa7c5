"""Comparing circuits: measures by hand, verdicts on cases whose answer is known, and the command."""

import json
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import assert_one_line, sfc
from hypothesis import given
from hypothesis import strategies as st

from sfc.circuits.problem import Problem
from sfc.circuits.proof import pair_numbers
from sfc.circuits.stability import chance_overlap
from sfc.core.experiments import load_experiment
from sfc.run import Run
from sfc.session import Session
from sfc.studies.compare.measure import CORE, OWN, REST, problems
from sfc.studies.compare.overlap import (
    TRANSFER_MEASURES,
    Overlaps,
    Verdict,
    cluster,
    jaccard,
    measured_transfer,
    overlap_in_words,
    shared_core,
    transfer_in_words,
    verdict,
    weighted_overlap,
    with_recovered,
)

weights = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 10))


def test_overlaps_by_hand() -> None:
    a, b = {"x": 3.0, "y": 1.0}, {"y": 1.0, "z": 1.0}
    assert jaccard(a, b) == pytest.approx(1 / 3)
    # shares: a has x 0.75, y 0.25; b has y 0.5, z 0.5
    assert weighted_overlap(a, b) == pytest.approx(0.25 / (0.75 + 0.5 + 0.5))
    assert jaccard({}, {}) == weighted_overlap({}, {}) == 1
    assert weighted_overlap(a, {}) == weighted_overlap(a, {"x": 0.0}) == 0


@given(weights, weights, st.floats(0.1, 10))
def test_overlaps_are_symmetric_and_weights_may_be_scaled(a: dict, b: dict, factor: float) -> None:
    scaled = {name: factor * weight for name, weight in a.items()}
    for measure in (jaccard, weighted_overlap):
        assert measure(a, b) == pytest.approx(measure(b, a))
        assert measure(a, b) == pytest.approx(measure(scaled, b))
        assert 0 <= measure(a, b) <= 1 and measure(a, a) == pytest.approx(1)


def test_overlap_by_chance_is_that_of_random_circuits() -> None:
    counts, widths = np.array([10, 4]), np.array([40, 8])
    random = np.random.default_rng(0)

    def circuit() -> dict[str, float]:
        picks = [(site, int(n)) for site in (0, 1) for n in random.permutation(widths[site])[: counts[site]]]
        return {str(pick): 1.0 for pick in picks}

    drawn = np.mean([jaccard(circuit(), circuit()) for _ in range(2000)])
    assert chance_overlap(counts, widths) == pytest.approx(drawn, rel=0.05)


def _overlaps(within: float, between: float, chance: float | None = None) -> Overlaps:
    noise = np.random.default_rng(0).normal(0, 0.01, (8, 8))
    table = np.where(np.eye(8, dtype=bool), within, between) + (noise + noise.T) / 2
    return Overlaps(np.diag(table), table, np.array([0.5, 0.7]), chance)


@pytest.mark.parametrize(
    ("overlaps", "words"),
    [
        (_overlaps(0.6, 0.6), "Nothing here tells"),
        (_overlaps(0.6, 0.5), "The circuits of two categories share most"),
        (_overlaps(0.6, 0.1), "The circuits of two categories share less than half"),
        (_overlaps(0.06, 0.01, chance=0.05), "Not answerable"),
    ],
)
def test_verdicts(overlaps: Overlaps, words: str) -> None:
    found = verdict(overlaps, seed=0)
    assert found.words.startswith(words)
    assert found.difference_low <= found.difference <= found.difference_high
    assert found.shuffled == pytest.approx(0.6)
    assert found.within == pytest.approx(overlaps.within.mean()) and found.difference == found.within - found.between


def test_the_most_alike_are_joined_first() -> None:
    merges = cluster(np.array([[0.2, 0.8, 0.1], [0.8, 0.9, 0.3], [0.1, 0.3, 0.4]]))
    assert merges[0, :2].tolist() == [0, 1]
    assert merges[:, 2] == pytest.approx([0.2, 0.8])


def test_the_core_is_in_more_than_half_of_the_circuits() -> None:
    circuits = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}, {"c": 1.0}]
    assert shared_core(circuits) == ["a"]


def test_halves_are_disjoint_and_joined_prompts_are_numbered_on(problem: Problem) -> None:
    runs = problem.runs

    def texts(part) -> list[tuple[int, ...]]:
        return [tuple(batch.ids[row].tolist()) for batch in part.batches for row in range(len(batch.prompts))]

    halves = runs.halves(0)
    assert sorted(texts(halves[0]) + texts(halves[1])) == sorted(texts(runs))
    assert [half.n_prompts for half in halves] == [3, 3]
    joined = halves[0].joined(halves[1])
    assert sorted(int(number) for batch in joined.batches for number in batch.prompts) == list(range(6))
    assert texts(joined) == texts(halves[0]) + texts(halves[1])


def _transfer(own: float, other: float, figure: str) -> pd.DataFrame:
    """Ten categories; a figure of each circuit on its own prompts, and on those of the others, which vary a little."""
    rows = [
        {"circuit": a, "prompts": b, figure: own + 0.01 * b if a == b else other + 0.01 * b}
        for a in range(10)
        for b in range(10)
    ]
    unmeasured = {name: np.nan for name in ("recovered_toxic", "recovered_safe", *TRANSFER_MEASURES) if name != figure}
    return pd.DataFrame(rows).assign(**unmeasured).drop(columns="recovered")


def test_transfer_by_hand() -> None:
    found = measured_transfer(_transfer(0.5, 0.3, "gap_kept"), seed=0)
    assert set(found) == {"gap_kept"}, "what is not measured is left out"
    assert found["gap_kept"].own == pytest.approx(0.545) and found["gap_kept"].other == pytest.approx(0.345)
    assert found["gap_kept"].difference == pytest.approx(0.2)
    assert found["gap_kept"].difference_low == pytest.approx(0.2) == found["gap_kept"].difference_high
    told = transfer_in_words(found)
    assert "(difference 0.20, 95 % interval over categories 0.20 to 0.20)" in told
    assert "do not tell the two sides apart" not in told


def test_the_lesser_direction_counts() -> None:
    rows = pd.DataFrame({"recovered_toxic": [1.0, 0.4, 0.9], "recovered_safe": [0.0, 0.6, np.nan]})
    assert with_recovered(rows)["recovered"].tolist() == pytest.approx([0, 0.4, np.nan], nan_ok=True)


def test_nothing_that_a_constant_refuser_has_makes_a_claim() -> None:
    """It is faithful on every category's prompts, restores one direction, and keeps nothing of the gap."""
    cheat = _transfer(0.0, 0.0, "gap_kept").assign(
        gap_kept=0.0, faithfulness=1.0, recovered_toxic=1.0, recovered_safe=0.0
    )
    told = transfer_in_words(measured_transfer(cheat, seed=0))
    assert told.startswith("The circuits do not tell the two sides apart") and "faithfulness" not in told
    only_faithful = measured_transfer(_transfer(1.0, 1.0, "faithfulness"), seed=0)
    assert transfer_in_words(only_faithful).startswith("Whether these circuits decide is not measurable")


FEW = (
    "compare", "--preset", "tiny", "--size", 20, "--json",
    "--set", "comparison.shuffles=1", "--set", "comparison.edges=30", "--set", "comparison.replies=2",
    "--set", "evaluation.min_denominator=1e-6", "--set", "learned_mask.steps=3",
)  # fmt: skip
COMPARE = (
    *FEW, "--categories", "violence,privacy,hate",
    "--set", "discovery.baseline=safe-mean", "--set", "evaluation.error_mode=node",
)  # fmt: skip


@pytest.fixture(scope="module")
def compared(root: Path) -> dict:
    return sfc(*COMPARE, root=root).result


def test_other_measures_are_told_beside_shared_nodes() -> None:
    alike = Verdict(0.6, 0.5, None, None, 0.1, -0.1, 0.3, "Alike.")
    assert overlap_in_words({"jaccard": alike}) == "Alike."
    apart = alike._replace(within=0.7, difference_low=0.15, difference_high=0.25)
    told = "Alike. The same by other measures: edges, Jaccard 0.70 and 0.50 (difference 0.15 to 0.25)."
    assert overlap_in_words({"jaccard": alike, "edge_jaccard": apart}) == told


def test_the_command_compares_all_pairs(compared: dict, root: Path) -> None:
    overlap, transfer, core = (pd.read_csv(compared["files"][name]) for name in ("overlap", "transfer", "core"))
    assert len(overlap) == 6 and len(transfer) == 9 and len(core) == 9
    own = overlap[overlap["a"] == overlap["b"]]
    assert (own["jaccard"] == 1).all() and (own["jaccard_halves"] < 1).all()
    assert compared["overlap"]["jaccard"]["within"] == pytest.approx(own["jaccard_halves"].mean())
    different = overlap[overlap["a"] != overlap["b"]]
    assert compared["overlap"]["jaccard"]["between"] == pytest.approx(different["jaccard_halves"].mean())
    assert set(compared["overlap"]) == {"jaccard", "weighted", "edge_jaccard", "edge_weighted"}
    assert (own["edge_weighted"] == 1).all() and compared["overlap"]["edge_jaccard"]["within"] <= 1
    page = Path(compared["files"]["page"]).read_text()
    assert escape(compared["verdict"]) in page and "edges, weighted by their effects" in page
    rankings = Path(compared["files"]["result"]).parent / "rankings"
    assert len(list(rankings.iterdir())) == 11


def test_edges_join_the_circuits_own_nodes(compared: dict) -> None:
    for path in (Path(compared["files"]["result"]).parent / "rankings").iterdir():
        circuit = json.loads(path.read_text())
        assert 0 < len(circuit["edges"]) <= 30
        assert all(set(name.split(" -> ")) <= set(circuit["nodes"]) for name in circuit["edges"])
        assert list(circuit["edges"].values()) == sorted(circuit["edges"].values(), reverse=True)


def test_the_core_the_rest_and_the_circuit_are_ablated_in_scores_and_replies(compared: dict) -> None:
    core, transfer = pd.read_csv(compared["files"]["core"]), pd.read_csv(compared["files"]["transfer"])
    for _, rows in core.groupby("prompts"):
        shared, rest, whole = (rows[rows["circuit"] == name].iloc[0] for name in (CORE, REST, OWN))
        assert whole["nodes"] == 20 and rest["nodes"] >= 20 - shared["nodes"]
        assert shared["nodes"] == len(compared["core_nodes"])
        in_transfer = transfer[(transfer["circuit"] == whole["prompts"]) & (transfer["prompts"] == whole["prompts"])]
        assert in_transfer.iloc[0]["completeness"] == pytest.approx(whole["completeness"])
        assert (rows["refused_ablated_low"] <= rows["refused_ablated"]).all() and rows["refused"].nunique() == 1
        assert (rows["n_refused"] == 2).all() and (rows["n_refused_safe"] == 2).all()
        assert (rows["refused_safe_alone_low"] <= rows["refused_safe_alone"]).all()


def test_every_circuit_is_judged_on_both_sides_of_every_categorys_prompts(compared: dict, root: Path) -> None:
    transfer, core = (pd.read_csv(compared["files"][name]) for name in ("transfer", "core"))
    for _, rows in transfer.groupby("prompts"):
        assert rows["separation_model"].nunique() == 1 and rows["separation"].notna().all()
        own = core[(core["circuit"] == OWN) & (core["prompts"] == rows["prompts"].iloc[0])].iloc[0]
        [in_transfer] = rows[rows["circuit"] == own["prompts"]].to_dict("records")
        assert in_transfer["separation"] == own["separation"]
    assert transfer["agreement"].isna().all(), "there are no pairs"
    assert set(compared["transfer"]) <= {"gap_kept", "separation", "faithfulness"}
    own = transfer[transfer["circuit"] == transfer["prompts"]]["separation"]
    assert compared["transfer"]["separation"]["own"] == pytest.approx(own.mean(), abs=1e-4)
    assert "mechanism" not in compared["verdict"] + Path(compared["files"]["page"]).read_text()


def test_against_counterfactuals_halves_share_no_prompt(root: Path) -> None:
    run = Run(load_experiment("tiny"), root)
    session = Session(run)
    found = dict(problems(session, ("violence",), {"violence", "violence-half-0", "violence-half-1"}))
    found |= problems(session, ("privacy", "violence"), {"privacy-violence-half-0", "privacy-violence-half-1"})
    frame = run.prompts.frame.set_index("id")
    explained = {name: set(problem.pair_table["id"][pair_numbers(problem.runs)]) for name, problem in found.items()}
    for name in ("violence", "privacy-violence"):
        first, second = (found[f"{name}-half-{half}"] for half in (0, 1))
        seen = [
            {
                prompt
                for side in ("id", "counterfactual")
                for prompt in problem.pair_table[side][pair_numbers(problem.runs)]
                if frame.loc[prompt, "category"] in name.split("-")
            }
            for problem in (first, second)
        ]
        assert seen[0] and seen[1] and seen[0].isdisjoint(seen[1])
    categories = {name: set(frame.loc[list(ids), "category"]) for name, ids in explained.items()}
    assert categories["violence-half-0"] == categories["violence"] == {"violence"}
    assert categories["privacy-violence-half-0"] == {"privacy", "violence"}
    assert len(explained["violence-half-0"] | explained["violence-half-1"]) > len(explained["violence"]) / 2


def test_categories_are_compared_against_counterfactuals(compared: dict, root: Path) -> None:
    against = sfc(*FEW, "--categories", "violence,privacy", root=root).result
    transfer, by_means = (pd.read_csv(each["files"]["transfer"]) for each in (against, compared))
    assert len(transfer) == 4 and transfer["kl_recovered_toxic"].notna().any()
    by_model = by_means.groupby("prompts")["separation_model"].first()
    assert transfer["separation_model"].to_numpy() == pytest.approx(by_model[transfer["prompts"]].to_numpy())
    rankings = Path(against["files"]["result"]).parent / "rankings"
    assert len(list(rankings.iterdir())) == 8


def test_an_interrupted_comparison_goes_on_with_the_circuits_that_are_missing(compared: dict, root: Path) -> None:
    folder = Path(compared["files"]["result"]).parent
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "rankings").iterdir()}
    (folder / "manifest.json").unlink()
    (folder / "rankings" / "privacy-half-0.json").unlink()
    (folder / "judged" / "hate.json").unlink()
    again = sfc(*COMPARE, root=root)
    assert {**again.result, "seconds": 0} == {**compared, "seconds": 0}
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "rankings").iterdir()}
    assert {name for name, time in after.items() if before[name] != time} == {"privacy-half-0.json"}
    assert json.loads((folder / "rankings" / "privacy-half-0.json").read_text())


def test_a_damaged_part_is_one_clear_line(compared: dict, root: Path) -> None:
    folder = Path(compared["files"]["result"]).parent
    manifest, part = folder / "manifest.json", folder / "rankings" / "hate.json"
    texts = {path: path.read_text() for path in (manifest, part)}
    manifest.unlink()
    part.write_text('{"nodes": ["resid_post.0/F1"]}')
    assert_one_line(sfc(*COMPARE, root=root), "hate.json", "nodes")
    for path, text in texts.items():
        path.write_text(text)

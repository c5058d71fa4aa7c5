"""The benchmarks: their harness, and each program end to end on a problem of a few seconds."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import discovery
import evaluation
import harness
import methods
import patching
import planted
import planted_cheats
import planted_learned
import rehearsal
import sae_training
from planted_superposed import Superposition
from sae_trainers import Problem, ours, saelens_tuned

from sfc.circuits.methods import METHODS
from sfc.circuits.problem import Problem as DiscoveryProblem

TINY = ["--d-in", "16", "--batch", "64", "--k", "4", "--rounds", "2", "--burst", "2", "--steps", "12", "--threads", "1"]
PROBLEM = Problem(d_in=16, d_sae=128, k=4, batch=64, device="cpu")


def test_turns_are_taken_in_rounds() -> None:
    order: list[str] = []
    seconds = harness.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, burst=3)
    assert order == list("aaaabbbb" * 3)  # one call untimed and three timed, a round to warm up and two that count
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_busy_spell_does_not_change_a_paired_ratio() -> None:
    assert harness.paired_ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == 2.0


def test_a_table_in_markdown() -> None:
    text = harness.markdown_table(("name", "x", "n"), [("a", 0.25, 12345), ("b", 1234.5, None), ("c", 12.345, 1)])
    assert text.splitlines() == [
        "| name | x | n |",
        "| --- | ---: | ---: |",
        "| a | 0.2500 | 12,345 |",
        "| b | 1,234 |  |",
        "| c | 12.35 | 1 |",
    ]


def test_a_peer_that_is_not_installed_is_named_with_the_way_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.peer("a_peer_that_nobody_has") is None
    assert "a_peer_that_nobody_has" in (said := capsys.readouterr().err) and harness.INSTALL in said


def test_without_json_only_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    harness.emit("a table", {"ratio": 1.0}, as_json=False)
    assert capsys.readouterr().out == "a table\n"


def test_rows_are_like_a_residual_stream() -> None:
    problem = PROBLEM._replace(d_in=64, d_sae=512, batch=4096)
    rows = next(sae_training.residual_rows(problem, seed=0))
    again, other = (next(sae_training.residual_rows(problem, seed)) for seed in (0, 1))
    assert torch.equal(rows, again) and not torch.equal(rows, other)
    offset_share = (rows.mean(dim=0).square().sum() / rows.square().sum(dim=1).mean()).item()
    assert 0.3 < offset_share < 0.8 and 150 < rows.norm(dim=1).mean() < 450
    spectrum = torch.linalg.eigvalsh(rows.T.cov()).flip(0)
    assert spectrum[:6].sum() > 0.4 * spectrum.sum()  # of 64


@pytest.mark.parametrize("build", [partial(ours, matryoshka=[]), saelens_tuned], ids=["ours", "SAELens"])
def test_a_contender_learns_and_reconstructs_in_the_units_of_its_rows(build) -> None:
    stream = sae_training.residual_rows(PROBLEM, seed=0)
    contender = build(PROBLEM, next(stream), 100, 0)
    rows = next(stream)

    @torch.no_grad()
    def error() -> float:
        return (rows - contender.reconstruct(rows)).norm().item() / rows.norm().item()

    before = error()
    for _ in range(100):
        contender.step(next(stream))
    # A start at centroids reconstructs a good part already.
    assert error() < 0.85 * before and error() < 0.5


def test_sae_training_prints_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    sae_training.main(["--quick", "--json", "--seeds", "2", *TINY])
    *others, last = capsys.readouterr().out.splitlines()
    assert others == []
    figures = json.loads(last)
    assert figures["problem"] == PROBLEM._asdict()
    ratios = {name: figures[name] for name in ("ratio_saelens", "ratio_dictionary_learning", "ratio_sparsify")}
    timed = figures["tokens_per_second"]
    assert set(timed) >= {"sfc", "SAELens", "floor"}
    for name, ratio in ratios.items():
        installed = name.removeprefix("ratio_") in {measured.lower() for measured in timed}
        assert ratio > 0 if installed else ratio is None
    assert 0 < figures["fraction_of_floor"] < 1
    assert all(math.isclose(timed[name] * ms, 64_000) for name, ms in figures["ms_per_step"].items())
    assert {name: len(values) for name, values in figures["fvu"].items()} == {
        "sfc": 2, "SAELens": 2, "SAELens, tuned": 2,
    }  # fmt: skip
    assert figures["fvu_ratio"] > 0 and figures["fvu_tokens"] == 12 * 64


def test_discovery_measures_what_has_an_aim_and_its_two_ways_to_an_edge_agree(problem: DiscoveryProblem) -> None:
    figures = discovery.measure(problem, discovery.Effort(rounds=2, prompts=6, mask_steps=3), "cpu")
    assert all(math.isfinite(value) for value in figures.values())
    assert all(figures[name] > 0 for name in ("attribution_units", "edge_units", "edge_speedup", "mask_seconds"))
    assert figures["edge_nodes"] == problem.ablation.nodes.n_nodes < discovery.NODES
    assert figures["edge_targets"] == problem.ablation.nodes.sizes[1] and figures["prompts"] == 6
    assert "extrapolated from 3 steps" in discovery.report(figures)


def test_edges_are_measured_among_equally_many_nodes_of_each_site(problem: DiscoveryProblem) -> None:
    strongest = discovery.strongest_everywhere(problem, 20)
    ranking = METHODS["attribution"].rank(problem).ranking.tolist()
    for site, here in enumerate(strongest):
        at_site = [node for node in ranking if problem.ablation.nodes.site_numbers[node] == site]
        assert here.tolist() == at_site[:10]


def test_evaluation_gives_the_scores_of_hooks_on_the_whole_model(problem: DiscoveryProblem) -> None:
    figures = evaluation.measure(problem, problem.runs.batches, rounds=2, device="cpu")
    assert min(figures["units_with_complements"], figures["units"], figures["ratio_hooks"]) > 0
    assert figures["largest_difference"] <= evaluation.TOLERANCE and figures["prompts"] == 6
    assert len(figures["sizes"]) == evaluation.CIRCUITS and figures["sizes"][-1] == problem.ablation.nodes.n_nodes
    assert figures["sizes"] == sorted(set(figures["sizes"]))
    assert set(figures["seconds"]) == set(figures["seconds_by_round"])
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert "6 prompts" in evaluation.report(figures)


def test_methods_are_judged_by_one_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["relevance", "greedy-filtering", "magnitude"]
    options = ["--json", "--preset", "tiny", "--root", str(tmp_path), "--category", "privacy"]
    methods.main([*options, "--methods", ",".join(names), "--set", "evaluation.sizes=[5, 20]"])
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert [row["method"] for row in rows] == names
    for row in rows:
        assert 1 <= row["size"] <= row["ranked"] and row["seconds"] > 0 and row["passes"] > 0
        assert {"recovered_toxic", "recovered_safe", "agreement", "prompt_free", "on_discovery"} <= set(row)
    assert methods.report(rows).splitlines()[0].startswith("| method | size")


def test_a_preset_is_rehearsed_on_its_real_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shrunk = ["--preset", "pythia-70m", "--layers", "1", "--sites", "1", "--scale", "0.0001", "--width", "64"]
    rehearsal.main([*shrunk, "--stages", "collect", "train", "--processes", "2", "--scratch", str(tmp_path), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] > 2 * 50304 * 512 and figures["shares"]["layers"] == pytest.approx(1 / 6)
    for stage in figures["stages"]:
        assert stage["error"] is None, stage
        assert stage["host_bytes"] > 10**8 and stage["written_bytes"] > 10**5 and stage["device_bytes"] is None
        assert stage["whole_seconds"] > stage["seconds"] > 0
    assert 0 < figures["stages"][0]["of_floor"] <= 1
    assert list(tmp_path.iterdir()) == [], "model and artifacts are deleted"


def test_a_disagreement_of_the_two_ways_is_no_figure(
    problem: DiscoveryProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="scores differ"):
        evaluation.measure(problem, problem.runs.batches, rounds=1, device="cpu")


def test_patching_gives_the_scores_of_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    patching.main(["--quick", "--json", "--preset", "tiny"])
    *others, last = capsys.readouterr().out.splitlines()
    assert others == []
    figures = json.loads(last)
    assert figures["ratio_loop"] > 0 and figures["largest_difference"] < 1e-4
    assert figures["pairs"] == 6 and figures["heads"] == {"sfc": 3, "loop": 4}
    per_head = figures["seconds_per_head"]["sfc"] * figures["heads"]["sfc"]
    assert math.isclose(figures["seconds_all_heads"], per_head)


def test_planted_prints_a_table_and_ratios_of_each_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = planted_learned.Setting(Superposition(80, 2), expansion=1, k=4, steps=2, prompts=80, mask_steps=2)
    monkeypatch.setattr(planted, "KINDS", {"chain": planted.KINDS["chain"], "or": planted.KINDS["or"]})
    monkeypatch.setattr(planted, "HARD", {"or": planted.HARD["or"]})
    monkeypatch.setattr(planted, "CHEAT_METHODS", ["attribution", "magnitude"])
    monkeypatch.setattr(planted_cheats, "PROMPTS", 4)
    monkeypatch.setattr(planted_learned, "QUICK_SETTINGS", [setting])
    planted.main(["--quick", "--json"])
    said = capsys.readouterr()
    *others, last = said.out.splitlines()
    assert others == []
    figures = json.loads(last)
    assert figures["learned-mask"]["node_recall_min"] == 1 and set(figures["hard"]) == {"or"}
    by_method = [row["method"] for row in figures["cheats"]]
    assert by_method == ["attribution", "magnitude", "attribution"], "what is not causal is asked once"
    assert [(row["training"], row["dictionaries"]) for row in figures["learned"]] == [
        (training, dictionaries)
        for training in ("kmeans", "random", "kmeans, Matryoshka")
        for dictionaries in ("learned", "random")
    ]
    for row in [*figures["cheats"], *figures["learned"]]:
        assert 0 <= row["precision"] <= 1 and 0 <= row["separation"] <= 1 and row["prompt_free"] is not None
    for title in ("Nodes: precision / recall, means", "Cheats", "Learned dictionaries"):
        assert f"{title}\n" in said.err

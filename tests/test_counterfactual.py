"""Counterfactual pairs: read, split, aligned, scored, and `sfc discover --pairs` on the tiny preset."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from commands import assert_one_line, sfc
from hypothesis import given
from hypothesis import strategies as st
from test_cli import RESULT_KEYS

from sfc.circuits.baselines import check_covered
from sfc.circuits.faithfulness import ablated_scores, full_scores
from sfc.circuits.options import DiscoveryOptions
from sfc.circuits.problem import Problem, PromptRuns
from sfc.core.config import PromptsConfig
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.data.pairs import aligned, load_counterfactuals, prompts_of
from sfc.data.render import Role
from sfc.models.batches import Batch, TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.running import last_logits
from sfc.models.score import AnswerDifference, score_batch
from sfc.run import Run
from sfc.saes.store import read_prompts
from sfc.session import Session
from sfc.studies.discover.problem import prepare_problem

CONFIG = PromptsConfig()  # pyright: ignore[reportCallIssue]
WORDS = ["cat", "dog", "sun", "hat", "cup", "pen", "box", "map", "key", "jar"]
LONGER = ["A house here", "A pub here"]
UNLIKE = ["A house", "A pub"]


def record(clean: str, patch: str, clean_answer: str = "!", patch_answer: str = "?", case: str = "") -> dict[str, str]:
    answers = {"clean_answer": clean_answer, "patch_answer": patch_answer}
    return {"clean_prefix": clean, "patch_prefix": patch, **answers, "case": case}


RECORDS = [
    *(record(f"My {word}s", f"My {word}z", case="plural") for word in WORDS),
    *(record(f"My {word}z", f"My {word}s", "?", "!", case="singular") for word in WORDS[:6]),
    *(record(f"{article} house in", f"{article} pub in") for article in ("A", "The", "One", "No", "My", "Our")),
    record(*UNLIKE),
]


def written(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def about_pairs(root: Path, file: Path) -> Run:
    return Run.of(
        load_experiment(
            "tiny", ["behavior=pairs", f"pairs.file={file}", "discovery.baseline=paired", "evaluation.error_mode=node"]
        ),
        root,
    )


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("pairs") / "endings.jsonl", RECORDS)


@pytest.fixture(scope="module")
def discovered(root: Path, pairs_file: Path) -> dict:
    options = ("--pairs", pairs_file, "--set", "discovery.baseline=paired")
    return sfc("discover", "--preset", "tiny", *options, "--json", root=root).result


@pytest.fixture(scope="module")
def prepared(discovered: dict, root: Path, pairs_file: Path) -> tuple[Problem, PromptRuns, Mapping]:
    return prepare_problem(Session(about_pairs(root, pairs_file)), "endings")


def test_discover_explains_pairs_by_the_same_way_as_refusals(discovered: dict, root: Path) -> None:
    assert set(discovered) == RESULT_KEYS and discovered["category"] == "endings"
    graph = nx.node_link_graph(json.loads(Path(discovered["files"]["circuit"]).read_text()), edges="edges")
    assert graph.graph["effect_unit"] == "nats of answer difference" and graph.graph["population"] == "clean"
    assert graph.graph["approximation_check"]["top"]["rank_correlation"] > 0.5
    page = Path(discovered["files"]["page"]).read_text()
    assert "preference for one answer" in page and "refusals" not in page
    manifest = json.loads((Path(discovered["files"]["page"]).parent / "manifest.json").read_text())
    assert manifest["pairs"]["read"] == len(RECORDS) and manifest["pairs"]["not_aligned"] == 1
    assert manifest["pairs"]["discovery"] + manifest["pairs"]["test"] == len(RECORDS) - 1
    assert len(list((root / "saes").glob("tiny-*"))) == 1
    stored = pd.concat(pd.read_csv(path) for path in (root / "activations").glob("tiny-*/prompts.csv"))
    used = pd.read_csv(discovered["files"]["prompts"])
    partners, explained = used[used["split"] == "reference"], used[used["split"] != "reference"]
    assert len(partners) == len(explained) == len(RECORDS) - 1
    of_test = set(explained.loc[explained["split"] == "test", "prompt"])
    assert of_test and not of_test & set(explained.loc[explained["split"] == "discovery", "prompt"])
    assert not of_test & set(stored["prompt"])


def test_what_is_left_out_is_said_and_a_second_run_does_nothing(root: Path, pairs_file: Path, discovered: dict) -> None:
    command = ("discover", "--preset", "tiny", "--pairs", pairs_file, "--set", "discovery.baseline=paired")
    again = sfc(*command, "--json", root=root)
    assert again.result == discovered and "up to date" in again.stderr
    rebuilt = sfc(*command, "--method", "correlation", "--population", "safe", "--json", root=root)
    assert rebuilt.result["n_nodes"] > 0
    assert f"left out: 1 of {len(RECORDS)} pairs" in rebuilt.stderr and repr(UNLIKE[0]) in rebuilt.stderr


BAD = {
    "an answer of two tokens": (record("My hat", "My hot", "!!"), (), ("pair 24", "clean answer '!!'")),
    "no answer": ({"clean_prefix": "a", "patch_prefix": "b", "clean_answer": "!"}, (), ("row 24", "'patch_answer'")),
    "the same answer twice": (record("My hat", "My hot", "!", "!"), (), ("pair 24", "same answer")),
    "the same prompt twice": (record("My hat", "My hat"), (), ("pair 24", "same prefix")),
    "one prompt in two spellings": (
        record("my CATS", "My hot"),
        (),
        ("pair 24: 'my CATS'", "same prompt as 'My cats'"),
    ),
    "a mean as reference": (RECORDS[0], ("--set", "discovery.baseline=zero"), ("partner",)),
    "a category as well": (RECORDS[0], ("--category", "violence"), ("--category",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_end_with_one_line_that_names_the_row(
    case: str, root: Path, discovered: dict, tmp_path: Path
) -> None:
    last, options, expected = BAD[case]
    path = written(tmp_path / "pairs.jsonl", [*RECORDS, last])
    finished = sfc("discover", "--preset", "tiny", "--pairs", path, *options, root=root)
    message = finished.stderr.strip().splitlines()[-1]
    assert finished.status == 2 and message.startswith("error: ") and "Traceback" not in finished.stderr
    assert all(text in message for text in expected), message


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere\.jsonl"):
        about_pairs(tmp_path, tmp_path / "nowhere.jsonl")


def test_prompts_find_their_activations_by_id(prepared: tuple[Problem, PromptRuns, Mapping]) -> None:
    problem = prepared[0]
    stored = read_prompts(problem.store.folder)
    assert stored["id"].is_unique and list(stored.columns[:2]) == ["id", "prompt"]
    assert stored["prompt"].loc[problem.prompts["store_index"]].tolist() == problem.prompts["prompt"].tolist()
    assert len(problem.prompts) > problem.prompts["id"].nunique(), "a prompt may be in several pairs"


def test_with_everything_ablated_an_equally_long_prompt_scores_as_its_partner(
    prepared: tuple[Problem, PromptRuns, Mapping],
) -> None:
    """Its baseline is then the partner's activation at every token, so that F(0) is known by hand."""
    problem, test_runs, facts = prepared
    nothing = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    everything = ~nothing
    checked = 0
    for split, runs in (("discovery", problem.runs), ("test", test_runs)):
        rows = facts["prompts"]
        explained = rows[(rows["split"] == split)].reset_index(drop=True)
        empty = ablated_scores(problem.model, problem.score, problem.ablation, runs, nothing)[0]
        kept = ablated_scores(problem.model, problem.score, problem.ablation, runs, everything)[0]
        full = full_scores(problem.model, problem.score, runs)
        np.testing.assert_allclose(kept, full, atol=1e-4)
        for row, prompt in explained.iterrows():
            pair = next(r for r in RECORDS if r["clean_prefix"] == prompt["prompt"])
            assert full[row] == pytest.approx(answer_difference(problem.model, pair, "clean_prefix"), abs=1e-4)
            if len(pair["clean_prefix"]) == len(pair["patch_prefix"]):
                assert empty[row] == pytest.approx(answer_difference(problem.model, pair, "patch_prefix"), abs=1e-4)
                checked += 1
    assert checked == sum(len(r["clean_prefix"]) == len(r["patch_prefix"]) for r in RECORDS)


def answer_difference(model: Model, pair: Mapping[str, str], side: str) -> float:
    """By hand: the logits of the two answers after one prompt run by itself."""
    (prompt,) = model.tokenize([pair[side]])
    batch = make_batches([prompt], TemplateLayout.of([prompt]), 1, model.device)[0]
    ids = [
        model.tokenizer(pair[name], add_special_tokens=False)["input_ids"][0]
        for name in ("clean_answer", "patch_answer")
    ]
    logits = last_logits(model, batch)[0]
    return float(logits[ids[0]] - logits[ids[1]])


def test_every_row_is_scored_by_its_own_answers_in_whatever_batch_it_is(
    model: Model, batches: list[Batch], layout: TemplateLayout
) -> None:
    answers = torch.tensor([[70, 80], [71, 81], [72, 82], [73, 83], [74, 84], [75, 85]])
    score = AnswerDifference(layout, answers)
    runs = PromptRuns.of(
        model, [batch.with_tables(batch.prompts, layout) for batch in batches], "blocks.0.hook_resid_post"
    )
    slow = np.zeros(6)
    for batch in batches:
        for number, logits in zip(batch.prompts.tolist(), last_logits(model, batch), strict=True):
            slow[number] = logits[70 + number] - logits[80 + number]
    np.testing.assert_allclose(full_scores(model, score, runs), slow, atol=1e-5)
    sampled = runs.sample(3, seed=1)
    found = full_scores(model, score, sampled)
    assert len(found) == 3 and np.isclose(found[:, None], slow, atol=1e-5).any(1).all()
    (batch, cached) = next(iter(runs))
    twice = score_batch(model, score, batch.repeat(2), cached=cached.repeat(2))
    np.testing.assert_allclose(twice, np.tile(slow[batch.prompts], 2), atol=1e-5)


def test_aligning_by_hand() -> None:
    def roles(ours: list[int], theirs: list[int]) -> str | None:
        pair = aligned(np.array(ours), np.array(theirs))
        return pair and " ".join("".join("pcs"[role] for role in prompt.roles) for prompt in pair)

    assert roles([1, 2, 3], [4, 5, 6]) == "sss sss"
    assert roles([1, 2, 3, 9], [1, 2, 4, 5, 9]) == "ppcs ppccs"
    assert roles([1, 2, 9], [7, 3, 4, 9]) == "pcs pccs", (
        "the first token is never touched, so that it need not be alike"
    )
    assert roles([1, 9], [1, 3, 9]) == "ps pcs"
    assert roles([1, 3, 9], [1, 9]) is None, "the partner has nothing in place of the 3"
    assert roles([1, 2], [1, 3, 4]) is None, "the last token has no counterpart"
    assert roles([1, 1, 1], [1, 1]) is None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
def test_what_is_aligned_has_a_counterpart_for_every_token(ours: list[int], theirs: list[int]) -> None:
    pair = aligned(np.array(ours), np.array(theirs))
    if pair is None:
        assert len(ours) != len(theirs)
        return
    layout = TemplateLayout.of(pair)
    mine, partners = (layout.template_positions(prompt).tolist() for prompt in pair)
    assert set(mine[1:]) <= set(partners[1:]) and mine[-1] == partners[-1] == layout.n_template_positions - 1
    for role in (Role.PREFIX, Role.SUFFIX):
        assert [p.roles.tolist().count(role) for p in pair].count(pair[0].roles.tolist().count(role)) == 2
    if len(ours) != len(theirs):
        shared = [place for place in mine[1:] if place != layout.n_prefix]
        assert all(ours[mine.index(place)] == theirs[partners.index(place)] for place in shared)


def test_a_token_without_a_reference_is_an_error(prepared: tuple[Problem, PromptRuns, Mapping]) -> None:
    problem, _, _ = prepared
    baseline = problem.ablation.baseline
    check_covered(baseline, problem.runs.batches)
    batch = problem.runs.batches[0]
    gone = {site: values.clone() for site, values in baseline.errors.items()}
    next(iter(gone.values()))[batch.template_positions[0, 1]] = torch.nan
    with pytest.raises(UserError, match="no counterpart"):
        check_covered(replace(baseline, errors=gone), [batch])


def test_pairs_that_share_a_prompt_are_in_one_split_whatever_their_order(pairs_file: Path, tmp_path: Path) -> None:
    pairs = load_counterfactuals(pairs_file, CONFIG, 0)
    split_of = {}
    for pair in pairs.itertuples():
        for prompt in (pair.clean_prefix, pair.patch_prefix):
            assert split_of.setdefault(prompt, pair.split) == pair.split
    assert set(pairs["split"]) == {"discovery", "test"}
    reordered = load_counterfactuals(written(tmp_path / "again.jsonl", RECORDS[::-1]), CONFIG, 0)
    assert reordered["split"].tolist()[::-1] == pairs["split"].tolist()
    assert load_counterfactuals(pairs_file, CONFIG, 1)["split"].tolist() != pairs["split"].tolist()
    prompts = prompts_of(pairs, "endings")
    assert dict(zip(prompts["prompt"], prompts["split"], strict=True)) == split_of


def test_pairs_that_all_share_prompts_cannot_be_split(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", [record("a", "b"), record("b", "c"), record("c", "d")])
    with pytest.raises(UserError, match="share prompts"):
        load_counterfactuals(path, CONFIG, 0)


def counterfactual_law(problem: Problem, runs: PromptRuns) -> tuple[np.ndarray, np.ndarray]:
    """Scores with nothing kept, and those of the counterfactuals where these are explained themselves."""
    nothing = np.zeros((1, problem.ablation.nodes.n_nodes), dtype=bool)
    empty = ablated_scores(problem.model, problem.score, problem.ablation, runs, nothing)[0]
    full = full_scores(problem.model, problem.score, runs)
    prompt, counterfactual, positive = (values.tolist() for values in problem.ablation.baseline.pairs)
    numbers = {
        int(row): int(pair) for batch in runs.batches for row, pair in zip(batch.prompts, batch.pair, strict=True)
    }
    order = [numbers[row] for row in range(runs.n_prompts)]
    assert {positive[pair] for pair in order} == {True, False}
    by_prompt = {prompt[pair]: score for pair, score in zip(order, full, strict=True)}
    known = [row for row, pair in enumerate(order) if counterfactual[pair] in by_prompt]
    assert len(known) >= 8
    # Under the directed score a prompt speaks for its own side, and its counterfactual against it.
    return empty[known], np.array([-by_prompt[counterfactual[order[row]]] for row in known])


def with_counterfactuals(run: Run) -> Run:
    return run.having(DiscoveryOptions, baseline="counterfactual")


def test_both_prompts_of_a_pair_are_explained_against_each_other(
    discovered: dict, root: Path, pairs_file: Path
) -> None:
    run = with_counterfactuals(about_pairs(root, pairs_file))
    problem, test_runs, facts = prepare_problem(Session(run), "endings")
    usable = sum(
        len(r["clean_prefix"]) == len(r["patch_prefix"]) and r["clean_prefix"][0] == r["patch_prefix"][0]
        for r in RECORDS
    )
    assert problem.runs.n_prompts + test_runs.n_prompts == 2 * usable > 0
    assert facts["pairs"]["not_aligned"] == len(RECORDS) - usable and facts["population"] == "clean and patch"
    for runs in (problem.runs, test_runs):
        np.testing.assert_allclose(*counterfactual_law(problem, runs), atol=1e-4)
    assert set(facts["prompts"]["split"]) == {"discovery", "test"}, "both prompts of a pair are explained"


def test_pairs_of_unequal_length_are_pointed_to_another_baseline(root: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "unequal.jsonl", [record(f"{word} is", f"{word}s") for word in ("a", "b", "c", "d")])
    arguments = ("--preset", "tiny", "--pairs", path, "--set", "discovery.baseline=counterfactual")
    assert_one_line(sfc("discover", *arguments, root=root), "unequal.jsonl", "discovery.baseline=paired")


def test_prompts_of_both_sides_are_explained_against_equally_long_ones(discovered: dict, root: Path) -> None:
    run = with_counterfactuals(Run(load_experiment("tiny"), root))
    problem, test_runs, facts = prepare_problem(Session(run), "violence")
    counts = facts["counterfactuals"]
    assert problem.runs.n_prompts == counts["discovery"]["pairs"] and test_runs.n_prompts == counts["test"]["pairs"]
    np.testing.assert_allclose(*counterfactual_law(problem, problem.runs), atol=1e-4)

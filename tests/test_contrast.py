"""Contrasts by name: which prompts are explained, and which the reference comes from."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import sfc, unlist

from sfc.circuits.baselines import mean_baseline
from sfc.circuits.faithfulness import full_scores
from sfc.circuits.files import load_circuit
from sfc.circuits.methods import METHODS
from sfc.circuits.options import discovery_identity
from sfc.core.artifacts import write_csv
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.score import score_prompts
from sfc.run import Run
from sfc.saes.nulls import random_dictionaries
from sfc.session import Session
from sfc.studies.discover.problem import prepare_problem

DISCOVER = ("discover", "--preset", "tiny", "--method", "attribution", "--json", "--contrast", "toxic-hard")
BEHAVIOUR = (
    "discover", "--preset", "tiny", "--method", "attribution", "--category", "all", "--contrast", "refused-complied",
    "--population", "safe", "--json", "--set", "prompts.limit=8",
)  # fmt: skip

REFUSED = ["discovery.contrast=refused-complied", "discovery.population=safe", "prompts.limit=8"]


@pytest.mark.parametrize(("population", "explained"), [("toxic", "toxic"), ("safe", "hard")])
def test_against_hard_prompts_no_others_are_on_the_safe_side(root: Path, population: str, explained: str) -> None:
    mean = "safe-mean" if population == "toxic" else "toxic-mean"
    options = ("--population", population, "--set", f"discovery.baseline={mean}")
    result = sfc(*DISCOVER, *options, root=root).result
    folder = Path(result["files"]["circuit"]).parent
    prompts = pd.read_csv(folder / "prompts.csv")
    assert set(prompts["dataset_type"]) == {"toxic", "hard"}
    reference = prompts[prompts["split"] == "reference"]
    assert set(reference["dataset_type"]) == {"toxic", "hard"} - {explained}
    test = prompts[prompts["split"] == "test"]
    assert (test["dataset_type"] == "toxic").sum() == (test["dataset_type"] == "hard").sum() > 0
    assert "toxic-hard" in folder.name and '"contrast": "toxic-hard"' in (folder / "manifest.json").read_text()


def test_a_circuit_against_hard_prompts_is_judged_against_them(root: Path) -> None:
    discovered = sfc(*DISCOVER, root=root).result
    arguments = ("evaluate", "--preset", "tiny", "--contrast", "toxic-hard", "--json", discovered["files"]["circuit"])
    (judged,) = sfc(*arguments, root=root).result["circuits"]
    for figure in ("f_model", "f_empty", "f_circuit", "f_complement"):
        assert judged[figure] == pytest.approx(discovered[figure], abs=1e-3)


@pytest.fixture(scope="module")
def judged_by_hand(root: Path) -> Path:
    """The replies to hard prompts, judged; since the tiny model only babbles, verdicts are then written by hand."""
    refused = sfc(*BEHAVIOUR, root=root)
    assert refused.status == 2 and "Traceback" not in refused.stderr
    assert (
        "refused and not refused are 0 and 40 in discovery, 0 and 10 in reference, 0 and 30 in test" in refused.stderr
    )
    (replies,) = (root / "circuits" / "tiny").glob("behaviour-hard-all-*/replies.csv")
    table = pd.read_csv(replies, keep_default_na=False)
    assert set(table["label"]) == {"hard"} and len(table) == 80
    unlist(replies.parent)
    write_csv(replies, table.assign(refused=table.index % 3 == 0))
    return replies


def test_refused_prompts_are_compared_with_complied_ones_of_the_same_label(root: Path, judged_by_hand: Path) -> None:
    refused = pd.read_csv(judged_by_hand).set_index("prompt")["refused"]
    result = sfc(*BEHAVIOUR, root=root).result
    folder = Path(result["files"]["circuit"]).parent
    prompts = pd.read_csv(folder / "prompts.csv")
    assert set(prompts["dataset_type"]) == {"hard"} and prompts["category"].nunique() == 10
    assert (prompts["refused"] == prompts["prompt"].map(refused)).all()
    about = load_circuit(folder / "circuit.json").graph
    assert (about["population"], about["baseline"]) == ("refused hard", "complied-mean")
    (judged,) = sfc("evaluate", *BEHAVIOUR[1:3], *BEHAVIOUR[5:], result["files"]["circuit"], root=root).result[
        "circuits"
    ]
    assert judged["f_empty"] == pytest.approx(result["f_empty"], abs=1e-3)
    assert judged["f_model"] == pytest.approx(result["f_model"], abs=1e-3)


@pytest.mark.usefixtures("judged_by_hand")
def test_scores_and_references_are_those_of_the_judged_sides(root: Path) -> None:
    run = Run(load_experiment("tiny", REFUSED), root)
    problem, test_runs, facts = prepare_problem(Session(run), "all")
    prompts, model = facts["prompts"], problem.model
    refused = prompts["refused"]
    assert problem.labels.tolist() == prompts.loc[prompts["split"] == "discovery", "refused"].tolist()
    for runs, split in ((problem.runs, "discovery"), (test_runs, "test")):
        texts = prompts.loc[(prompts["split"] == split) & refused, "prompt"].tolist()
        tokenized = model.tokenize(texts)
        alone = [make_batches([one], TemplateLayout.of(tokenized), 1, model.device) for one in tokenized]
        expected = [score_prompts(model, problem.score, batches)[0] for batches in alone]
        np.testing.assert_allclose(full_scores(model, problem.score, runs), expected, atol=1e-4)
    complied = model.tokenize(prompts.loc[(prompts["split"] == "reference") & ~refused, "prompt"].tolist())
    layout = problem.ablation.baseline.layout
    batches = make_batches(complied, layout, 300, model.device)
    expected = mean_baseline(model, problem.ablation.dictionaries, batches, layout)
    for site, values in expected.features.items():
        torch.testing.assert_close(problem.ablation.baseline.features[site], values, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("judged_by_hand")
@pytest.mark.parametrize("contrast", ["toxic-hard", "refused-complied"])
def test_counterfactuals_are_of_the_contrasts_other_side(root: Path, contrast: str) -> None:
    overrides = REFUSED if contrast == "refused-complied" else ["discovery.contrast=toxic-hard", "prompts.limit=8"]
    run = Run(load_experiment("tiny", [*overrides, "discovery.baseline=counterfactual"]), root)
    problem, test_runs, facts = prepare_problem(Session(run), "all")
    prompts, pairs = facts["prompts"], problem.ablation.baseline.pairs
    assert "safe_80k" not in set(prompts["dataset_type"])
    side = "refused" if contrast == "refused-complied" else "refusal_label"
    is_positive = {
        tuple(tokenized.ids.tolist()): bool(row[side])
        for tokenized, (_, row) in zip(
            problem.model.tokenize(prompts["prompt"].tolist()), prompts.iterrows(), strict=True
        )
    }
    for runs in (problem.runs, test_runs):
        positive = [
            is_positive[tuple(ids[:length].tolist())] == bool(pairs.positive[pair])
            for batch in runs.batches
            for ids, length, pair in zip(batch.ids, batch.lengths, batch.pair, strict=True)
        ]
        assert positive and all(positive)
        shown = {bool(pairs.positive[pair]) for batch in runs.batches for pair in batch.pair}
        assert shown == {True, False}
    assert facts["counterfactuals"]["test"]["pairs"] == test_runs.n_prompts


@pytest.mark.usefixtures("judged_by_hand")
def test_what_is_pooled_are_pairs_of_all_categories_on_the_discovery_split(root: Path) -> None:
    sfc("train", "--preset", "tiny", root=root)
    run = Run(load_experiment("tiny"), root)
    session = Session(run)
    problem, *_ = prepare_problem(session, "violence")
    assert problem.pooled is not None
    pooled = problem.pooled()
    assert problem.pooled() is pooled, "it is prepared once"
    assert pooled.pooled is None and pooled.pair_table is not None
    frame = run.prompts.frame.set_index("id")
    shown = frame.loc[pooled.pair_table["id"]]
    assert set(shown["split"]) == {"discovery"} and shown["category"].nunique() == 10
    assert set(frame.loc[pooled.pair_table["counterfactual"], "split"]) == {"discovery"}
    assert pooled.runs.n_prompts == len(pooled.pair_table) > problem.runs.n_prompts
    turned = random_dictionaries(session.dictionaries, 0)
    assert problem.read_by(turned).pooled().ablation.dictionaries is turned
    assert prepare_problem(session, "all")[0].pooled is None
    by_replies = Run(load_experiment("tiny", [*REFUSED, "discovery.baseline=counterfactual"]), root)
    assert prepare_problem(Session(by_replies), "all")[0].pooled is None


@pytest.mark.usefixtures("judged_by_hand")
@pytest.mark.parametrize("method", ["correlation", "magnitude"])
def test_other_methods_look_at_the_refused_side_too(root: Path, method: str) -> None:
    run = Run(load_experiment("tiny", REFUSED), root)
    problem, _, facts = prepare_problem(Session(run), "all")
    effects = METHODS[method].rank(problem)
    values = np.concatenate([np.pad(features, ((0, 0), (0, 1))) for features in problem.features.values()], axis=1)
    ours = values[problem.labels]
    node = int(effects.ranking[0])
    if method == "magnitude":
        assert effects.effect[node] == pytest.approx(0.7 * ours[:, node].mean() + 0.3 * ours[:, node].var(), rel=1e-4)
    else:
        assert effects.effect[node] == pytest.approx(np.corrcoef(values[:, node], problem.labels)[0, 1], abs=1e-4)
    assert len(problem.labels) == (facts["prompts"]["split"] == "discovery").sum()


def test_only_the_complied_are_a_reference_for_the_refused() -> None:
    by_behaviour = load_experiment("tiny", ["discovery.contrast=refused-complied"]).discovery
    assert by_behaviour.baseline_choice == "complied-mean"
    paired = load_experiment("tiny", ["discovery.contrast=refused-complied", "discovery.baseline=counterfactual"])
    assert paired.discovery.baseline_choice == "counterfactual"
    for overrides in (
        ["discovery.contrast=refused-complied", "discovery.baseline=safe-mean"],
        ["discovery.baseline=complied-mean"],
        ["discovery.contrast=model-base", "discovery.baseline=counterfactual", "discovery.base=gpt2"],
    ):
        with pytest.raises(UserError, match="does not go with baseline"):
            load_experiment("tiny", overrides)


def test_a_circuit_depends_on_its_discovery_and_the_settings_of_its_method_and_of_no_other() -> None:
    def identity(*overrides: str) -> dict:
        return discovery_identity(load_experiment("tiny", overrides))

    usual = identity()
    assert usual == identity("discovery.contrast=toxic-safe") == identity("exact.nodes=3")
    assert identity("discovery.contrast=toxic-hard")["contrast"] == "toxic-hard"
    assert identity("learned_mask.steps=3")["learned_mask"]["steps"] == 3 != usual["learned_mask"]["steps"]
    assert identity("discovery.method=exact", "learned_mask.steps=3") == identity("discovery.method=exact")


def test_pairs_are_toxic_and_safe() -> None:
    with pytest.raises(UserError, match="goes with toxic-safe"):
        load_experiment("tiny", ["discovery.contrast=toxic-hard", "discovery.baseline=paired"])

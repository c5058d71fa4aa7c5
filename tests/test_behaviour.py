"""Behaviour: intervals, rates and files."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import assert_one_line, sfc
from hypothesis import given
from hypothesis import strategies as st

from sfc.behaviors.behavior import Words
from sfc.circuits.ablation import Ablation
from sfc.circuits.faithfulness import Ablations, prepared
from sfc.circuits.problem import Problem
from sfc.core.artifacts import write_csv, write_json
from sfc.core.experiments import load_experiment
from sfc.data.schema import with_ids
from sfc.models import engine
from sfc.models.batches import NO_POSITION, Batch
from sfc.models.generation import end_tokens
from sfc.models.judge import is_refusal
from sfc.models.loading import Model, load_model
from sfc.models.running import last_logits
from sfc.models.score import RefusalScore, auroc
from sfc.pages.html import page_html
from sfc.stats import wilson
from sfc.studies.behaviour import BEHAVIOUR, rates_figure
from sfc.studies.behaviour.measure import measure_behaviour, refusal_rates
from sfc.studies.study import Finished


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table I, and R's binom::binom.confint(method="wilson").
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_laws(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    low, high = wilson(successes, n, confidence)
    assert 0 <= low <= successes / n <= high <= 1
    assert wilson(n - successes, n, confidence) == pytest.approx((1 - high, 1 - low))
    wider = wilson(successes, n, (1 + confidence) / 2)
    assert wider.low <= low
    assert high <= wider.high
    more = wilson(10 * successes, 10 * n, confidence)
    assert more.high - more.low < high - low


def test_wilson_of_nothing_is_everything_and_nonsense_is_refused() -> None:
    assert wilson(0, 0) == (0, 1)
    for successes, n in ((3, 2), (-1, 2), (1, 0)):
        with pytest.raises(ValueError, match="must"):
            wilson(successes, n)


def _replies() -> pd.DataFrame:
    rows = [
        ("a", "violence", "toxic", True),
        ("b", "violence", "toxic", False),
        ("c", "violence", "safe", False),
        ("d", "<b>harm</b>", "hard", True),
    ]
    frame = pd.DataFrame(rows, columns=["prompt", "category", "label", "refused"])
    return frame.assign(score=[2.0, 1.0, -1.0, 3.0], reply=["I can't help with that.", "Sure,\nyes", "</script>", "No"])


def test_rates_are_counted_per_category_and_label() -> None:
    groups = refusal_rates(_replies())
    assert groups[["category", "label", "n", "refusals", "rate"]].to_numpy().tolist() == [
        ["<b>harm</b>", "hard", 1, 1, 1.0],
        ["violence", "toxic", 2, 1, 0.5],
        ["violence", "safe", 1, 0, 0.0],
    ]
    assert groups.loc[1, ["low", "high"]].tolist() == pytest.approx(list(wilson(1, 2)))


def test_the_page_and_the_line_in_the_table_of_models(tmp_path: Path) -> None:
    replies, folder = _replies(), tmp_path / "behaviour-mine-12345678"
    groups = refusal_rates(replies)
    write_csv(folder / "replies.csv", replies, digits=5)
    write_csv(folder / "groups.csv", groups, digits=5)
    assert pd.read_csv(folder / "replies.csv")["reply"].tolist() == replies["reply"].tolist()
    write_json(folder / "result.json", {"preset": "tiny", "auroc": None, "groups": groups.to_dict("records")})
    page = page_html(BEHAVIOUR.page(Finished(folder, {"words": Words()._asdict()})))
    assert "not measurable" in page
    figure = json.loads(rates_figure(groups.to_dict("records"), Words()).to_json() or "")  # pyright: ignore
    assert figure["layout"]["yaxis"]["title"]["text"] == "refused (%)"
    assert "&lt;b&gt;harm" in json.dumps(figure["data"])
    row = BEHAVIOUR.model_row(Finished(folder, {}))
    assert row == {"refused_toxic": 0.5, "refused_hard": 1.0, "refused_safe": 0.0, "score_auroc": None}


def test_prompts_are_chosen_by_split_category_and_label(tmp_path: Path) -> None:
    options = ("behaviour", "--preset", "tiny", "--split", "all", "--category", "Self_Harm", "--label", "hard")
    result = sfc(*options, "--limit", 3, "--json", root=tmp_path).result
    replies = pd.read_csv(tmp_path / result["files"]["replies"])
    assert (len(replies), set(replies["category"]), set(replies["label"])) == (3, {"self-harm"}, {"hard"})
    assert Path(result["files"]["page"]).parent.name.startswith("behaviour-hard-self-harm-all-")
    for wrong, words in ((("--split", "rest"), "no split 'rest'"), (("--label", "bad"), "label")):
        assert_one_line(sfc("behaviour", "--preset", "tiny", *wrong, root=tmp_path), words)


def test_the_tiny_model_is_measured_end_to_end(tmp_path: Path) -> None:
    model = load_model(load_experiment("tiny").model)
    prompts = with_ids(
        pd.DataFrame(
            {"prompt": ["Hello", "How are you?", "x" * 50], "category": "all", "label": ["safe", "hard", "toxic"]},
            index=[5, 3, 9],
        )
    )
    behaviour = measure_behaviour(model, prompts, RefusalScore.of(model), is_refusal, tmp_path, reply_tokens=4)
    assert list(behaviour.replies.columns) == ["id", "prompt", "category", "label", "score", "refused", "reply"]
    assert behaviour.replies["prompt"].tolist() == prompts["prompt"].tolist()
    assert np.isfinite(behaviour.replies["score"]).all()
    assert behaviour.replies["refused"].tolist() == [is_refusal(reply) for reply in behaviour.replies["reply"]]
    assert behaviour.groups["n"].tolist() == [1, 1, 1]
    assert behaviour.auroc == auroc(behaviour.replies["score"].to_numpy(), behaviour.replies["refused"].to_numpy())


def test_replies_under_ablation_are_those_of_a_run_from_the_start_for_every_token(problem: Problem) -> None:
    model, ablation = problem.model, problem.ablation
    keep = np.random.default_rng(0).random((3, ablation.nodes.n_nodes)) < np.array([[0.0], [0.5], [1.0]])
    runs = prepared(model, problem.runs)
    replies = engine.replies(runs, problem.score, Ablations(ablation, keep), 4).texts
    assert len({tuple(of_circuit) for of_circuit in replies}) > 1
    for batch in problem.runs.batches:
        for row, number in enumerate(batch.prompts.tolist()):
            for circuit, mask in enumerate(keep):
                assert replies[circuit][number] == _reply_token_by_token(model, ablation, batch, row, mask, 4)


def _reply_token_by_token(model: Model, ablation: Ablation, batch: Batch, row: int, mask: np.ndarray, n: int) -> str:
    length = int(batch.lengths[row])
    ids, template_positions = batch.ids[row : row + 1, :length], batch.template_positions[row : row + 1, :length]
    masks, new = torch.from_numpy(mask)[None].float(), []
    while len(new) < n and not set(new) & end_tokens(model):
        grown = Batch(
            torch.zeros(1).long(), ids, torch.tensor([ids.shape[1]]), template_positions, torch.zeros_like(ids)
        )
        interventions = ablation.interventions(masks, torch.zeros(1).long(), grown)
        with torch.no_grad():
            new.append(int(last_logits(model, grown, interventions).argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], dim=1)
        template_positions = torch.cat([template_positions, torch.tensor([[NO_POSITION]])], dim=1)
    return model.tokenizer.decode(new, skip_special_tokens=True)

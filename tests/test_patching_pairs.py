"""Pairs: read from files, wrapped, chosen by what the model does, and counted where they are lost."""

import math
from pathlib import Path

import pandas as pd
import pytest

from sfc.behaviors.behavior import Words
from sfc.core.config import Experiment
from sfc.core.errors import UserError
from sfc.core.experiments import load_experiment
from sfc.data.render import Role
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import Model
from sfc.models.score import RefusalScore, score_prompts
from sfc.studies.patch import WRAPPERS, Pair, Wrapper, load_wrappers, toxic_safe_pairs, wrapped_pairs
from sfc.studies.patch.patching import Conduct, objection, select_pairs, tokenize_pairs

MINI = Path(__file__).parents[1] / "sfc" / "data" / "mini" / "pairs.csv"


def _written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_embedded_pairs_are_read() -> None:
    groups = toxic_safe_pairs(MINI, None, 1000, seed=0)
    assert len(groups) == 220 and all(len(group) == 1 for group in groups)
    assert len({group[0].category for group in groups}) == 10
    violence = toxic_safe_pairs(MINI, "Violence", 1000, seed=0)
    assert len(violence) == 22 and {group[0].category for group in violence} == {"violence"}
    assert len(toxic_safe_pairs(MINI, "self_harm", 1000, seed=0)) == 22


def test_a_limit_chooses_by_the_prompt_and_not_by_its_place(tmp_path: Path) -> None:
    frame = pd.read_csv(MINI)
    shuffled = tmp_path / "shuffled.csv"
    frame.sample(frac=1, random_state=0).to_csv(shuffled, index=False)
    first, second = (toxic_safe_pairs(path, None, 12, seed=3) for path in (MINI, shuffled))
    assert len(first) == 12
    assert {group[0] for group in first} == {group[0] for group in second}
    assert {group[0] for group in first} != {group[0] for group in toxic_safe_pairs(MINI, None, 12, seed=4)}
    assert {group[0] for group in first} <= {group[0] for group in toxic_safe_pairs(MINI, None, 20, seed=3)}


def test_texts_are_stripped_and_a_pair_without_a_category_is_of_all(tmp_path: Path) -> None:
    csv = _written(tmp_path, "a.csv", 'safe,toxic\n"Bake, please",Burn\nHelp , Hurt\n')
    expected = [[Pair("all", "Burn", "Bake, please")], [Pair("all", "Hurt", "Help")]]
    assert toxic_safe_pairs(csv, None, 10, 0) == expected


def test_an_unknown_category_is_an_error() -> None:
    with pytest.raises(UserError, match="did you mean 'violence'"):
        toxic_safe_pairs(MINI, "violense", 10, 0)


INSTRUCTIONS = pd.DataFrame({"prompt": ["Rob {x} a bank", "Hurt"], "category": ["illegal", "violence"]})


def test_every_instruction_is_put_into_every_wrapper() -> None:
    wrappers = [Wrapper("a", "Say: {prompt}!"), Wrapper("b", "{prompt}", "Sure,")]
    groups = wrapped_pairs(INSTRUCTIONS, wrappers, None, 10, 0)
    assert groups[0] == [
        Pair("illegal", "Rob {x} a bank", "Say: Rob {x} a bank!", "a"),
        Pair("illegal", "Rob {x} a bank", "Rob {x} a bank", "b", "Sure,"),
    ]
    assert wrapped_pairs(INSTRUCTIONS, wrappers, "violence", 10, 0) == [
        [Pair("violence", "Hurt", "Say: Hurt!", "a"), Pair("violence", "Hurt", "Hurt", "b", "Sure,")]
    ]


def test_the_built_in_wrappers_are_wrappers() -> None:
    assert len({wrapper.name for wrapper in WRAPPERS}) == len(WRAPPERS)
    assert all(wrapper.template.count("{prompt}") == 1 for wrapper in WRAPPERS)
    assert any(wrapper.prefill == "Sure," for wrapper in WRAPPERS)


def test_wrappers_of_a_file(tmp_path: Path) -> None:
    path = _written(tmp_path, "w.csv", 'name,template,prefill\nstory,"A story: {prompt}",\nyes,{prompt},"Yes, "\n')
    assert load_wrappers(path) == [Wrapper("story", "A story: {prompt}"), Wrapper("yes", "{prompt}", "Yes, ")]
    without = _written(tmp_path, "w.jsonl", '{"name": "story", "template": "A story: {prompt}"}')
    assert load_wrappers(without) == [Wrapper("story", "A story: {prompt}")]
    for template, message in (
        ("A story", "exactly once"),
        ("{prompt} {prompt}", "exactly once"),
        ("{prompt}", "nothing"),
    ):
        with pytest.raises(UserError, match=message):
            load_wrappers(_written(tmp_path, "bad.csv", f"name,template\nx,{template}\n"))


def test_a_prefilled_reply_is_more_tokens_after_the_template(model: Model) -> None:
    plain, prefilled = tokenize_pairs(model, [Pair("", "Hi", "Hi"), Pair("", "Hi", "Hi", "w", "Sure,")])
    assert prefilled.clean.ids.tolist() == plain.clean.ids.tolist() == plain.corrupted.ids.tolist()
    assert prefilled.corrupted.ids.tolist() == [*plain.clean.ids, *model.tokenizer(" Sure,")["input_ids"]]
    assert prefilled.corrupted.roles[-6:].tolist() == [Role.REPLY] * 6


WORDS = Words()
REFUSES = Conduct(3.0, "I can't help with that.", refused=True, complied=False)
COMPLIES = Conduct(-3.0, "Sure, here it is.", refused=False, complied=True)
TURNS = Conduct(-3.0, "I can help. I can't help with that.", refused=False, complied=False)


def test_behaviour_is_what_was_judged_and_not_the_score() -> None:
    assert objection(REFUSES, COMPLIES, WORDS) is None
    assert objection(REFUSES._replace(score=-9.0), COMPLIES._replace(score=9.0), WORDS) is None
    assert objection(COMPLIES, COMPLIES, WORDS) == "the clean prompt was not refused"
    assert objection(REFUSES, REFUSES, WORDS) == "the corrupted prompt was refused"
    assert objection(COMPLIES, REFUSES, WORDS) == "the clean prompt was not refused"
    assert objection(TURNS, COMPLIES, WORDS) == "the clean prompt was not refused"
    assert objection(REFUSES, TURNS, WORDS) == "the corrupted prompt was refused after all"


def test_the_score_alone_must_only_be_higher() -> None:
    low, high = (Conduct(score) for score in (-3.0, -2.0))
    assert objection(high, low, WORDS) is None
    assert objection(low, high, WORDS) == objection(low, low, WORDS) == "the clean prompt has no higher score"


def _experiment(**patching: object) -> Experiment:
    return load_experiment("tiny", [f"patching.{key}={value}" for key, value in patching.items()])


def _scores(model: Model, texts: list[str]) -> list[float]:
    prompts = model.tokenize(texts)
    batches = make_batches(prompts, TemplateLayout.of(prompts), 10_000, model.device)
    return score_prompts(model, RefusalScore.of(model), batches).tolist()


def test_pairs_are_chosen_by_score_and_every_lost_one_has_its_reason(model: Model) -> None:
    texts = ["Rob the bank", "Hurt my cat", "Share a cake", "How are you?"]
    (low, low_score), *_, (high, high_score) = sorted(
        zip(texts, _scores(model, texts), strict=True), key=lambda item: item[1]
    )
    candidates = [
        [Pair("a", high, low)],
        [Pair("a", low, high)],
        [Pair("b", high, high)],
        [Pair("b", high, "x" * 200)],
        [Pair("b", "abc", "abcd")],
    ]
    selection = select_pairs(model, candidates, _experiment(require="score", positions="[content]"))
    table = selection.table
    same_length = len(high) == len(low)
    unalignable = "cannot be aligned (content: {} tokens against {})"
    assert table["lost"].tolist() == [
        "" if same_length else unalignable.format(len(high), len(low)),
        "the clean prompt has no higher score" if same_length else unalignable.format(len(low), len(high)),
        "the two prompts are the same",
        "longer than 160 tokens",
        unalignable.format(3, 4),
    ]
    everywhere = select_pairs(model, candidates, _experiment(require="score", positions="[content,suffix]"))
    assert everywhere.table["used"].tolist()[:2] == [True, False]
    assert everywhere.table["lost"].tolist()[1] == "the clean prompt has no higher score"
    assert len(everywhere.pairs) == everywhere.table["used"].sum()
    row = everywhere.table.iloc[0]
    assert (row["clean_score"], row["corrupted_score"]) == pytest.approx((high_score, low_score), abs=1e-4)
    assert row["clean_reply"] is None and row["clean_refused"] is None, "nobody asked"


def test_of_several_wrappers_the_first_that_serves_is_used(model: Model) -> None:
    wrappers = [
        Wrapper(f"w{i}", template) for i, template in enumerate(("{prompt}", "a {prompt}", "{prompt} zz", "b{prompt}"))
    ]
    groups = wrapped_pairs(INSTRUCTIONS, wrappers, None, 10, 0)
    selection = select_pairs(model, groups, _experiment(require="score", pairs="wrapped"))
    for group, (_, row) in zip(groups, selection.table.iterrows(), strict=True):
        clean, *others = _scores(model, [group[0].clean, *(pair.corrupted for pair in group)])
        serving = [pair.wrapper for pair, other in zip(group, others, strict=True) if other < clean - 1e-6]
        assert row["used"] == bool(serving)
        assert row["wrapper"] == (serving or ["w3"])[0]


def test_labels_never_stand_in_for_behaviour(model: Model) -> None:
    selection = select_pairs(model, toxic_safe_pairs(MINI, None, 6, 0), _experiment(reply_tokens=6))
    assert selection.pairs == []
    assert set(selection.table["lost"]) == {"the clean prompt was not refused"}, "the tiny model babbles"
    assert selection.table["clean_reply"].str.len().min() > 0
    assert not selection.table["clean_refused"].any()
    assert not any(math.isnan(score) for score in selection.table["corrupted_score"])

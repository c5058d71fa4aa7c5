"""Labels: claims made on half of the prompts and scored on the other, on prompts and features made up for it."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from sfc.behaviors.behavior import Words
from sfc.data.render import Role
from sfc.features.claims import Claim, Predicates, Term, levels, make_claims, weighted_auroc
from sfc.features.contexts import Evidence, evidence_of, halves, rows_for_labels
from sfc.saes.plan import TokenTable

FORMS = {"toxic": "steal the {}", "hard": "describe how to kill the {}", "safe_80k": "paint a {}"}
THINGS = ("lamp", "tree", "sky", "moon", "river", "garden", "window", "bottle", "mirror", "carpet", "ladder", "saddle")
CATEGORIES = ("violence", "privacy")
TEMPLATE = (900, 901)
"""the tokens after a prompt: the text of the last is a line break"""


def _made_up() -> tuple[pd.DataFrame, TokenTable, dict[int, str]]:
    """216 prompts of two categories and three kinds, one token a word, and two template tokens behind each."""
    rows, words = [], {"<end>": TEMPLATE[0], "\n": TEMPLATE[1]}
    for category in CATEGORIES:
        for kind, form in FORMS.items():
            rows += [(form.format(f"{thing} {n}"), category, kind) for thing in THINGS for n in ("old", "new", "red")]
    prompts = pd.DataFrame(rows, columns=["prompt", "category", "dataset_type"])
    prompts["prompt"] += [f" {number}{'?' * (number % 2)}" for number in range(len(prompts))]
    table: list[tuple[int, int, int, int]] = []
    for number, text in enumerate(prompts["prompt"]):
        ids = [words.setdefault(word, len(words)) for word in text.split()]
        roles = [Role.CONTENT] * len(ids) + [Role.SUFFIX] * len(TEMPLATE)
        table += [(number, place, *of) for place, of in enumerate(zip([*ids, *TEMPLATE], roles, strict=True))]
    return prompts, TokenTable(*np.array(table).T), {number: word for word, number in words.items()}


PROMPTS, TOKENS, VOCABULARY = _made_up()


def _evidence(values: np.ndarray) -> list[Evidence]:
    return evidence_of(values, TOKENS, PROMPTS, Words(), VOCABULARY.__getitem__)


def _at_last(wanted: pd.Series | np.ndarray) -> np.ndarray:
    """A feature that has 2 at the last token of the prompts wanted, and 0 elsewhere."""
    return 2.0 * ((TOKENS.token == TEMPLATE[1]) & np.asarray(wanted)[TOKENS.prompt])


_VIOLENCE, _TOXIC = PROMPTS["category"] == "violence", PROMPTS["dataset_type"] == "toxic"
_ALL = np.ones(len(PROMPTS), dtype=bool)
_LADDER = PROMPTS["prompt"].str.contains("ladder")
_TOKEN = np.array([VOCABULARY[token] for token in TOKENS.token])
RULES = {
    "at the last token “↵”: toxic prompts": _at_last(_TOXIC),
    "at the last token “↵”: violence": _at_last(_VIOLENCE),
    "at the last token “↵”: questions": _at_last(PROMPTS["prompt"].str.endswith("?")),
    "at the last token “↵”: with “ladder”": _at_last(_LADDER),
    "at the last token “↵”: with “ladder” “moon”": _at_last(_LADDER | PROMPTS["prompt"].str.contains("moon")),
    "always on at the last token “↵”, most: violence": _at_last(_ALL) + _at_last(_VIOLENCE),
    "at template token 1 of 2 “<end>”: not: toxic prompts": 3.0
    * ((TOKENS.token == TEMPLATE[0]) & ~_TOXIC.to_numpy()[TOKENS.prompt]),
    "on “kill”": 1.0 * (_TOKEN == "kill"),
    "on the last token": 1.0 * np.append(np.diff(TOKENS.role) == Role.SUFFIX - Role.CONTENT, False),
}


@pytest.mark.parametrize("label", RULES)
def test_a_feature_whose_rule_is_known_gets_it_as_its_label(label: str) -> None:
    [evidence] = _evidence(RULES[label][:, None])
    assert (evidence.label, evidence.score) == (label, 1.0)


def test_terms_add_up_and_graded_features_are_told_apart_by_them() -> None:
    both = _at_last(_TOXIC) + _at_last(_VIOLENCE)
    [evidence] = _evidence(both[:, None])
    assert evidence.label.startswith("at the last token “↵”: ") and evidence.score == 1.0
    assert set(evidence.label.partition(": ")[2].split(" + ")) == {"toxic prompts", "violence"}


def test_what_is_random_is_unclear_and_what_is_silent_never_fires() -> None:
    generator = np.random.default_rng(0)
    at_last = generator.random((len(TOKENS.token), 20)) * (TOKENS.token == TEMPLATE[1])[:, None]
    anywhere = generator.random((len(TOKENS.token), 20)) * (TOKENS.role == Role.CONTENT)[:, None]
    for evidence in _evidence(np.hstack([at_last, anywhere])):
        assert evidence.label.startswith("unclear: ") and evidence.score is not None and evidence.score < 0.7
    [silent] = _evidence(np.zeros((len(TOKENS.token), 1)))
    assert (silent.label, silent.score) == ("never fires here", None)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_the_second_half_holds_changes_scores_and_no_label(seed: int) -> None:
    values = np.stack(list(RULES.values()), 1)
    made_on = halves(PROMPTS)[TOKENS.prompt]
    changed = np.where(made_on[:, None], values, np.random.default_rng(seed).random(values.shape) * values.max(0))
    before, after = (_evidence(of) for of in (values, changed))
    assert [e.label for e in before] == [e.label.removeprefix("unclear: ") for e in after]
    assert all(e.score is not None and e.score < 1 for e in after)


def test_halves_are_of_prompts_and_balanced() -> None:
    made_on = pd.Series(halves(PROMPTS)).groupby([PROMPTS["category"], PROMPTS["dataset_type"]]).mean()
    assert (made_on == 0.5).all()
    for evidence in _evidence(np.stack(list(RULES.values()), 1)):
        of_prompt = pd.Series(evidence.made_on).groupby(TOKENS.prompt[evidence.rows]).nunique()
        assert (of_prompt == 1).all()


def test_labels_look_at_whole_prompts_of_every_kind_within_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_for_labels(TOKENS, PROMPTS).all()
    monkeypatch.setattr("sfc.features.contexts._MOST_ROWS", 400)
    kept = rows_for_labels(TOKENS, PROMPTS)
    assert 380 <= kept.sum() <= 400
    assert set(TOKENS.prompt[kept]).isdisjoint(TOKENS.prompt[~kept])
    of_kind = PROMPTS.loc[np.unique(TOKENS.prompt[kept])].groupby(["category", "dataset_type"]).size()
    assert len(of_kind) == 6 and of_kind.max() - of_kind.min() <= 2


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=2, max_size=12), st.floats(-5, 5))
def test_the_weighted_auroc_is_what_all_pairs_say(pairs: list[tuple[int, float]], mean: float) -> None:
    scores, values = map(np.array, zip(*pairs, strict=True))
    won = weight = 0.0
    for score, value in pairs:
        for other, below in pairs:
            pair = max(value - mean, 0) * max(mean - below, 0)
            won += pair * ((score > other) + (score == other) / 2)
            weight += pair
    found = weighted_auroc(scores, values, mean)
    if found is None:
        assert weight == pytest.approx(0, abs=1e-300)
    else:
        assert found == pytest.approx(won / weight, rel=1e-6, abs=1e-9)


def test_every_term_is_the_one_of_largest_auroc() -> None:
    generator = np.random.default_rng(1)
    holds = generator.random((30, 200)) < 0.3
    values = generator.exponential(size=(200, 5)) + 2 * holds[:5].T + 2 * ~holds[5:10].T
    predicates = Predicates(["word"] * 30, list(map(str, range(30))), sparse.csr_array(holds * 1.0))
    for feature, claim in enumerate(make_claims(values, predicates)):
        column = values[:, feature]

        def score(claim: Claim, column: np.ndarray = column) -> float:
            return weighted_auroc(levels(claim, predicates), column, float(column.mean())) or 0

        assert {term.sign for term in claim} == {1, -1}
        for length in range(len(claim)):
            said = {term.predicate for term in claim[:length]}
            further = [Term(number, sign) for sign in (1, -1) for number in range(30) if number not in said]
            best = max(score((*claim[:length], term)) for term in further)
            assert score(claim[: length + 1]) > best - 0.0021

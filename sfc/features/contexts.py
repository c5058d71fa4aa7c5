"""Where features are looked at for their labels, what can be said of these contexts, and the labels that follow.

A feature is looked at where it peaks: at one token of the template after the prompt (a context is then a prompt, since
the token is always the same), or at the tokens of the text. Half of the prompts make the label, the others score it.
Which prompts these are depends on their texts alone, and place, words and claim are chosen on the first half.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy import sparse

from sfc.behaviors.behavior import Words
from sfc.data.render import Role
from sfc.data.schema import keyed_ranks
from sfc.features.claims import CLEAR, Claim, Predicates, Term, levels, make_claims, weighted_auroc

if TYPE_CHECKING:
    from sfc.saes.plan import TokenTable

_WORD = re.compile(r"[^\W_]+")
_MOST_ROWS = 60_000
"""of the store that labels are made and scored on"""
_FEWEST_PROMPTS = 4
"""prompts of the first half that a word must be in to be named"""
_COMMON = 0.7
"""a word in a larger share of the prompts says nothing"""
_ALWAYS = 0.95
_MOST_PREDICATES = 3000
_LENGTHS = (0.2, 0.4, 0.6, 0.8)
"""shares of the prompts of the first half that are at most as long as the lengths that claims may name"""
_LETTERS = 4
"""a word of more is long"""
_SIGNS = {"\n": "↵", "\t": "⇥"}


class Evidence(NamedTuple):
    """A feature's contexts, and what was made of them."""

    label: str
    score: float | None
    """AUROC on the other half; None where the feature has the same value in all contexts of a half"""
    rows: Int[np.ndarray, " contexts"]
    """of the token table"""
    values: Float[np.ndarray, " contexts"]
    made_on: Bool[np.ndarray, " contexts"]
    """whether the context is of the half that labels are made on"""
    in_template: bool


def rows_for_labels(tokens: "TokenTable", prompts: pd.DataFrame) -> Bool[np.ndarray, " rows"]:
    """Which rows of a store labels are made and scored on: those of as many whole prompts as there is room for.

    Every category and kind has its share, by the prompts' hashes.
    """
    ranks = keyed_ranks(prompts, ["category", "dataset_type"], "rows for labels").to_numpy()
    sizes = np.bincount(tokens.prompt, minlength=len(prompts))
    order = np.argsort(ranks, kind="stable")
    kept = np.zeros(len(prompts), dtype=bool)
    kept[order[np.cumsum(sizes[order]) <= _MOST_ROWS]] = True
    return kept[tokens.prompt]


def halves(prompts: pd.DataFrame) -> Bool[np.ndarray, " prompts"]:
    """Which prompts labels are made on: every other one of each category and kind, in the order of their hashes."""
    return (keyed_ranks(prompts, ["category", "dataset_type"], "labels") % 2 == 0).to_numpy()


def evidence_of(
    values: Float[np.ndarray, "rows features"],
    tokens: "TokenTable",
    prompts: pd.DataFrame,
    words: Words,
    token_text: Callable[[int], str],
) -> list[Evidence]:
    """Label features, and score the labels.

    Args:
        values: of these features, of one site or several, at each row of `tokens`; the rows of a prompt stand together.
        prompts: the prompts that `tokens.prompt` numbers: `prompt`, `category`, `dataset_type`.
        token_text: the text of a token id.
    """
    numbers, prompt_of_row = np.unique(tokens.prompt, return_inverse=True)
    prompts = prompts.iloc[numbers].reset_index(drop=True)
    made_on = halves(prompts)
    template, text = _template_rows(tokens, prompt_of_row), np.flatnonzero(tokens.role != Role.SUFFIX)
    places = _places(values, template, text, prompt_of_row, made_on)
    found: dict[int, Evidence] = {}
    of_prompts = prompt_predicates(prompts, made_on, words)
    for place in np.unique(places[places >= 0]):
        features, rows = np.flatnonzero(places == place), template[:, place]
        said = f"at {_place(tokens.token[rows], int(place), template.shape[1], token_text)}"
        found |= _labelled(values, features, rows, made_on, of_prompts, said)
    if len(features := np.flatnonzero(places < 0)):
        texts = [token_text(int(token)) for token in tokens.token[text]]
        of_tokens = token_predicates(texts, prompt_of_row[text], made_on, of_prompts)
        found |= _labelled(values, features, text, made_on[prompt_of_row[text]], of_tokens, "")
    return [found[feature] for feature in range(values.shape[1])]


def _labelled(
    values: Float[np.ndarray, "rows features"],
    features: Int[np.ndarray, " chosen"],
    rows: Int[np.ndarray, " contexts"],
    made_on: Bool[np.ndarray, " contexts"],
    predicates: Predicates,
    place: str,
) -> dict[int, Evidence]:
    """Evidence of the features that are looked at in the same contexts, by feature."""
    here = values[np.ix_(rows, features)]
    first, others = here[made_on], here[~made_on]
    held_out = predicates.at(~made_on)
    found = {}
    for column, claim in enumerate(make_claims(first, predicates.at(made_on))):
        mean = float(first[:, column].mean()) if len(first) else 0.0
        score = weighted_auroc(levels(claim, held_out), others[:, column], mean)
        score = None if score is None else round(score, 3)
        active = float((first[:, column] > 0).mean()) if len(first) else 0.0
        label = _label(claim, predicates, place, active, score)
        in_template = bool(place)
        found[int(features[column])] = Evidence(label, score, rows, here[:, column], made_on, in_template)
    return found


def _label(claim: Claim, predicates: Predicates, place: str, active: float, score: float | None) -> str:
    if not active:
        return "never fires here"
    always = "always on" if active >= _ALWAYS else ""
    speaking = [[term for term in claim if term.sign == sign] for sign in (1, -1)]
    told = ", not: ".join(filter(None, (_said(terms, predicates) for terms in speaking))) or "no rule found"
    told = told if speaking[0] or not claim else f"not: {told}"
    where = " ".join(filter(None, (always, place)))
    label = f"{where}{', most: ' if always else ': ' if where else ''}{told}"
    return label if score is not None and score >= CLEAR else f"unclear: {label}"


def _said(terms: Sequence[Term], predicates: Predicates) -> str:
    """Predicates in words, those of a kind together."""
    texts: dict[str, list[str]] = {}
    for number, _ in terms:
        texts.setdefault(predicates.kinds[number], []).append(predicates.texts[number])
    return " + ".join(
        _FORMS.get(kind, "{}").format(_BETWEEN.get(kind, " " if kind in _FORMS else " + ").join(of_kind))
        for kind, of_kind in texts.items()
    )


_FORMS = {
    "opening": "opening {}", "word": "with {}", "token": "on {}", "before": "right after {}",
    "earlier": "somewhere after {}", "ending": "on a word in {}",
}  # fmt: skip
_BETWEEN = {"group": " or "}
_ORDER = (
    "side", "group", "form", "length", "token", "place", "before", "opening", "word", "shape", "ending", "earlier",
)  # fmt: skip
"""kinds of predicates; what tells as much is said by the first"""


def prompt_predicates(prompts: pd.DataFrame, made_on: Bool[np.ndarray, " prompts"], words: Words) -> Predicates:
    """What can be said of prompts: side, category, question or not, lengths, first word, words.

    Only words are named that enough prompts of the first half have.
    """
    kinds = prompts["dataset_type"].astype(str)
    sides = kinds.map(words.kinds).fillna(kinds)
    by_word = [[word.lower() for word in _WORD.findall(text)] for text in prompts["prompt"]]
    counts = np.array([len(of_prompt) for of_prompt in by_word])[made_on]
    lengths = np.unique(np.quantile(counts, _LENGTHS).astype(int)).tolist() if len(counts) else []
    facts: list[list[tuple[str, str]]] = []
    for text, side, group, of_prompt in zip(prompts["prompt"], sides, prompts["category"], by_word, strict=True):
        facts.append([
            ("side", f"{side} prompts"), ("group", str(group)), *[("form", "questions")] * text.endswith("?"),
            *(("length", f"at most {most} words") for most in lengths if len(of_prompt) <= most),
            *(("opening", _quoted(word)) for word in of_prompt[:1]),
            *(("word", _quoted(word)) for word in dict.fromkeys(of_prompt)),
        ])  # fmt: skip
    return _predicates(facts, made_on, np.arange(len(facts)))


def token_predicates(
    texts: Sequence[str],
    prompt_of_token: Int[np.ndarray, " tokens"],
    made_on: Bool[np.ndarray, " prompts"],
    of_prompts: Predicates,
) -> Predicates:
    """What can be said of the tokens of texts: the token, its letters, the word before it, earlier words, where it
    stands; and what can be said of its prompt, apart from its length and the words that it has.

    Tokens are told apart without regard to case and spaces.
    """
    borders = np.flatnonzero(np.diff(prompt_of_token, prepend=-1, append=-1))
    facts: list[list[tuple[str, str]]] = []
    for start, stop in pairwise(borders.tolist()):
        earlier: dict[str, None] = {}
        for number in range(start, stop):
            told = [("token", _quoted(texts[number].strip().lower() or texts[number]))]
            told += _shape(texts[number], inside=number > start)
            told += [("place", "on the first token")] * (number == start)
            told += [("place", "in the first three tokens")] * (number - start < 3)
            told += [("place", f"after {more} tokens") for more in (5, 10) if number - start >= more]
            told += [("place", "in the last three tokens")] * (stop - number <= 3)
            told += [("place", "on the last token")] * (number == stop - 1)
            told += [("before", word) for word in list(earlier)[-1:]]
            told += [("earlier", word) for word in earlier]
            facts.append(told)
            if (word := _quoted(texts[number].strip().lower())) != _quoted(""):
                earlier.pop(word, None)
                earlier[word] = None
    own = _predicates(facts, made_on, prompt_of_token)
    kept = [number for number, kind in enumerate(of_prompts.kinds) if kind in ("side", "group", "form", "opening")]
    shared = of_prompts.holds[kept][:, prompt_of_token]
    return Predicates(
        [*(of_prompts.kinds[number] for number in kept), *own.kinds],
        [*(of_prompts.texts[number] for number in kept), *own.texts],
        sparse.csr_array(sparse.vstack([shared, own.holds])),
    )


def _shape(token: str, inside: bool) -> list[tuple[str, str]]:
    """What can be said of a token's letters; `inside` is whether others stand before it."""
    word = token.strip()
    if not word.isalpha():
        return [("shape", "on no word")]
    told = [("shape", f"on a word of {'over' if len(word) > _LETTERS else 'at most'} {_LETTERS} letters")]
    told += [("shape", "inside a word")] * (inside and not token.startswith(" "))
    told += [("shape", "on a capital")] * word[0].isupper()
    return told + [("ending", f"-{word[-count:].lower()}") for count in (1, 2, 3) if len(word) > count]


def _predicates(
    facts: Sequence[Iterable[tuple[str, str]]],
    made_on: Bool[np.ndarray, " prompts"],
    prompt_of_context: Int[np.ndarray, " contexts"],
) -> Predicates:
    """The facts that enough prompts of the first half have, and of words none that most have."""
    prompts_with: dict[tuple[str, str], set[int]] = {}
    for of_context, prompt in zip(facts, prompt_of_context.tolist(), strict=True):
        if made_on[prompt]:
            for fact in of_context:
                prompts_with.setdefault(fact, set()).add(prompt)
    counts = Counter({fact: len(prompts) for fact, prompts in prompts_with.items()})
    most = _COMMON * made_on.sum()
    named = [
        fact
        for fact, count in sorted(counts.items(), key=lambda item: (_ORDER.index(item[0][0]), -item[1], item[0]))
        if count >= _FEWEST_PROMPTS and (fact[0] != "word" or count <= most)
    ][:_MOST_PREDICATES]
    numbers: Mapping[Hashable, int] = {fact: number for number, fact in enumerate(named)}
    entries = [(numbers[fact], context) for context, told in enumerate(facts) for fact in set(told) if fact in numbers]
    rows, columns = np.array(entries, dtype=np.int64).reshape(-1, 2).T
    ones = np.ones(len(rows), dtype=np.float32)
    holds = sparse.csr_array((ones, (rows, columns)), shape=(len(named), len(facts)))
    return Predicates([kind for kind, _ in named], [text for _, text in named], holds)


def _template_rows(tokens: "TokenTable", prompt_of_row: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "prompts places"]:
    """The rows of each prompt's tokens after its text, those that all prompts have, counted from the end."""
    rows = np.flatnonzero(tokens.role == Role.SUFFIX)
    counts = np.bincount(prompt_of_row[rows], minlength=int(prompt_of_row.max(initial=-1)) + 1)
    if not len(counts) or not counts.min():
        return np.zeros((len(counts), 0), dtype=np.int64)
    order = rows[np.argsort(prompt_of_row[rows], kind="stable")]
    return order[np.cumsum(counts)[:, None] - np.arange(counts.min(), 0, -1)]


def _places(
    values: Float[np.ndarray, "rows features"],
    template: Int[np.ndarray, "prompts places"],
    text: Int[np.ndarray, " tokens"],
    prompt_of_row: Int[np.ndarray, " rows"],
    made_on: Bool[np.ndarray, " prompts"],
) -> Int[np.ndarray, " features"]:
    """Where each feature is looked at, judged by the first half: a column of `template`, or -1 for the text.

    At the template where more than half of the peaks of its prompts lie there, weighted by their values; of its tokens
    the one at which the value differs most between prompts.
    """
    if not template.shape[1]:
        return np.full(values.shape[1], -1)
    text = text[made_on[prompt_of_row[text]]]
    in_text = np.zeros((len(made_on), values.shape[1]))
    starts = np.flatnonzero(np.diff(prompt_of_row[text], prepend=-1))
    if len(starts):
        in_text[prompt_of_row[text[starts]]] = np.maximum.reduceat(values[text], starts)
    of_template = values[template[made_on]]
    peaks, others = of_template.max(1, initial=0), in_text[made_on]
    in_template = np.where(peaks >= others, peaks, 0).sum(0) > np.where(peaks < others, others, 0).sum(0)
    return np.where(in_template, of_template.std(0).argmax(0), -1)


def _place(tokens: Int[np.ndarray, " prompts"], place: int, n_places: int, token_text: Callable[[int], str]) -> str:
    """What a token of the template is called."""
    text = f" {_quoted(token_text(int(tokens[0])))}" if (tokens == tokens[0]).all() else ""
    last = place == n_places - 1
    return f"the last token{text}" if last else f"template token {place + 1} of {n_places}{text}"


def _quoted(token: str) -> str:
    return f"“{''.join(_SIGNS.get(character, character) for character in token.strip(' ')) or ' '}”"

"""What a feature means: one pass over the store against slow loops over every prompt, and labels that a reader gave."""

import json
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SITES, TEXTS

from sfc.behaviors.behavior import Words
from sfc.circuits.problem import Problem
from sfc.core.errors import UserError
from sfc.features.activity import AFTER, BEFORE, BIN_EDGES, activity, prompt_blocks
from sfc.features.cards import feature_cards, fires_on, nearest_neighbours, neuronpedia_page
from sfc.features.labels import LABELS_FILE, caption, own_labels, with_own_labels
from sfc.models.loading import Model
from sfc.saes.dictionary import Dictionary
from sfc.saes.store import Store

GROUPS = np.array([0, 1, 0, 2, 1, 0])
FEATURES = [3, 40, 7, 0, 21]
GROUPS_AS_WRITTEN = [
    {"population": "toxic", "category": "violence", "n_prompts": 10},
    {"population": "safe", "category": "violence", "n_prompts": 10},
    {"population": "hard", "category": "violence", "n_prompts": 30},
    {"population": "toxic", "category": "privacy", "n_prompts": 99},
]


@pytest.fixture(scope="module")
def store(problem: Problem) -> Store:
    return problem.store


def _values_by_prompt(store: Store, dictionary: Dictionary) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Prompt, its rows in the store, and the dense values there."""
    for prompt in np.unique(store.tokens.prompt):
        rows = np.flatnonzero(store.tokens.prompt == prompt)
        values = dictionary.encode(store.read(dictionary.site, int(rows[0]), int(rows[-1]) + 1)).detach().numpy()
        yield int(prompt), rows, values


@pytest.mark.parametrize("block_rows", [1, 30, 4096])
@pytest.mark.parametrize("site", SITES)
def test_one_pass_finds_what_a_loop_over_prompts_finds(
    store: Store, dictionaries: dict[str, Dictionary], site: str, block_rows: int
) -> None:
    n_contexts = 4
    is_kept = np.isin(store.tokens.prompt, [1, 4])
    measured = activity(store, dictionaries[site], FEATURES, GROUPS, is_kept, n_contexts, block_rows)
    by_prompt = list(_values_by_prompt(store, dictionaries[site]))
    dense = np.zeros((store.n_tokens, dictionaries[site].d_sae))
    for _, rows, values in by_prompt:
        dense[rows] = values
    np.testing.assert_allclose(measured.kept, dense[is_kept][:, FEATURES], atol=1e-5)
    for number, feature in enumerate(FEATURES):
        peaks = [(values[:, feature].max(), prompt, rows, values[:, feature]) for prompt, rows, values in by_prompt]
        best = sorted((p for p in peaks if p[0] > 0), key=lambda p: -p[0])[:n_contexts]
        found = [int(row) for row in measured.peak_rows[number] if row >= 0]
        assert found == [int(rows[values.argmax()]) for _, _, rows, values in best]
        assert len({int(store.tokens.prompt[row]) for row in found}) == len(found)
        for window, (*_, values) in zip(measured.windows[number], best, strict=False):
            padded = np.pad(values, (BEFORE, AFTER))
            middle = int(values.argmax())
            np.testing.assert_allclose(window, padded[middle : middle + BEFORE + 1 + AFTER], atol=1e-5)
        active = np.concatenate([values[values > 0] for *_, values in peaks])
        np.testing.assert_array_equal(measured.counts[number], np.histogram(active, BIN_EDGES)[0])
        for group in range(3):
            of_group = [peak for peak, prompt, *_ in peaks if GROUPS[prompt] == group]
            assert measured.firing[number, group] == pytest.approx(np.mean([peak > 0 for peak in of_group]))
            assert measured.mean_peak[number, group] == pytest.approx(np.mean(of_group), abs=1e-5)


@pytest.mark.parametrize("block_rows", [1, 25, 60, 10**6])
def test_blocks_hold_whole_prompts_and_no_more_rows_than_asked(store: Store, block_rows: int) -> None:
    blocks = prompt_blocks(store, block_rows)
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(store.n_tokens))
    prompts = [set(store.tokens.prompt[start:stop].tolist()) for start, stop in blocks]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == len(TEXTS)
    assert all(stop - start <= block_rows or len(p) == 1 for (start, stop), p in zip(blocks, prompts, strict=True))


def test_a_feature_that_never_fires_has_no_contexts(store: Store, dictionaries: dict[str, Dictionary]) -> None:
    dictionary = dictionaries[SITES[0]]
    fired = (np.concatenate([values for *_, values in _values_by_prompt(store, dictionary)]) > 0).any(0)
    silent = int(np.flatnonzero(~fired)[0])
    measured = activity(store, dictionary, [silent], GROUPS, np.zeros(store.n_tokens, dtype=bool))
    assert (measured.peak_rows == -1).all() and not measured.windows.any() and not measured.firing.any()


def test_neighbours_are_the_features_of_largest_cosine() -> None:
    decoder = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 31)[:, None]
    found = nearest_neighbours(decoder, [4, 11], count=3)
    for feature, neighbours in zip([4, 11], found, strict=True):
        cosines = {
            other: float(torch.cosine_similarity(decoder[feature], decoder[other], dim=0))
            for other in range(30)
            if other != feature
        }
        best = sorted(cosines, key=lambda other: -cosines[other])[:3]
        assert [n.feature for n in neighbours] == best
        assert [n.cosine for n in neighbours] == pytest.approx([cosines[other] for other in best], abs=1e-5)
    assert len(nearest_neighbours(decoder[:3], [0])[0]) == 2


@pytest.mark.parametrize(
    ("mean_peak", "expected"),
    [
        ([2, 1, 1, 0], "toxic"),
        ([1.9, 1, 1, 50], "shared"),
        ([1, 8, 0, 0], "safe"),
        ([1, 4, 1, 0], "shared"),
        ([1, 0, 0, 0], "toxic"),
        ([0, 0, 0, 5], "shared"),
    ],
)
def test_a_feature_belongs_to_the_side_on_which_it_peaks_twice_as_high(mean_peak: list[float], expected: str) -> None:
    assert fires_on(mean_peak, GROUPS_AS_WRITTEN, "violence", Words()) == expected


def test_without_prompts_on_both_sides_a_feature_is_shared() -> None:
    assert fires_on([0, 0, 0, 5], GROUPS_AS_WRITTEN, "privacy", Words()) == "shared"


def test_own_labels_are_read_and_checked(tmp_path: Path) -> None:
    known = ["resid_post.0/F3"]
    assert own_labels(tmp_path, known) == {}
    (tmp_path / LABELS_FILE).write_text(json.dumps({"resid_post.0/F3": "mine"}))
    assert own_labels(tmp_path, known) == {"resid_post.0/F3": "mine"}
    cards = {"groups": [], "features": {"resid_post.0/F3": {"label": "x", "score": 0.8, "max": 1}}}
    assert caption(cards["features"]["resid_post.0/F3"]) == "x · 0.80"
    own = with_own_labels(cards, tmp_path)["features"]["resid_post.0/F3"]
    assert own == {"label": "mine", "score": None, "max": 1} and caption(own) == "mine"
    with pytest.raises(UserError, match="no feature of this circuit"):
        own_labels(tmp_path, ["resid_post.1/F3"])
    (tmp_path / LABELS_FILE).write_text('{"resid_post.0/F3": 1}')
    with pytest.raises(UserError, match="labels by feature"):
        own_labels(tmp_path, known)


def test_a_feature_has_a_page_at_neuronpedia_where_its_dictionary_says_so() -> None:
    config = {"d_sae": 10, "metadata": {"neuronpedia_id": "gpt2-small/8-res-jb"}}
    assert neuronpedia_page(config, 3) == "https://www.neuronpedia.org/gpt2-small/8-res-jb/3"
    assert neuronpedia_page(config, 10) is None, "a feature that stands for the row's scale is none of theirs"
    assert neuronpedia_page({"d_sae": 10, "metadata": {}, "neuronpedia_id": "a/b"}, 0) is not None
    for name in (None, "javascript:alert(1)", "a/b/../..", "//example.org"):
        assert neuronpedia_page({"d_sae": 10, "metadata": {"neuronpedia_id": name}}, 3) is None


def test_cards_say_what_was_measured(store: Store, dictionaries: dict[str, Dictionary], model: Model) -> None:
    graph = nx.DiGraph(category="violence")
    for site, feature in ((SITES[0], 3), (SITES[1], 40)):
        layer = int(site.split(".")[1])
        graph.add_node(f"resid_post.{layer}/F{feature}", site=site, kind="feature", raises=["a"], lowers=["b"])
    graph.add_node("resid_post.1/error", site=SITES[1], kind="error")
    kinds = ["toxic", "hard", "safe_80k"] * 2
    prompts = pd.DataFrame({"prompt": TEXTS, "category": "violence", "dataset_type": kinds})
    cards, evidence = feature_cards(
        store, dictionaries, graph, list(graph), prompts, lambda token: model.tokenizer.decode([token]), Words()
    )
    assert [tuple(group.values()) for group in cards["groups"]] == [
        ("toxic", "violence", 2), ("hard", "violence", 2), ("safe", "violence", 2)
    ]  # fmt: skip
    assert list(cards["features"]) == ["resid_post.0/F3", "resid_post.1/F40"]
    assert json.loads(json.dumps(cards, allow_nan=False)) == cards
    card = cards["features"]["resid_post.0/F3"]
    assert card["raises"] == ["a"] and card["fires_on"] in ("toxic", "safe", "shared")
    assert (card["label"], card["score"]) == (evidence["resid_post.0/F3"].label, evidence["resid_post.0/F3"].score)
    values = np.concatenate([v for *_, v in _values_by_prompt(store, dictionaries[SITES[0]])])[:, 3]
    assert card["max"] == pytest.approx(values.max(), rel=1e-3)
    assert card["density"] == pytest.approx((values > 0).mean(), rel=1e-3)
    assert sum(card["histogram"]["counts"]) == (values > 0).sum()
    prompt_texts = [[model.tokenizer.decode([int(i)]) for i in p.ids] for p in model.tokenize(TEXTS)]
    contexts, dense = evidence["resid_post.0/F3"], np.zeros(store.n_tokens)
    for _, rows, of_prompt in _values_by_prompt(store, dictionaries[SITES[0]]):
        dense[rows] = of_prompt[:, 3]
    np.testing.assert_allclose(contexts.values, dense[contexts.rows], atol=1e-5)
    for context in card["contexts"]:
        assert context["values"][context["peak"]] == max(context["values"]) > 0
        assert any("".join(context["tokens"]) in "".join(texts) for texts in prompt_texts)

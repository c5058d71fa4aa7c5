"""Circuits of SAEs from another seed: matching against a double loop, agreement by hand, and the command."""

import shutil
from html import escape
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from commands import Finished, sfc
from drawn_circuits import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sfc.circuits.stability import chance_overlap
from sfc.core.artifacts import MANIFEST, read_json, write_csv, write_json
from sfc.core.experiments import load_experiment
from sfc.pages.html import page_html
from sfc.run import Run
from sfc.saes import quality
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.format import load_dictionary, save_dictionary
from sfc.saes.nulls import rotated_dictionaries
from sfc.saes.quality import SAME, Matching, match_features
from sfc.session import Session
from sfc.studies import study
from sfc.studies.replicate import (
    ORIGINAL,
    REPLICATION,
    ReplicationOptions,
    cosines_figure,
    effects_figure,
)
from sfc.studies.replicate.measure import (
    chance_agreement,
    circuit_agreement,
    cosine_counts,
    matched_nodes,
    share_with_partner,
    site_counts,
)
from sfc.studies.study import RESULT, STUDIES, ensure
from sfc.studies.train.rows import training_rows

SITE, SECOND_SITE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
SMALL = (
    "prompts.limit=14", "saes.steps=30", "evaluation.min_denominator=1e-6", "evaluation.random_draws=2",
    "discovery.checked_nodes=2", "discovery.method=attribution",
    "discovery.baseline=safe-mean", "evaluation.error_mode=node", "evaluation.sizes=[32]",
)  # fmt: skip
TINY = ("replicate", "--preset", "tiny", *(part for setting in SMALL for part in ("--set", setting)))

decoders = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))


def _decoders(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    n, m, seed = shape
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=random), torch.randn(m, 3, generator=random)


def _slow(first: torch.Tensor, second: torch.Tensor) -> tuple[list[int], list[float]]:
    """Partners and best cosines of the first's features, pair by pair."""

    def nearest(row: torch.Tensor, others: torch.Tensor) -> tuple[float, int]:
        cosines = [float(torch.cosine_similarity(row, other, dim=0)) for other in others]
        return max(cosines), cosines.index(max(cosines))

    partners, best = [], []
    for number, row in enumerate(first):
        cosine, other = nearest(row, second)
        best.append(cosine)
        partners.append(other if nearest(second[other], first)[1] == number else -1)
    return partners, best


@given(decoders, st.integers(1, 40))
def test_matching_is_what_a_double_loop_says_in_blocks_of_any_size(shape: tuple, entries: int) -> None:
    a, b = _decoders(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "_ENTRIES", entries)
        matchings = match_features(a, b)
    for found, (partners, best) in zip(matchings, (_slow(a, b), _slow(b, a)), strict=True):
        assert found.partner.tolist() == partners
        np.testing.assert_allclose(found.cosine, best, atol=1e-5)


@given(decoders)
def test_partners_are_mutual_and_no_feature_has_two(shape: tuple) -> None:
    a, b = _decoders(shape)
    of_a, of_b = match_features(a, b)
    swapped_b, swapped_a = match_features(b, a)
    assert of_a.partner.tolist() == swapped_a.partner.tolist() and of_b.partner.tolist() == swapped_b.partner.tolist()
    pairs = [(number, partner) for number, partner in enumerate(of_a.partner.tolist()) if partner >= 0]
    assert len({partner for _, partner in pairs}) == len(pairs) >= 1
    assert all(of_b.partner[partner] == number for number, partner in pairs)
    assert (of_b.partner >= 0).sum() == len(pairs)


@given(decoders, st.floats(0.01, 100))
def test_other_numbers_and_other_lengths_change_nothing(shape: tuple, factor: float) -> None:
    a, b = _decoders(shape)
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(1))
    plain, (permuted, of_permuted) = match_features(a, b)[0], match_features(a, b[order])
    assert [order[partner] if partner >= 0 else -1 for partner in permuted.partner] == plain.partner.tolist()
    assert of_permuted.partner.tolist() == match_features(a, b)[1].partner[order.numpy()].tolist()
    lengths = factor * (1 + torch.rand(len(a), 1, generator=torch.Generator().manual_seed(2)))
    scaled = match_features(a * lengths, b)[0]
    assert scaled.partner.tolist() == plain.partner.tolist()
    np.testing.assert_allclose(scaled.cosine, plain.cosine, atol=1e-5)


@given(decoders)
def test_every_feature_is_its_own_partner(shape: tuple) -> None:
    a, _ = _decoders(shape)
    for found in match_features(a, a):
        assert found.same.tolist() == list(range(len(a)))
        np.testing.assert_allclose(found.cosine, 1, atol=1e-5)


def test_the_same_by_hand() -> None:
    """East, north and 40 degrees against east, 50 degrees and west: 50 degrees is nearer to 40 than to north."""
    degrees = [torch.deg2rad(torch.tensor(angles)) for angles in ([0.0, 90.0, 40.0], [0.0, 50.0, 180.0])]
    a, b = (torch.stack([angles.cos(), angles.sin()], 1) for angles in degrees)
    of_a, of_b = match_features(a, b)
    assert of_a.partner.tolist() == [0, -1, 1] and of_b.partner.tolist() == [0, 2, -1]
    np.testing.assert_allclose(of_a.cosine, np.cos(np.deg2rad([0, 40, 10])), atol=1e-6)
    apart = torch.tensor([[SAME - 0.01, (1 - (SAME - 0.01) ** 2) ** 0.5]])
    (far, _) = match_features(torch.tensor([[1.0, 0.0]]), apart)
    assert far.partner.tolist() == [0] and far.same.tolist() == [-1], "the nearest may not be near enough"


def _circuit(effects: dict[str, float]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for name, effect in effects.items():
        site = SITE if name.startswith("resid_post.0") else SECOND_SITE
        graph.add_node(name, site=site, kind="error" if name.endswith("error") else "feature", effect=effect)
    return graph


def _by_hand() -> tuple[pd.DataFrame, dict[str, tuple[Matching, Matching]]]:
    """Features 0 and 1 of site 0 are 1 and 0 again; 2 is too far from its partner. Site 1 has nothing in common."""
    near, far = np.array([0.9, 0.8, 0.5, 0.3]), np.full(4, 0.2)
    of_first = Matching(np.array([1, 0, 3, -1]), near), Matching(np.array([1, 0, -1, 2]), near[[1, 0, 3, 2]])
    nothing = Matching(np.full(4, -1), far), Matching(np.full(4, -1), far)
    original = _circuit({"resid_post.0/F0": 3.0, "resid_post.0/F2": -2.0, "resid_post.0/error": 1.0,
                         "resid_post.1/F1": 0.5})  # fmt: skip
    replication = _circuit({"resid_post.0/F1": 4.0, "resid_post.0/F0": 1.5, "resid_post.0/error": -2.0,
                            "resid_post.1/F1": 0.5, "resid_post.1/error": 0.25})  # fmt: skip
    matchings = {SITE: of_first, SECOND_SITE: nothing}
    return matched_nodes(original, replication, matchings), matchings


def test_nodes_by_hand() -> None:
    nodes, _ = _by_hand()
    told = nodes[["node", "partner", "circuit", "effect", "replication_effect"]].astype(object)
    assert told.where(told.notna(), None).to_numpy().tolist() == [
        ["resid_post.0/F0", "resid_post.0/F1", "both", 3.0, 4.0],
        ["resid_post.0/F2", None, "original", -2.0, None],
        ["resid_post.0/error", "resid_post.0/error", "both", 1.0, -2.0],
        ["resid_post.1/F1", None, "original", 0.5, None],
        ["resid_post.0/F1", "resid_post.0/F0", "replication", None, 1.5],
        [None, "resid_post.1/F1", "replication", None, 0.5],
        ["resid_post.1/error", "resid_post.1/error", "replication", None, 0.25],
    ]
    cosines = nodes["cosine"].tolist()
    assert cosines == pytest.approx([0.9, 0.5, np.nan, 0.2, 0.8, 0.2, np.nan], nan_ok=True)


def test_agreement_by_hand() -> None:
    nodes, matchings = _by_hand()
    sites = site_counts(nodes, matchings).assign(matched_chance=[1, 0])
    columns = ["features", "matched", "original", "replication", "shared"]
    assert sites.index.tolist() == [SITE, SECOND_SITE]
    assert sites[columns].to_numpy().tolist() == [[4, 2, 3, 3, 2], [4, 0, 1, 2, 0]]
    found = circuit_agreement(nodes, sites)
    assert found["n_shared"] == 2 and found["jaccard"] == pytest.approx(2 / 7)
    # Features of site 0: 2 of 4 and 2 of 4, of which 2 are the same; the error of site 0 is in both.
    shared = 2 * 2 * 2 / 16 + 1
    assert found["chance"] == pytest.approx(shared / (4 + 5 - shared))
    # Known to both: F0 and the error of site 0 against F0, F1, the error of site 0 and that of site 1.
    assert found["matched_jaccard"] == pytest.approx(2 / 4)
    shared = 1 * 2 * 2 / 4 + 1
    assert found["matched_chance"] == pytest.approx(shared / (2 + 4 - shared))
    assert found["matched_share"] == 2 / 8 and found["matched_share_chance"] == 1 / 8
    assert found["rank_correlation"] == 1 and found["sign_agreement"] == 0.5 and found["n_signed"] == 2
    assert share_with_partner(nodes, ORIGINAL) == pytest.approx(1 / 3)
    assert share_with_partner(nodes, REPLICATION) == pytest.approx(2 / 3)


def test_circuits_that_have_nothing_to_compare_have_no_figure() -> None:
    nothing = Matching(np.full(4, -1), np.full(4, 0.2))
    matchings = {SITE: (nothing, nothing)}
    nodes = matched_nodes(_circuit({"resid_post.0/F0": 1.0}), _circuit({"resid_post.0/F0": 1.0}), matchings)
    found = circuit_agreement(nodes, site_counts(nodes, matchings).assign(matched_chance=0))
    assert len(nodes) == 2 and found["jaccard"] == found["chance"] == 0
    assert found["matched_jaccard"] is found["matched_chance"] is found["rank_correlation"] is None
    only_errors = matched_nodes(_circuit({"resid_post.0/error": 1.0}), _circuit({"resid_post.0/F0": 1.0}), matchings)
    assert share_with_partner(only_errors, ORIGINAL) is None


def test_agreement_by_chance_is_that_of_random_circuits() -> None:
    first, second, matched, sizes = (np.array(c) for c in ([10, 4, 1], [6, 7, 1], [25, 3, 1], [40, 12, 1]))
    random = np.random.default_rng(0)

    def circuit(counts: np.ndarray, dictionary: str) -> set[tuple]:
        """The first `matched` nodes of each group have the same name in both dictionaries."""
        drawn = set()
        for group, count in enumerate(counts):
            for node in random.permutation(sizes[group])[:count]:
                drawn.add((group, node, "" if node < matched[group] else dictionary))
        return drawn

    pairs = [(circuit(first, "a"), circuit(second, "b")) for _ in range(3000)]
    jaccard = np.mean([len(a & b) / len(a | b) for a, b in pairs])
    assert chance_agreement(first, second, matched, sizes) == pytest.approx(jaccard, rel=0.03)
    assert chance_agreement(first, first, sizes, sizes) == pytest.approx(chance_overlap(first, sizes))


def _run(root: Path, *overrides: str) -> Run:
    return Run(load_experiment("tiny", [*SMALL, *overrides]), root)


def test_no_seed_of_their_own_leaves_the_identity_of_saes_alone(tmp_path: Path) -> None:
    plain, other = _run(tmp_path), _run(tmp_path, "saes.seed=3")
    assert "seed" not in plain.experiment.saes.identity() and other.experiment.saes.identity()["seed"] == 3
    assert plain.saes.inputs["saes"] == {key: v for key, v in other.saes.inputs["saes"].items() if key != "seed"}
    assert plain.experiment.sae_seed == 0 and other.experiment.sae_seed == 3


@pytest.fixture(scope="module")
def replicated(root: Path) -> Finished:
    return sfc(*TINY, "--json", root=root)


def _replicated(run: Run, sae_seed: int) -> study.Finished:
    return ensure(STUDIES["replicate"], run.having(ReplicationOptions, sae_seed=sae_seed))


def _weights(run: Run) -> list[torch.Tensor]:
    return [load_file(path)["W_dec"] for path in sorted(run.saes.folder.glob("*/sae_weights.safetensors"))]


def test_the_command(replicated: Finished, root: Path) -> None:
    result = replicated.result
    nodes = pd.read_csv(root / result["files"]["nodes"])
    for name in (ORIGINAL, REPLICATION):
        circuit = read_json(root / "circuits" / "tiny" / result[name]["circuit"] / "result.json")
        for figure in ("n_nodes", "faithfulness", "completeness", "completeness_low", "gap_kept", "separation", "says"):
            assert result[name][figure] == circuit[figure]
        assert nodes["circuit"].isin(["both", name]).sum() == circuit["n_nodes"]
    assert [result[name]["sae_seed"] for name in (ORIGINAL, REPLICATION)] == [0, 1]
    assert result["jaccard"] == pytest.approx((nodes["circuit"] == "both").mean(), abs=1e-4)
    assert sum(row["shared"] for row in result["sites"]) == result["n_shared"]
    assert sum(row["matched_chance"] for row in result["sites"]) / 256 == pytest.approx(
        result["matched_share_chance"], abs=1e-4
    )
    page = (root / result["files"]["page"]).read_text(encoding="utf-8")
    assert page.count('class="figure"') == 2 and "resid_post.1" in page
    assert escape(result["says"]) in page and escape(result[ORIGINAL]["says"][1:]) in page


def test_other_seeds_train_on_the_same_rows_to_other_weights(replicated: Finished, root: Path) -> None:
    assert replicated.status == 0
    plain, other = _run(root), _run(root, "saes.seed=1")
    assert plain.store.folder == other.store.folder and plain.saes.is_complete() and other.saes.is_complete()
    for mine, theirs in zip(_weights(plain), _weights(other), strict=True):
        assert mine.shape == theirs.shape and (mine - theirs).abs().max() > 0.1
    assert (
        training_rows(Session(plain)).table["held_out"].tolist()
        == training_rows(Session(other)).table["held_out"].tolist()
    )


def test_a_seed_of_their_own_stands_in_for_that_of_the_experiment(replicated: Finished, root: Path) -> None:
    """With the experiment's own seed written down, the same weights come out."""
    assert replicated.status == 0
    written_down = _run(root, "saes.seed=0")
    assert written_down.saes.folder != _run(root).saes.folder
    settings = [part for setting in (*SMALL, "saes.seed=0") for part in ("--set", setting)]
    assert sfc("train", "--preset", "tiny", *settings, root=root).status == 0
    for mine, theirs in zip(_weights(_run(root)), _weights(written_down), strict=True):
        assert torch.equal(mine, theirs)


def test_dictionaries_in_another_order_give_the_same_circuit(replicated: Finished, root: Path, tmp_path: Path) -> None:
    """SAEs that are the original's with other numbers stand in for those of seed 2: everything comes back."""
    assert replicated.status == 0
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    run, other = _run(tmp_path), _run(tmp_path, "saes.seed=2")
    shutil.copytree(run.saes.folder, other.saes.folder)
    for site in run.experiment.activations.sites:
        dictionary = load_dictionary(run.saes.folder / site)
        assert isinstance(dictionary, TopKDictionary)
        order = torch.randperm(dictionary.d_sae, generator=torch.Generator().manual_seed(5))
        weights = {"W_enc": dictionary.W_enc[:, order], "b_enc": dictionary.b_enc[order],
                   "W_dec": dictionary.W_dec[order], "b_dec": dictionary.b_dec}  # fmt: skip
        permuted = TopKDictionary(weights, k=dictionary.k, site=site)
        save_dictionary(permuted, other.saes.folder / site, {})
    other.saes.finish()
    result = _replicated(run, 2).result
    assert result["n_shared"] > 10
    assert result["matched_share"] == result["jaccard"] == result["matched_jaccard"] == 1
    assert result["rank_correlation"] == pytest.approx(1, abs=1e-3)
    for figure in ("n_nodes", "faithfulness", "completeness_normalised"):
        assert result[ORIGINAL][figure] == pytest.approx(result[REPLICATION][figure], abs=2e-3)


def test_halves_of_the_prompts_have_dictionaries_and_circuits_of_their_own(replicated: Finished, root: Path) -> None:
    assert replicated.status == 0
    result = sfc(*TINY, "--halves", "--json", root=root).result
    assert [result[name]["half"] for name in (ORIGINAL, REPLICATION)] == ["first", "second"]
    first, second = (_run(root, f"saes.half={half}") for half in ("first", "second"))
    assert len({first.saes.folder, second.saes.folder, _run(root).saes.folder}) == 3
    matchings = match_features(_weights(first)[0], _weights(second)[0])
    assert result["sites"][0]["matched"] == (matchings[0].same >= 0).sum()
    page = (root / result["files"]["page"]).read_text(encoding="utf-8")
    assert "Halves of the prompts" in page and "first half" in page


def test_a_turned_dictionary_matches_by_chance_only(replicated: Finished, root: Path) -> None:
    first, second = (load_dictionary(_run(root, *seed).saes.folder / SITE) for seed in ((), ("saes.seed=1",)))
    turned = rotated_dictionaries({SITE: second}, 0)[SITE].W_dec
    [row] = [row for row in replicated.result["sites"] if row["site"] == SITE]
    expected, _ = match_features(first.W_dec, turned)
    assert row["matched_chance"] == (expected.same >= 0).sum() <= row["matched"]
    assert row["median_cosine_chance"] == pytest.approx(np.median(expected.cosine), abs=1e-3)


def test_the_page_escapes_names_and_says_when_nothing_is_shared(
    replicated: Finished, root: Path, tmp_path: Path
) -> None:
    result = {**replicated.result, "category": HOSTILE[0], "preset": HOSTILE[1], "effect_unit": HOSTILE[2]}
    result[ORIGINAL] = {**result[ORIGINAL], "circuit": HOSTILE[3]}
    nodes, matchings = _by_hand()
    cosines = matchings[SITE][0].cosine
    counts = cosine_counts(nodes, cosines)
    write_csv(tmp_path / "nodes.csv", nodes.assign(node=HOSTILE[:7]))
    write_csv(tmp_path / "cosines.csv", counts)
    write_json(tmp_path / RESULT, result)
    made = read_json((root / replicated.result["files"]["result"]).with_name(MANIFEST))
    text = page_html(STUDIES["replicate"].page(study.Finished(tmp_path, made)))
    assert not any(hostile in text for hostile in HOSTILE[:4])
    everything, in_circuit = cosines_figure(counts, result).to_dict()["data"]
    assert everything["name"] == "all features (4)" and sum(everything["y"]) == pytest.approx(1)
    assert in_circuit["name"] == "the circuit's features (3)" and sum(in_circuit["y"]) == pytest.approx(1)
    points = {each.get("name"): list(each["y"]) for each in effects_figure(nodes, result).to_dict()["data"]}
    assert points["error nodes"] == [-2.0] and points["feature nodes"] == [4.0]
    alone = effects_figure(nodes[nodes["circuit"] != "both"], result).to_dict()
    assert alone["layout"]["annotations"][0]["text"] == "No node is in both circuits."


def test_the_experiments_own_saes_keep_their_name(replicated: Finished, root: Path) -> None:
    """Compared with those of seed 1, SAEs of the experiment's seed are the ones that are there already."""
    assert replicated.status == 0
    finished = _replicated(_run(root, "saes.seed=1"), 0)
    assert finished.inputs["replication"]["saes"] == _run(root).saes.inputs
    result = finished.result
    assert result["n_shared"] == replicated.result["n_shared"] and result["jaccard"] == replicated.result["jaccard"]
    assert [result[name]["sae_seed"] for name in (ORIGINAL, REPLICATION)] == [1, 0]

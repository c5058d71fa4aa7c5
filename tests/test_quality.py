"""The quality of dictionaries whose figures are known by hand, streamed as well as at once, and what a run writes."""

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_dictionary
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfc.core.experiments import load_experiment
from sfc.data.render import Role
from sfc.models.score import auroc
from sfc.run import Run
from sfc.saes.dictionary import Dictionary, TopKDictionary
from sfc.saes.format import Dictionaries
from sfc.saes.kernels import Sparse, weighted_row_sums
from sfc.saes.quality import ALL, Quality, match_features, quality_by_role, reconstruction_quality
from sfc.saes.store import Store
from sfc.session import Session
from sfc.studies.study import Finished, ensure
from sfc.studies.train import TRAIN
from sfc.studies.train.probing import COLUMNS, pooled, pooled_features, sparse_probe
from sfc.studies.train.rows import is_deciding, training_rows

SITE = "blocks.0.hook_resid_post"
C, S = Role.CONTENT, Role.SUFFIX


class Threshold:
    """Features are the coordinates above 1; rows have as many entries as the fullest one, padded with feature 0."""

    site, d_in, d_parts, d_sae = SITE, 4, 4, 4
    W_dec, b_dec = torch.eye(4), torch.zeros(4)

    def encode(self, x: Tensor) -> Tensor:
        return x * (x > 1)

    def encode_sparse(self, x: Tensor) -> Sparse:
        f = self.encode(x)
        values, indices = f.sort(dim=1, descending=True)
        entries = int((f > 0).sum(dim=1).max())
        values = values[:, :entries]
        return Sparse(values, indices[:, :entries] * (values > 0))

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        return weighted_row_sums(values, indices, self.W_dec)


def half_blind() -> TopKDictionary:
    """In two dimensions: feature 0 is the first coordinate, 1 is half of the second one, 2 never fires."""
    weights = {
        "W_enc": torch.tensor([[1.0, 0, 1], [0, 0.5, 0]]),
        "b_enc": torch.tensor([0.0, 0, -100]),
        "W_dec": torch.tensor([[1.0, 0], [0, 1], [1, 0]]),
        "b_dec": torch.zeros(2),
    }
    return TopKDictionary(weights, k=3, site=SITE)


def test_figures_by_role_that_are_known_by_hand() -> None:
    rows = torch.tensor([[1.0, 0], [0, 2], [3, 0], [2, 0], [0, 4], [2, 0]])
    measured = quality_by_role(half_blind(), [(rows, np.array([C, S, C, C, S, C]))])
    assert list(measured) == [ALL, "content", "suffix"]
    # Content is reconstructed as it is, the suffix halved: errors of 1 and 2 around a mean of (0, 3).
    assert measured["content"].quality == pytest.approx(Quality(4, 0, 1, 1, 2 / 3, 1 / 3))
    assert measured["suffix"].quality == pytest.approx(Quality(2, 5 / 2, 1, 1, 2 / 3, 1 / 3))
    # Of all, the variance is that around (4/3, 1): (18 - 6 * 16/9) + (20 - 6).
    assert measured[ALL].quality == pytest.approx(Quality(6, 5 / (22 / 3 + 14), 1, 1, 1 / 3, 2 / 3))
    rates = {role: m.firing_rate.tolist() for role, m in measured.items()}
    assert rates == {ALL: pytest.approx([4 / 6, 2 / 6, 0]), "content": [1, 0, 0], "suffix": [0, 1, 0]}


def test_padded_entries_do_not_count_and_rows_differ_in_their_number() -> None:
    rows = torch.tensor([[0.0, 5, 0, 0], [0, 2, 2, 2], [0, 0, 1, 0]])
    dictionary: Dictionary = Threshold()
    measured = quality_by_role(dictionary, [(rows, np.full(3, C))])[ALL]
    assert measured.firing_rate.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1 / 3])
    assert measured.quality.l0 == pytest.approx(4 / 3)
    assert measured.quality.dead_share == 1 / 4
    assert measured.quality.cosine == pytest.approx(2 / 3), "what is reconstructed as zero has cosine 0"


def test_dense_is_more_than_a_tenth_of_the_rows() -> None:
    rows = torch.zeros(20, 4)
    rows[:2, 0] = rows[:3, 1] = rows[:1, 2] = 2
    quality = reconstruction_quality(Threshold(), rows)
    assert (quality.dense_share, quality.dead_share) == (1 / 4, 1 / 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([0.0, 300.0]), st.integers(0, 99))
def test_streamed_is_at_once_and_both_are_the_definition(cuts: list[int], mean: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rows = mean + 2 * torch.randn(40, 32, generator=random)
    roles = torch.randint(1, 3, (40,), generator=random).numpy()
    dictionary = random_dictionary(SITE, seed=seed)
    edges = sorted({0, *cuts, 40})
    blocks = [(rows[i:j], roles[i:j]) for i, j in pairwise(edges)]
    streamed = quality_by_role(dictionary, iter([*blocks, (rows[:0], roles[:0])]))
    for name, of_role in ((ALL, roles > 0), ("content", roles == C), ("suffix", roles == S)):
        x = rows[torch.from_numpy(of_role)]
        expected = _definition(dictionary, x)
        assert streamed[name].quality == pytest.approx(expected, rel=1e-5)
        assert reconstruction_quality(dictionary, x) == pytest.approx(expected, rel=1e-5)
        active = dictionary.encode(x) > 0
        np.testing.assert_allclose(streamed[name].firing_rate, active.double().mean(0))


def _definition(dictionary: Dictionary, rows: Tensor) -> Quality:
    """Dense, in float64, row by row."""
    f = dictionary.encode(rows)
    x, x_hat = rows.double().numpy(), dictionary.decode(f).double().numpy()
    rates = (f > 0).double().mean(0).numpy()
    return Quality(
        rows=len(x),
        fvu=((x - x_hat) ** 2).sum() / (len(x) * x.var(axis=0).sum()),
        cosine=float(np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x, x_hat, strict=True)])),
        l0=rates.sum(),
        dead_share=(rates == 0).mean(),
        dense_share=(rates > 0.1).mean(),
    )


def test_a_stream_is_never_held() -> None:
    alive: list[weakref.ref] = []

    def blocks() -> Iterator[tuple[Tensor, np.ndarray]]:
        for _ in range(5):
            assert sum(ref() is not None for ref in alive) <= 1
            rows = torch.randn(8, 32)
            alive.append(weakref.ref(rows))
            yield rows, np.full(8, C)
            del rows

    assert quality_by_role(random_dictionary(SITE), blocks())[ALL].quality.rows == 40


@pytest.mark.parametrize("count", [0, 1, 3, 49])
def test_what_rows_do_not_define_is_nan(count: int) -> None:
    """No rows define nothing; rows that are all the same do not vary, whatever rounding makes of them."""
    quality = reconstruction_quality(random_dictionary(SITE), torch.full((count, 32), 1000 / 3))
    assert math.isnan(quality.fvu)
    assert [math.isnan(figure) for figure in quality[2:]] == [count == 0] * 4
    blocks = [(torch.full((1, 32), 1000 / 3), np.array([S]))] * count
    streamed = quality_by_role(random_dictionary(SITE), blocks)
    assert streamed[ALL].quality == pytest.approx(quality, nan_ok=True)
    assert len(streamed) == (2 if count else 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(load_experiment("tiny", ["activations.dtype=float32"]), root=tmp_path_factory.mktemp("run"))
    ensure(TRAIN, run)
    return run


def test_a_run_writes_a_row_per_site_and_role(run: Run) -> None:
    quality = pd.read_csv(run.saes.folder / "quality.csv")
    sites = run.experiment.activations.sites
    assert list(zip(quality["site"], quality["role"], strict=True)) == [
        *((site, role) for site in sites for role in ("all", "content", "suffix", "deciding")),
        ("all", "in series"),
    ]
    of_all = quality[quality["role"] == "all"]
    assert of_all["cross_entropy_zero_ablated"].notna().all() and of_all["score_recovered"].notna().all()
    assert quality.loc[quality["role"] != "all", "score_spliced"].isna().all()
    told = pd.DataFrame(Finished(run.saes.folder).result["quality"]).astype(quality.dtypes)
    pd.testing.assert_frame_equal(told, quality, atol=1e-5)


def test_a_runs_figures_are_those_of_the_rows_held_out(run: Run) -> None:
    store, rows = Store(run.corpus.folder), training_rows(Session(run))
    quality = pd.read_csv(run.saes.folder / "quality.csv").set_index(["site", "role"])
    density = pd.read_csv(run.saes.folder / "density.csv").set_index(["site", "feature"])
    held_out = rows.table["held_out"].to_numpy()[store.tokens.prompt]
    deciding = is_deciding(store.tokens)
    in_suffix = (store.tokens.role == S) & ~deciding
    assert 0 < held_out.sum() == (~rows.trained).sum() < 0.1 * store.n_tokens
    for site, dictionary in Dictionaries(run.saes.folder, run.experiment.activations.sites).items():
        x = torch.cat([store.read(site, *block) for block in store.blocks(10_000)])
        for name, of_role in (
            ("all", True), ("content", store.tokens.role == C), ("suffix", in_suffix), ("deciding", deciding)
        ):  # fmt: skip
            wanted = x[torch.from_numpy(held_out & of_role)]
            found = quality.loc[(site, name), list(Quality._fields)].tolist()
            assert found == pytest.approx(list(_definition(dictionary, wanted)), rel=1e-4)
            rates = (dictionary.encode(wanted) > 0).double().mean(0)
            np.testing.assert_allclose(density.loc[site, name], rates, atol=1e-5)


@pytest.fixture
def corpus_run(tmp_path: Path) -> Callable[..., Run]:
    """A run with dictionaries that are trained on another corpus."""

    def run(*settings: str) -> Run:
        settings = (*settings, "corpus.reply_tokens=5", "corpus.context=32")
        settings += ("prompts.limit=8", "saes.steps=10", "saes.batch_size=32")
        run = Run(load_experiment("tiny", settings), tmp_path)
        ensure(TRAIN, run)
        return run

    return run


def check_quality(run: Run, roles: list[str]) -> None:
    quality = pd.read_csv(run.saes.folder / "quality.csv")
    assert quality["role"].tolist() == [*roles * 2, "in series"]
    assert quality.loc[quality["role"] == "all", "score_recovered"].notna().all()
    assert (run.saes.folder / "quality.html").is_file()
    assert len(Dictionaries(run.saes.folder, run.experiment.activations.sites)) == 2


def test_a_corpus_of_texts_is_cut_into_pieces_and_spliced_into_prompts(
    corpus_run: Callable[..., Run], tmp_path: Path
) -> None:
    texts = [f"A sentence about the number {n}, which is neither long nor short." for n in range(200)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    run = corpus_run(f"corpus.source={tmp_path / 'texts.txt'}")
    check_quality(run, ["all", "content"])
    pieces = pd.read_csv(run.corpus.folder / "prompts.csv")
    assert len(pieces) >= 400 and set(pieces["split"]) == {"corpus"}
    assert "".join(pieces["prompt"][:3]).count("sentence about the number 0") == 1


def test_a_corpus_of_replies_has_their_rows_and_is_measured_by_their_role(corpus_run: Callable[..., Run]) -> None:
    run = corpus_run("corpus.replies=true")
    check_quality(run, ["all", "content", "suffix", "reply", "deciding"])
    tokens = Store(run.corpus.folder).tokens
    replies = np.bincount(tokens.prompt[tokens.role == Role.REPLY])
    assert replies.max() == 5 and (replies > 0).all()


def test_a_sparse_probe_reads_the_features_that_tell() -> None:
    """Of 40 columns, two of which tell the side, and one is noise a thousand times as large."""
    random = np.random.default_rng(0)
    positive, test = random.random(400) < 0.5, np.arange(400) >= 200
    values = random.normal(size=(400, 40))
    values[:, 7] += 2 * positive
    values[:, 9] -= 1.5 * positive
    values[:, 3] *= 1000
    one, two, dense = (sparse_probe(values, positive, test, size) for size in (1, 2, None))
    assert one == auroc(values[test, 7], positive[test])
    assert one is not None and two is not None and two > one > 0.85
    assert dense == pytest.approx(two, abs=0.05)
    shuffled = sparse_probe(values, random.permutation(positive), test, 5)
    assert shuffled == pytest.approx(0.5, abs=0.15)
    assert sparse_probe(values, test, test, 1) is None


def test_pooled_features_are_the_means_of_a_loop() -> None:
    dictionary, x = random_dictionary(SITE), torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    prompt_of_row = np.repeat([1, 0, 2], [20, 5, 25])
    of_features = pooled_features(dictionary, x, prompt_of_row)
    for found, dense in ((of_features, dictionary.encode(x)), (pooled(x, prompt_of_row), x)):
        slow = [dense[torch.from_numpy(prompt_of_row == prompt)].mean(0) for prompt in range(3)]
        np.testing.assert_allclose(found, torch.stack(slow), atol=1e-5)


def test_a_runs_features_tell_something_of_prompts_and_come_back_where_the_other_half_is_there(run: Run) -> None:
    quality = pd.read_csv(run.saes.folder / "quality.csv")
    told = quality.loc[quality["role"] == "all", COLUMNS]
    assert ((told >= 0) & (told <= 1)).all(axis=None) and quality["matched"].isna().all()
    sites, folders = run.experiment.activations.sites, []
    for half in ("first", "second"):
        saes = run.experiment.saes.model_copy(update={"half": half, "steps": 30})
        of_half = replace(run, experiment=run.experiment.model_copy(update={"saes": saes}))
        ensure(TRAIN, of_half)
        folders.append(of_half.saes.folder)
    first, second = (pd.read_csv(folder / "quality.csv") for folder in folders)
    assert first["matched"].isna().all(), "the other half was not there yet"
    second, density = second[second["role"] == "all"], pd.read_csv(folders[1] / "density.csv")
    other, own = (Dictionaries(folder, sites) for folder in folders)
    for site, matched, chance in second[["site", "matched", "matched_chance"]].itertuples(index=False):
        same = match_features(own[site].W_dec, other[site].W_dec)[0].same >= 0
        live = density.loc[density["site"] == site, "all"].to_numpy() > 0
        assert matched == pytest.approx(same[live].mean(), abs=1e-6)
        assert 0 <= chance < 0.1

"""The sparse kernels against dense autograd in float64, and the dictionary against its definition."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from sfc.core.errors import UserError
from sfc.saes import sums
from sfc.saes.dictionary import Dictionary, TopKDictionary
from sfc.saes.kernels import feature_sums, largest, row_dots, sparse_encode, weighted_group_sums, weighted_row_sums
from sfc.saes.sums import VARIABLE
from sfc.saes.train import Parameters, sae_loss


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_top_k(pre: Tensor, k: int) -> Tensor:
    """What sparse_encode means, for autograd to differentiate."""
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def dense_loss(parameters: Parameters, x: Tensor, k: int, dead: list[int], auxiliary_weight: float) -> Tensor:
    """The loss of Gao et al. 2024 with nothing sparse in it."""
    encoder, b_enc, W_dec, b_dec = parameters
    variance = (x - x.mean(0)).pow(2).sum()
    pre = (x - b_dec) @ encoder.T + b_enc
    error = x - (dense_top_k(pre, k) @ W_dec + b_dec)
    loss = error.pow(2).sum() / variance
    k_dead = min(len(dead), x.shape[1] // 2)
    if k_dead:
        revived = dense_top_k(pre[:, dead], k_dead) @ W_dec[dead]
        missed = error.detach() - revived
        loss = loss + auxiliary_weight * k_dead / (x.shape[1] // 2) * missed.pow(2).sum() / variance
    return loss


@pytest.fixture
def dictionary() -> TopKDictionary:
    weights = {"W_enc": normal(6, 20), "b_enc": normal(20), "W_dec": normal(20, 6, seed=1), "b_dec": normal(6, seed=2)}
    return TopKDictionary(weights, k=4, site="blocks.0.hook_resid_post")


@pytest.mark.parametrize("dead", [[], [3, 5], list(range(4, 16))], ids=["none dead", "few dead", "many dead"])
def test_every_gradient_of_the_loss_equals_dense_autograd(dead: list[int]) -> None:
    x = normal(11, 8, seed=5)
    parameters = Parameters(normal(16, 8), normal(16, seed=1), normal(16, 8, seed=2), normal(8, seed=3))
    for parameter in parameters:
        parameter.requires_grad_()
    loss = sae_loss(parameters, x, 3, torch.tensor(dead, dtype=torch.long), 0.7).total
    oracle = dense_loss(parameters, x, 3, dead, 0.7)
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(oracle, parameters))


@given(prefixes=st.lists(st.integers(1, 15), min_size=1, max_size=4, unique=True).map(sorted))
def test_the_matryoshka_loss_is_the_mean_over_what_each_prefix_reconstructs(prefixes: list[int]) -> None:
    x = normal(11, 8, seed=5)
    parameters = Parameters(normal(16, 8), normal(16, seed=1), normal(16, 8, seed=2), normal(8, seed=3))
    for parameter in parameters:
        parameter.requires_grad_()
    loss = sae_loss(parameters, x, 3, torch.tensor([], dtype=torch.long), 0.0, prefixes=prefixes)
    encoder, b_enc, W_dec, b_dec = parameters
    active = dense_top_k((x - b_dec) @ encoder.T + b_enc, 3)
    variance = (x - x.mean(0)).pow(2).sum()
    fvu = [(x - b_dec - active[:, :end] @ W_dec[:end]).pow(2).sum() / variance for end in [*prefixes, 16]]
    torch.testing.assert_close(loss.fvu, fvu[-1].detach())
    oracle = sum(fvu) / len(fvu)
    torch.testing.assert_close(loss.total, oracle)
    torch.testing.assert_close(torch.autograd.grad(loss.total, parameters), torch.autograd.grad(oracle, parameters))


def test_the_auxiliary_loss_reaches_the_encoder_of_dead_features() -> None:
    x = normal(11, 8, seed=5)
    parameters = Parameters(normal(16, 8), normal(16, seed=1), normal(16, 8, seed=2), normal(8, seed=3))
    parameters.b_enc[7] = -6  # feature 7 is never among the live ones
    for parameter in parameters:
        parameter.requires_grad_()
    sae_loss(parameters, x, 3, torch.tensor([], dtype=torch.long), 0.7).total.backward()
    encoder = parameters.encoder.grad
    assert encoder is not None and not encoder[7].any()
    with torch.no_grad():
        parameters.b_enc[7] = 0
    before = sae_loss(parameters, x, 3, torch.tensor([7]), 0.0).total
    after = sae_loss(parameters, x, 3, torch.tensor([7]), 0.7).total
    grad_before, grad_after = (torch.autograd.grad(loss, parameters)[0][7] for loss in (before, after))
    assert (grad_before - grad_after).norm() > 1e-3


def test_the_three_sums_pass_gradcheck_twice() -> None:
    indices = torch.tensor([[0, 4, 2], [4, 1, 4]])  # a feature twice in a row, features in no row
    weights, vectors, table = (tensor.requires_grad_() for tensor in (normal(2, 3), normal(2, 5), normal(6, 5)))
    for check in (gradcheck, gradgradcheck):
        assert check(lambda w, t: weighted_row_sums(w, indices, t), (weights, table))
        assert check(lambda v, t: row_dots(v, indices, t), (vectors, table))
        assert check(lambda w, v: feature_sums(w, indices, v, 6), (weights, vectors))
    for borders in ([0, 6], [0, 1, 4, 6], [0, 2, 3, 6]):  # a group without entries
        assert gradcheck(lambda w, t, b=borders: weighted_group_sums(w, indices, b, t), (weights, table))


@pytest.mark.parametrize("prefixes", [(), (40, 130)], ids=["plain", "Matryoshka"])
@pytest.mark.parametrize("share", [0.01, 0.02, 0.05, 0.1])
def test_dense_and_sparse_sums_have_the_same_gradients(
    share: float, prefixes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    d_in, d_sae = 24, 400
    x = normal(30, d_in, seed=5)
    parameters = Parameters(
        normal(d_sae, d_in), normal(d_sae, seed=1), normal(d_sae, d_in, seed=2), normal(d_in, seed=3)
    )
    for parameter in parameters:
        parameter.requires_grad_()
    found = {}
    for way in ("sparse", "dense"):
        monkeypatch.setenv(VARIABLE, way)
        dead = torch.tensor([3, 5])
        loss = sae_loss(parameters, x, round(share * d_sae), dead, 0.7, prefixes=prefixes).total
        found[way] = (loss, *torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(found["dense"], found["sparse"])


def test_the_dense_sums_pass_gradcheck_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "dense")
    test_the_three_sums_pass_gradcheck_twice()


def test_the_quicker_way_is_measured_once_said_and_remembered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "measured")
    monkeypatch.setenv("SFC_CACHE", str(tmp_path))
    weights, table = torch.rand(2000, 8), torch.randn(20_000, 64)
    indices = torch.randint(len(table), weights.shape)
    expected = (weights[..., None] * table[indices]).sum(1)
    said = []
    for forget in (True, False, True):
        if forget:  # as a new process would
            sums.known.cache_clear()
        torch.testing.assert_close(weighted_row_sums(weights, indices, table), expected)
        said.append(capsys.readouterr().err)
    assert "row sums of 8 of 20000 features" in said[0] and "sparse (sparse " in said[0], said
    assert said[1:] == ["", ""]
    sums.known.cache_clear()


def test_a_way_that_there_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "quick")
    with pytest.raises(UserError, match="SFC_SUMS is 'quick': it can be sparse, dense or measured"):
        weighted_row_sums(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.ones(2, 2))


def test_sparse_encode_passes_gradcheck() -> None:
    inputs = [tensor.requires_grad_() for tensor in (normal(5, 4), normal(9, 4, seed=1), normal(9, seed=2))]
    assert gradcheck(lambda x, encoder, bias: sparse_encode(x, encoder, bias, 3).values, inputs)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 9), entries=st.integers(1, 6), d_sae=st.integers(1, 12), seed=st.integers(0, 2**20))
def test_the_three_sums_are_one_trilinear_form(rows: int, entries: int, d_sae: int, seed: int) -> None:
    indices = torch.randint(d_sae, (rows, entries), generator=torch.Generator().manual_seed(seed))
    weights, vectors, table = (
        normal(rows, entries, seed=seed),
        normal(rows, 5, seed=seed + 1),
        normal(d_sae, 5, seed=seed),
    )
    value = (weights[..., None] * vectors[:, None] * table[indices]).sum()
    torch.testing.assert_close((weighted_row_sums(weights, indices, table) * vectors).sum(), value)
    torch.testing.assert_close((row_dots(vectors, indices, table) * weights).sum(), value)
    torch.testing.assert_close((feature_sums(weights, indices, vectors, d_sae) * table).sum(), value)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(0, 5), groups=st.integers(1, 40), extra=st.integers(0, 9), k=st.integers(1, 8))
def test_the_largest_are_those_of_topk(rows: int, groups: int, extra: int, k: int) -> None:
    pre = normal(rows, 8 * groups + extra, seed=groups).round(decimals=1)  # with ties
    values, indices = largest(pre, k)
    assert torch.equal(values.sort().values, pre.topk(k).values.sort().values)
    assert torch.equal(pre.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_encode_and_decode_are_what_the_docstring_says(dictionary: TopKDictionary) -> None:
    x = normal(2, 3, 6, seed=4)
    f = dense_top_k((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc, 4)
    torch.testing.assert_close(dictionary.encode(x), f)
    torch.testing.assert_close(dictionary.decode(f), f @ dictionary.W_dec + dictionary.b_dec)
    assert isinstance(dictionary, Dictionary)
    assert (dictionary.d_in, dictionary.d_sae) == (6, 20)


def test_b_dec_is_left_out_of_the_encoder_on_request(dictionary: TopKDictionary) -> None:
    plain = TopKDictionary(dictionary.state_dict(), k=4, site="s", apply_b_dec_to_input=False)
    x = normal(3, 6, seed=4)
    torch.testing.assert_close(plain.encode(x), dictionary.encode(x + dictionary.b_dec))


def test_sparse_and_dense_agree_in_values_and_gradients(dictionary: TopKDictionary) -> None:
    x = normal(7, 6, seed=4).requires_grad_()
    sparse = dictionary.decode_sparse(*dictionary.encode_sparse(x))
    dense = dictionary.decode(dense_top_k((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc, 4))
    torch.testing.assert_close(sparse, dense)
    gradients = (torch.autograd.grad(out.pow(3).sum(), x)[0] for out in (sparse, dense))
    torch.testing.assert_close(*gradients)


def test_padding_with_zeros_changes_nothing(dictionary: TopKDictionary) -> None:
    values, indices = dictionary.encode_sparse(normal(7, 6, seed=4))
    padded = torch.cat([values, torch.zeros(7, 2)], dim=1), torch.cat([indices, torch.full((7, 2), 19)], dim=1)
    torch.testing.assert_close(dictionary.decode_sparse(*padded), dictionary.decode_sparse(values, indices))


def test_no_rows_and_no_gradients(dictionary: TopKDictionary) -> None:
    with torch.no_grad():
        values, indices = dictionary.encode_sparse(normal(0, 6))
        assert values.shape == (0, 4)
        assert dictionary.decode_sparse(values, indices).shape == (0, 6)
    assert not any(parameter.requires_grad for parameter in dictionary.parameters())

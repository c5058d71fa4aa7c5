"""Dictionaries in half precision: what they compute, when they are read, and the memory that they take."""

from pathlib import Path

import pytest
import torch
from test_saes_format import D_IN, D_SAE, SITE, built, change_weights, make_dictionary, rows

from sfc.core.errors import UserError
from sfc.core.machine import check_memory
from sfc.models.linear import linear
from sfc.saes.architectures import (
    DictionaryConfig,
    memory_of,
)  # fmt: skip
from sfc.saes.dictionary import (
    LinearDecoder,
    NormalisedDictionary,
)  # fmt: skip
from sfc.saes.format import Dictionaries, load_dictionary, save_dictionary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_dictionary(make_dictionary(), tmp_path / SITE, {})
    return tmp_path / SITE


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ["topk", "abstopk", "jumprelu", "gated", "matching_pursuit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_in_half_precision_give_the_products_of_their_values(
    architecture: str, normalisation: str, dtype: str, tmp_path: Path
) -> None:
    """Products are in float32: those of a float32 dictionary whose matrices have the rounded values."""
    built(architecture, normalize_activations=normalisation).save_model(tmp_path)
    half, full, x = load_dictionary(tmp_path, dtype=dtype), load_dictionary(tmp_path), rows(40)
    assert isinstance(half, LinearDecoder) and isinstance(full, LinearDecoder)
    assert half.W_dec.dtype == getattr(torch, dtype) and half.b_dec.dtype == torch.float32
    for ours, rounded in zip(full.parameters(), half.parameters(), strict=True):
        ours.data = rounded.data.float()
    if isinstance(full, NormalisedDictionary):
        full.inner.W_dec.data = full.W_dec.data[: full.inner.d_sae]
    f = full.encode(x)
    torch.testing.assert_close(half.encode(x), f, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half.decode(f), full.decode(f), atol=1e-5, rtol=1e-5)
    gradients = []
    for dictionary in (half, full):
        leaf = x.clone().requires_grad_()
        values, indices = dictionary.encode_sparse(leaf)
        x_hat = dictionary.decode_sparse(values, indices)
        gradients.append(torch.autograd.grad(x_hat.square().sum(), leaf)[0])
        assert values.dtype == x_hat.dtype == torch.float32
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_nothing_is_converted_for_longer_than_its_product(tmp_path: Path) -> None:
    """What the backward pass keeps of a site is of the size of its rows, not another copy of its matrices."""
    built("jumprelu").save_model(tmp_path)
    dictionary, kept = load_dictionary(tmp_path, dtype="bfloat16"), []
    x = rows(3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        values, indices = dictionary.encode_sparse(x)
        mask = torch.ones(len(x), dictionary.d_sae, requires_grad=True)
        (linear(mask, dictionary.W_dec.t()) + dictionary.decode_sparse(values, indices)).sum().backward()
    matrices = [tensor for tensor in kept if tensor.numel() == D_IN * D_SAE]
    assert matrices and all(tensor.dtype == torch.bfloat16 for tensor in matrices)


def test_dictionaries_are_read_when_they_are_asked_for(folder: Path) -> None:
    both = Dictionaries(folder.parent, [SITE, "blocks.4.hook_resid_post"], dtype="float16")
    assert len(both) == 2 and next(iter(both)) == SITE, "nothing of the second site is there"
    assert both[SITE] is both[SITE] and both[SITE].W_dec.dtype == torch.float16
    with pytest.raises(UserError, match=r"blocks\.4\.hook_resid_post"):
        _ = both["blocks.4.hook_resid_post"]
    with pytest.raises(KeyError):
        _ = both["blocks.5.hook_resid_post"]


def test_values_too_large_for_half_precision_are_told(folder: Path) -> None:
    change_weights(folder, W_dec=torch.full((D_SAE, D_IN), 1e5))
    assert load_dictionary(folder, dtype="bfloat16")
    with pytest.raises(UserError, match="values too large for float16"):
        load_dictionary(folder, dtype="float16")


def test_the_memory_that_is_told_is_what_is_taken(folder: Path, tmp_path: Path) -> None:
    for architecture in ("topk", "abstopk", "jumprelu", "gated", "matching_pursuit"):
        built(architecture).save_model(tmp_path / architecture / SITE)
        for dtype in ("float32", "bfloat16"):
            dictionaries = Dictionaries(tmp_path / architecture, [SITE], dtype=dtype)
            loaded = dictionaries[SITE]
            assert isinstance(loaded, LinearDecoder)
            taken = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
            assert dictionaries.memory == pytest.approx(taken, rel=0.1), architecture


def test_dictionaries_of_gemma_2_at_three_sites_of_all_layers_fit_a_card_of_24_gb() -> None:
    """26 layers of 16,384 features at heads, MLPs and residual stream, beside the model in bfloat16."""
    card, model = 24 * 10**9, 2 * 2_614_341_888
    settings = {"architecture": "jumprelu", "d_sae": 16384, "sae_lens_version": "6.0.0"}
    configs = [
        DictionaryConfig.model_validate({**settings, "d_in": d_in, "metadata": {"hook_name": f"blocks.{layer}.{hook}"}})
        for layer in range(26)
        for hook, d_in in {"attn.hook_z": 2048, "hook_mlp_out": 2304, "hook_resid_post": 2304}.items()
    ]
    taken = {dtype: sum(memory_of(config, dtype) for config in configs) for dtype in ("float32", "bfloat16")}
    with pytest.raises(UserError, match=r"saes\.dtype"):
        check_memory(taken["float32"], "78 dictionaries", "--set saes.dtype=bfloat16", card - model)
    check_memory(taken["bfloat16"], "78 dictionaries", "", card - model - 5 * 10**9)  # room for activations

"""Dictionaries as others publish them: folders and hub repositories in their layouts, read as SAELens reads them."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import dictionary_repositories as repositories
import numpy as np
import pytest
import torch
from hub import hub
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfc.core.config import SaeConfig, Source
from sfc.core.errors import UserError
from sfc.core.sites import site_named
from sfc.saes.architectures import CONFIG_FILE
from sfc.saes.format import load_dictionary
from sfc.saes.published import fetch_pretrained, in_saelens_format
from sfc.saes.source import local_dictionaries, saes_identity, source_of

D_IN, D_SAE = 24, 96


def rows(n: int = 40) -> Tensor:
    return 2 * torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)) + 0.3


class Case(NamedTuple):
    """A dictionary as it is published."""

    path: str
    """owner, repository, and folder in it"""
    write: Callable[..., None]
    loader: str
    site: str
    release: str
    """its name in SAELens' list"""
    settings: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "Gemma Scope": Case(
        "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", repositories.gemma_scope, "gemma_2",
        "blocks.12.hook_resid_post", "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
    ),
    "Gemma Scope, attention": Case(
        "google/gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_55", repositories.gemma_scope, "gemma_2",
        "blocks.3.attn.hook_z", "gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_55",
    ),
    "Gemma Scope 2": Case(
        "google/gemma-scope-2-1b-it/resid_post/layer_13_width_16k_l0_medium", repositories.gemma_scope_2, "gemma_3",
        "blocks.13.hook_resid_post", "gemma-scope-2-1b-it-res/layer_13_width_16k_l0_medium",
    ),
    "Gemma Scope 2, no configuration": Case(
        "google/gemma-scope-2-270m-it/attn_out_all/layer_5_width_16k_l0_small", repositories.gemma_scope_2, "gemma_3",
        "blocks.5.attn.hook_z", "gemma-scope-2-270m-it-att-all/layer_5_width_16k_l0_small", {"with_config": False},
    ),
    "Gemma Scope 2, MLP": Case(
        "google/gemma-scope-2-4b-it/mlp_out_all/layer_7_width_16k_l0_small", repositories.gemma_scope_2, "gemma_3",
        "blocks.7.hook_mlp_out", "gemma-scope-2-4b-it-mlp-all/layer_7_width_16k_l0_small",
    ),
    "Llama Scope": Case(
        "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L15R-8x", repositories.llama_scope, "llama_scope",
        "blocks.15.hook_resid_post", "llama_scope_lxr_8x/l15r_8x", {"site": "blocks.15.hook_resid_post"},
    ),
}  # fmt: skip


def written(case: Case, root: Path) -> Path:
    case.write(root / case.path, repositories.weights(D_IN, D_SAE), **case.settings)
    return root / case.path


def saelens_reads(case: Case, root: Path) -> Any:
    """What SAELens' own function makes of it, fetched from a hub, with the shapes of the small dictionary."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS

    load = NAMED_PRETRAINED_SAE_LOADERS[case.loader]

    def small(repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: Any) -> Any:
        return load(repo_id, folder_name, device, force_download, {**cfg_overrides, "d_in": D_IN, "d_sae": D_SAE})

    release, _, sae_id = case.release.partition("/")
    with hub(root):
        return SAE.from_pretrained(release, sae_id, converter=small)


def assert_the_same(ours_in: Path, theirs: Any) -> None:
    ours, x = load_dictionary(ours_in), rows()
    with torch.no_grad():
        f = theirs.encode(x.unflatten(1, (4, -1)) if theirs.hook_z_reshaping_mode else x)
        assert 0.02 < (f > 0).float().mean() < 0.9
        torch.testing.assert_close(ours.encode(x), f, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(f), theirs.decode(f).flatten(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_release_is_fetched_as_saelens_fetches_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    written(case, tmp_path / "hub")
    with hub(tmp_path / "hub"):
        fetch_pretrained(case.release, tmp_path / "ours")
    assert_the_same(tmp_path / "ours", saelens_reads(case, tmp_path / "hub"))
    assert load_dictionary(tmp_path / "ours").site == case.site


@pytest.mark.parametrize("name", CASES)
def test_a_folder_of_a_repository_is_read_without_a_hub(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder = written(case, tmp_path / "hub")
    made = in_saelens_format("", folder, tmp_path / "ours")
    dictionary, x = load_dictionary(made), rows()
    assert dictionary.site == case.site
    if name == "Llama Scope":  # SAELens' list has the factor of the real one, the folder has its own
        norm = json.loads((folder / "hyperparams.json").read_text())["dataset_average_activation_norm"]["in"]
        factor, tensors = D_IN**0.5 / norm, repositories.weights(D_IN, D_SAE)
        tensors = {key: tensor.bfloat16().float() for key, tensor in tensors.items()}
        pre = factor * x @ tensors["W_enc"] + tensors["b_enc"]
        x_hat = ((pre * (pre > 0.05 * factor)) @ tensors["W_dec"] + tensors["b_dec"]) / factor
        torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), x_hat, atol=1e-5, rtol=1e-5)
    else:
        assert_the_same(made, saelens_reads(case, tmp_path / "hub"))


def test_a_release_of_dictionary_learning_is_converted_by_saelens(tmp_path: Path) -> None:
    from sae_lens import SAE

    release, sae_id = "llama-3.1-8b-instruct-andyrdt", "resid_post_layer_15_trainer_1"
    folder = tmp_path / "hub/andyrdt/saes-llama-3.1-8b-instruct/resid_post_layer_15/trainer_1"
    repositories.dictionary_learning(folder, repositories.weights(D_IN, D_SAE), 15)
    with hub(tmp_path / "hub"):
        fetch_pretrained(f"{release}/{sae_id}", tmp_path / "ours")
        theirs = SAE.from_pretrained(release, sae_id)
    assert_the_same(tmp_path / "ours", theirs)
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["metadata"]["neuronpedia_id"] == (
        "llama3.1-8b-it/15-resid-post-aa"
    )


def test_a_folder_of_sparsify_computes_what_sparsify_computes(tmp_path: Path) -> None:
    """`encode` of its SparseCoder: the k largest of relu(encoder(x - b_dec)); `decode`: their rows of W_dec, b_dec."""
    tensors, x = repositories.weights(D_IN, D_SAE), rows()
    folder = tmp_path / "hub/EleutherAI/sae-llama-3-8b-32x/layers.12"
    repositories.sparsify(folder, tensors)
    acts, indices = (
        torch.nn.functional.linear(x - tensors["b_dec"], tensors["W_enc"].T, tensors["b_enc"]).relu().topk(8)
    )
    x_hat = torch.einsum("nk,nkd->nd", acts, tensors["W_dec"][indices]) + tensors["b_dec"]
    with hub(tmp_path / "hub"):
        fetch_pretrained("EleutherAI/sae-llama-3-8b-32x/layers.12", tmp_path / "fetched")
    for made in (tmp_path / "fetched", in_saelens_format("", folder, tmp_path / "converted")):
        dictionary = load_dictionary(made)
        assert dictionary.site == "blocks.12.hook_resid_post"
        torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), x_hat, atol=1e-5, rtol=1e-5)


def test_a_pickle_in_a_folder_is_not_opened(tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return opened.touch, ()

    (tmp_path / "trainer_1").mkdir()
    torch.save(Trap(), tmp_path / "trainer_1/ae.pt")
    with pytest.raises(UserError, match=r"ae\.pt is of a kind that can run code, and is not opened: .*save_model"):
        local_dictionaries(str(tmp_path / "trainer_1"), ["blocks.15.hook_resid_post"])
    folder = tmp_path / "google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", w_enc=np.array([Trap()], dtype=object))
    with pytest.raises(UserError, match="Object arrays cannot be loaded"):
        in_saelens_format("", folder, tmp_path / "ours")
    assert not opened.exists()


SPOILT: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no JSON": ("Llama Scope", lambda folder: (folder / "hyperparams.json").write_text("{"), "SAELens cannot read"),
    "truncated": (
        "Gemma Scope 2", lambda folder: (folder / "params.safetensors").write_bytes(b"12"), "SAELens cannot read"
    ),
    "a tensor is missing": (
        "Gemma Scope 2", lambda folder: save_file({"w_enc": torch.ones(3, 4)}, folder / "params.safetensors"), "'w_dec'"
    ),
    "another name": ("Gemma Scope", lambda folder: folder.parents[2].rename(folder.parents[3] / "mine"), "named as in"),
}  # fmt: skip


@pytest.mark.parametrize("settings", [{"transcode": True}, {"signed": True}, {"activation": "groupmax"}])
def test_what_of_sparsify_is_no_sae_of_ours_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    repositories.sparsify(tmp_path / "layers.1", repositories.weights(D_IN, D_SAE), **settings)
    with pytest.raises(UserError, match=next(iter(settings))):
        in_saelens_format("", tmp_path / "layers.1", tmp_path / "ours")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("name", SPOILT)
def test_what_saelens_cannot_read_is_one_clear_line(name: str, tmp_path: Path) -> None:
    kind, spoil, message = SPOILT[name]
    folder = written(CASES[kind], tmp_path)
    spoil(folder)
    if not folder.exists():
        folder = next(tmp_path.rglob("params.npz")).parent
    with pytest.raises(UserError) as error:
        load_dictionary(in_saelens_format("", folder, tmp_path / "ours"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_stay_finite_and_shapes_come_from_them(tmp_path: Path) -> None:
    """SAELens' list of widths does not have that of every folder of Gemma Scope."""
    folder = tmp_path / "gemma-scope-2b-pt-res/layer_5/width_82k/average_l0_70"
    repositories.gemma_scope(folder, repositories.weights(D_IN, D_SAE))
    assert load_dictionary(in_saelens_format("", folder, tmp_path / "ours")).d_sae == D_SAE


def test_an_unlisted_repository_in_saelens_format_is_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "hub/someone/saes/layer 3"
    repositories.sae_lens(folder, repositories.weights(D_IN, D_SAE), "standard", "blocks.3.hook_resid_post")
    with hub(tmp_path / "hub"):
        fetch_pretrained("someone/saes/layer 3", tmp_path / "ours")
        assert load_file(tmp_path / "ours/sae_weights.safetensors").keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
        with pytest.raises(UserError, match="someone/saes has no dictionary 'layer 4' in a layout that is known"):
            fetch_pretrained("someone/saes/layer 4", tmp_path / "none")


def test_what_was_fetched_once_is_read_without_a_network(tmp_path: Path) -> None:
    from huggingface_hub import constants

    case = CASES["Gemma Scope 2"]
    written(case, tmp_path / "hub")
    with hub(tmp_path / "hub"):
        fetch_pretrained(case.release, tmp_path / "first")
        shutil.rmtree(tmp_path / "hub")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            fetch_pretrained(case.release, tmp_path / "again")
    before, after = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("first", "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.12", "blocks.12.hook_resid_post"),
        ("layers.12", "blocks.12.hook_resid_post"),
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("transformer.h.7", "blocks.7.hook_resid_post"),
        ("model.layers.5.output", "blocks.5.hook_resid_post"),
        ("layers.12.mlp", "blocks.12.hook_mlp_out"),
        ("model.layers.2.post_feedforward_layernorm.output", "blocks.2.hook_mlp_out"),
        ("h.4.attn", "blocks.4.hook_attn_out"),
        ("model.layers.9.self_attn.o_proj.input", "blocks.9.attn.hook_z"),
        ("blocks.6.hook_z", "blocks.6.attn.hook_z"),
        ("blocks.6.hook_resid_pre", "blocks.6.hook_resid_pre"),
        ("layers.12.mlp.up_proj", "layers.12.mlp.up_proj"),
        ("hook_embed", "hook_embed"),
    ],
)
def test_sites_have_the_names_that_people_give_them(name: str, site: str) -> None:
    assert site_named(name) == site


def test_a_dictionary_of_a_module_is_one_of_its_site(tmp_path: Path) -> None:
    site = "blocks.3.hook_resid_post"
    repositories.sae_lens(tmp_path / "any", repositories.weights(D_IN, D_SAE), "standard", "model.layers.3")
    assert local_dictionaries(str(tmp_path / "any"), [site]) == {site: tmp_path / "any"}
    assert load_dictionary(tmp_path / "any").site == site
    repositories.sparsify(tmp_path / "all/layers.3", repositories.weights(D_IN, D_SAE))
    repositories.sparsify(tmp_path / "all/layers.10", repositories.weights(D_IN, D_SAE))
    assert local_dictionaries(str(tmp_path / "all"), [site]) == {site: tmp_path / "all/layers.3"}


def test_each_kind_of_site_has_its_own_source(tmp_path: Path) -> None:
    sites = ["blocks.3.hook_mlp_out", "blocks.3.hook_resid_post"]
    source: Source = {"mlp_out": "gemma-scope-2b-pt-mlp/layer_{layer}", "resid_post": str(tmp_path / "{layer}")}
    repositories.sparsify(tmp_path / "3", repositories.weights(D_IN, D_SAE))
    assert source_of(source, sites[0]) == "gemma-scope-2b-pt-mlp/layer_3"
    assert local_dictionaries(source, sites) == {sites[1]: tmp_path / "3"}
    with pytest.raises(UserError, match="names dictionaries for mlp_out, and none for resid_post"):
        local_dictionaries({"mlp_out": "a/b"}, sites)
    config = SaeConfig.model_validate({"source": source})
    before = saes_identity(config, sites)
    change(tmp_path / "3/cfg.json", k=9)
    assert saes_identity(config, sites) != before, "a folder counts by its content"

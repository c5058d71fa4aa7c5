"""Models of other architectures, saved to a folder with random weights, load and run as they do by themselves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, random_model
from safetensors.torch import load_file, save_file

from sfc.core.config import ModelConfig
from sfc.core.errors import UserError
from sfc.models.batches import TemplateLayout, make_batches
from sfc.models.loading import choose_device, load_model
from sfc.models.running import cached_residual_after, last_logits
from sfc.models.sources import tiny_model_folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_agree_with_their_own_logits_and_suffix_runs_are_exact(architecture: str, tmp_path: Path) -> None:
    network = random_model(architecture, tmp_path)
    model = load_model(ModelConfig(source=str(tmp_path), template="plain", refusal_tokens=["I"]))  # pyright: ignore
    assert (model.n_layers, model.d_model) == (3, 32)
    prompts = model.tokenize(["Hello there", "What?"])
    batch = make_batches(prompts, TemplateLayout.of(prompts), 200, model.device)[0]
    full = last_logits(model, batch)
    with torch.no_grad():
        own = torch.stack([network(torch.tensor(prompts[i].ids)[None]).logits[0, -1] for i in batch.prompts.tolist()])
    torch.testing.assert_close(full, own, atol=1e-5, rtol=1e-4)
    cached = None
    for layer in range(-1, 3):
        cached = cached_residual_after(model, batch, layer, cached)
        assert torch.equal(cached.residual, cached_residual_after(model, batch, layer).residual)
        assert torch.equal(last_logits(model, batch, cached=cached), full)
    sites = {f"blocks.{layer}.hook_resid_post": (lambda x: x + 1) for layer in range(3)}
    moved = last_logits(model, batch, sites)
    assert torch.equal(last_logits(model, batch, sites, cached_residual_after(model, batch, 0)), moved)
    assert not torch.allclose(moved, full)


def _lack_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 40}))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut off": (lambda folder: _cut(folder / "model.safetensors"), "header"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "weights that would have to be unpickled": (_pickle, "no file named model.safetensors"),
    "a weight is missing": (_lack_weights, r"lack weights.*layers\.1\.mlp\.up_proj"),
    "weights of another width": (_other_width, "the folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    "a config that is not JSON": (lambda folder: _cut(folder / "config.json"), "JSON"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_folder_is_one_line(problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder(), folder)
    damage, message = BROKEN[problem]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(ModelConfig(source=str(folder), refusal_tokens=["I"]))  # pyright: ignore
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_unknown_device_is_one_line() -> None:
    with pytest.raises(UserError, match="device 'quantum' cannot be used"):
        choose_device("quantum")

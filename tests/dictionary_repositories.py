"""Dictionaries with random weights, written as Gemma Scope, Llama Scope, sparsify and SAELens publish them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor


def weights(d_in: int, d_sae: int, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of a JumpReLU SAE, by SAELens' names; about a third of the features are active in a row.

    Encoder and decoder are near each other's inverse, so that reconstructions resemble what they are of.
    """
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=random), dim=1)
    return {
        "W_enc": directions.T.contiguous(),
        "b_enc": 0.1 * torch.randn(d_sae, generator=random),
        "W_dec": directions * d_in / d_sae * 2,
        "b_dec": 0.1 * torch.randn(d_in, generator=random),
        "threshold": 0.1 * torch.rand(d_sae, generator=random),
    }


def gemma_scope(folder: Path, tensors: dict[str, Tensor]) -> None:
    """`layer_12/width_16k/average_l0_82/params.npz` of google/gemma-scope-2b-pt-res."""
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})


def gemma_scope_2(folder: Path, tensors: dict[str, Tensor], with_config: bool = True) -> None:
    """`resid_post/layer_13_width_16k_l0_medium/` of google/gemma-scope-2-1b-it: config.json and params.safetensors.

    A folder of transcoders, with a skip connection where its name says `affine`, has one.
    """
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-it"}
    tensors = {name.lower(): tensor for name, tensor in tensors.items()}
    layer = f"model.layers.{re.findall(r'layer_([0-9]+)', folder.name)[0]}"
    if "transcoder" in str(folder):
        config["hf_hook_point_in"] = f"{layer}.pre_feedforward_layernorm.output"
        config["hf_hook_point_out"] = f"{layer}.post_feedforward_layernorm.output"
        config["affine_connection"] = "affine" in folder.name
        if config["affine_connection"]:
            tensors["affine_skip_connection"] = 0.1 * torch.eye(tensors["w_dec"].shape[1])
    else:
        config["hf_hook_point_in"] = f"{layer}.output"
    save_file(tensors, folder / "params.safetensors")
    if with_config:
        (folder / "config.json").write_text(json.dumps(config))


def llama_scope(folder: Path, tensors: dict[str, Tensor], site: str) -> None:
    """`Llama3_1-8B-Base-L15R-8x/` of fnlp/Llama3_1-8B-Base-LXR-8x: activations are scaled to the norm sqrt(d_in)."""
    (folder / "checkpoints").mkdir(parents=True)
    d_sae, d_in = tensors["W_dec"].shape
    named = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "decoder.bias": tensors["b_dec"],
    }
    save_file({name: tensor.bfloat16() for name, tensor in named.items()}, folder / "checkpoints/final.safetensors")
    settings = {
        "d_model": d_in,
        "d_sae": d_sae,
        "hook_point_in": site,
        "hook_point_out": site,
        "jump_relu_threshold": 0.05,
        "dataset_average_activation_norm": {"in": 12.5, "out": 12.5},
    }
    (folder / "hyperparams.json").write_text(json.dumps(settings))


def sparsify(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> None:
    """`layers.12/` of EleutherAI/sae-llama-3-8b-32x: cfg.json and sae.safetensors."""
    folder.mkdir(parents=True)
    d_sae, d_in = tensors["W_dec"].shape
    named = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    save_file(named, folder / "sae.safetensors")
    config = {"expansion_factor": d_sae // d_in, "normalize_decoder": True, "num_latents": d_sae, "k": 8, "d_in": d_in}
    (folder / "cfg.json").write_text(json.dumps({**config, **settings}))


def dictionary_learning(folder: Path, tensors: dict[str, Tensor], layer: int) -> None:
    """`resid_post_layer_15/trainer_1/` of andyrdt/saes-llama-3.1-8b-instruct: config.json and a pickle, ae.pt."""
    folder.mkdir(parents=True)
    d_sae, d_in = tensors["W_dec"].shape
    named = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
        "b_dec": tensors["b_dec"],
        "k": torch.tensor(8),
        "threshold": torch.tensor(0.05),
    }
    torch.save(named, folder / "ae.pt")
    trainer = {
        "dict_class": "BatchTopKSAE", "activation_dim": d_in, "dict_size": d_sae, "k": 8, "layer": layer,
        "lm_name": "meta-llama/Llama-3.1-8B-Instruct",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 1024}}))


def sae_lens(folder: Path, tensors: dict[str, Tensor], architecture: str, site: str, **settings: Any) -> None:
    """A folder as SAELens of before version 6 wrote it: cfg.json and sae_weights.safetensors."""
    folder.mkdir(parents=True)
    d_sae, d_in = tensors["W_dec"].shape
    save_file({n: t for n, t in tensors.items() if n != "threshold"}, folder / "sae_weights.safetensors")
    config = {
        "architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "torch.float32", "device": "cpu",
        "hook_name": site, "hook_point": site, "model_name": "any", **settings,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))

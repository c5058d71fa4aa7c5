"""Small models of every family that transformers has and TransformerLens' bridge claims, with random weights.

A family is a `model_type` of transformers. Its configuration class gives the shape, which is shrunk here.
"""

import inspect
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sfc.models.sources import tiny_model_folder

FAMILIES = sorted(
    family
    for family, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if architecture in SUPPORTED_ARCHITECTURES
)

N_LAYERS, WIDTH, HEADS, HEAD = 4, 32, 4, 8
_SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": WIDTH, "d_model": WIDTH, "n_embd": WIDTH, "num_hidden_layers": N_LAYERS,
    "n_layer": N_LAYERS, "n_layers": N_LAYERS, "num_layers": N_LAYERS, "num_attention_heads": HEADS, "n_head": HEADS,
    "n_heads": HEADS, "num_heads": HEADS, "attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": HEAD,
    "intermediate_size": 64, "ffn_dim": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "word_embed_proj_dim": WIDTH,
    "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 258,
}  # fmt: skip


def tiny_config(family: str) -> Any:
    """The configuration of a family, shrunk."""
    kind = transformers.CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))
    return kind(**{name: value for name, value in _SIZES.items() if name in known})


def tiny_network(family: str, folder: Path) -> Any:
    """Save a small model of a family to a folder, with the tiny model's tokenizer, and return it."""
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    network.save_pretrained(folder)
    for file in tiny_model_folder().glob("*token*"):
        shutil.copy(file, folder)
    return network

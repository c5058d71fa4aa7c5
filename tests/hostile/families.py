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
    "intermediate_size": 64, "ffn_dim": 64, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "word_embed_proj_dim": WIDTH,
    "image_size": 32, "patch_size": 8, "depth": 1,
    "initializer_range": 0.2, "init_std": 0.2, "bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 258,
}  # fmt: skip


_HEADS_OF_ROPE = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": HEADS}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_ssm": 64}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "falcon_h1": _MAMBA,
    "gemma4_text": {"vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    "qwen3_5_moe_text": {**_DELTA, **_HYBRID}, "qwen3_5_text": {**_DELTA, **_HYBRID},
    "qwen3_next": {**_DELTA, **_HYBRID},
    "xglm": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "mamba_headdim": 8,
               "mamba_d_state": 8, "n_mamba_heads": 8},
    **{
        name: {**_HEADS_OF_ROPE, "n_group": 2, "topk_group": 1}
        for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa", "youtu")
    },
}  # fmt: skip


def tiny_config(family: str) -> Any:
    """The configuration of a family, shrunk; so are those of its text and of what it sees and hears."""
    return _shrunk(transformers.CONFIG_MAPPING[family], _OWN.get(family, {}))


def _shrunk(kind: Any, own: dict[str, Any]) -> Any:
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))
    settings = {name: value for name, value in _SIZES.items() if name in known}
    parts = {}
    for name, part in kind.sub_configs.items():
        part = type(getattr(kind(), name)) if part is transformers.AutoConfig else part
        parts[name] = _shrunk(part, _OWN.get(part.model_type, {}))
    return kind(**{**settings, **parts, **own})


def tiny_network(family: str, folder: Path) -> Any:
    """Save a small model of a family to a folder, with the tiny model's tokenizer, and return it."""
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    network.save_pretrained(folder)
    for file in tiny_model_folder().glob("*token*"):
        shutil.copy(file, folder)
    return network

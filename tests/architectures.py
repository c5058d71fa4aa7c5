"""Small models of many architectures, with three layers of 32 dimensions and random weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from sfc.models.sources import tiny_model_folder

_GPT2_NAMES = {"n_embd": 32, "n_layer": 3, "n_head": 4}
_LLAMA_NAMES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_GROUPED = {**_LLAMA_NAMES, "num_key_value_heads": 2}
# Gemma2 caps its logits and Granite scales them; blocks of GPT-J and Bloom return tuples.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT2": {**_GPT2_NAMES, "n_positions": 256},
    "GPTJ": {**_GPT2_NAMES, "rotary_dim": 4},
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "GPTNeoX": _LLAMA_NAMES,
    "Llama": _GROUPED,
    "Qwen2": _GROUPED,
    "Gemma2": {**_GROUPED, "head_dim": 8, "final_logit_softcapping": 0.5},
    "Granite": {**_GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
}


def random_model(architecture: str, folder: Path, **settings: Any) -> Any:
    """Save a model with random weights to the folder, with the tiny model's tokenizer, and return it."""
    settings = {**ARCHITECTURES[architecture], **settings}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=260, **settings)
    kind = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    network = getattr(transformers, f"{architecture}{kind}")(config).eval()
    network.save_pretrained(folder)
    for file in tiny_model_folder().glob("*token*"):
        shutil.copy(file, folder)
    return network

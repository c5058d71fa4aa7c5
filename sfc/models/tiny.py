"""A random two-layer Llama with a byte-level tokenizer: the smallest real model, for tests and quick looks."""

import os
from pathlib import Path
from typing import Any

from sfc.core.artifacts import locked
from sfc.models.embedded import cache_folder

VERSION = 1  # raised when the model made here changes
N_LAYERS, D_MODEL = 2, 32
SPECIAL = ["<|bos|>", "<|user|>", "<|end|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "<|bos|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model_folder() -> Path:
    """The folder with the tiny model and its tokenizer, made at the first call."""
    folder = cache_folder() / f"tiny-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if not folder.is_dir():
                temporary = folder.with_name(f"{folder.name}-{os.getpid()}")
                _model().save_pretrained(temporary)
                _tokenizer().save_pretrained(temporary)
                temporary.rename(folder)
    return folder


def _tokenizer() -> Any:
    """A tokenizer in which every byte is a token, with a chat template. Nothing is downloaded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[2], pad_token=SPECIAL[2]
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def _model() -> Any:
    """A Llama with two layers, 32 dimensions, four heads, two key-value heads and random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=258,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

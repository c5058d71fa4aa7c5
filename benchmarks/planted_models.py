"""Tiny transformers that compute given circuits, and dictionaries written by hand that see just their features.

Every feature is a direction of the residual stream of a GPT-2, all of them orthonormal in a random rotation, each with
a scale of its own. One more direction carries a large constant, so that every layer norm divides by nearly the same
number: with weights that undo it, it is the identity but for a factor `1 - |features|^2 / (2 CONSTANT^2)`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from planted_circuits import MOVING_BLOCK, N_LAYERS, OUTPUT, OUTPUT_LOGITS, Circuit
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sfc.saes.dictionary import TopKDictionary

D_MODEL = 64
CONSTANT = 200.0
BOS, UNKNOWN = "<|bos|>", "<|unk|>"


@dataclass(frozen=True)
class Basis:
    """Where features lie in the residual stream."""

    directions: Mapping[str, Float[Tensor, " d_model"]]
    scales: Mapping[str, float]
    """the length of a feature in the residual stream where its value in the circuit is 1"""
    constant: Float[Tensor, " d_model"]
    rest: Float[Tensor, "rest d_model"]
    """what every word has besides, in random amounts: it is the dictionaries' error"""
    readers: Mapping[str, Float[Tensor, " d_model"]]
    """the vector whose product with a feature's direction is 1, and 0 with those that it must be told from"""

    @classmethod
    def drawn(cls, features: Sequence[str], random: np.random.Generator) -> "Basis":
        """A random rotation, and scales between 1/2 and 2."""
        constant, rest = rotation(random)
        scales = 2 ** random.uniform(-1, 1, len(features))
        directions = dict(zip(features, rest, strict=False))
        return cls(
            directions, dict(zip(features, scales, strict=True)), constant, rest[len(features) :], readers=directions
        )

    def reading(self, weights: Mapping[str, float]) -> Float[Tensor, " d_model"]:
        """The vector whose product with the residual stream is this combination of features."""
        return _sum({feature: weight / self.scales[feature] for feature, weight in weights.items()}, self.readers)

    def writing(self, values: Mapping[str, float]) -> Float[Tensor, " d_model"]:
        """The vector that adds these values to features."""
        return _sum({feature: value * self.scales[feature] for feature, value in values.items()}, self.directions)

    def dictionary(self, features: Sequence[str], k: int, site: str) -> TopKDictionary:
        """The dictionary of these features, with decoder rows of length one."""
        rows = torch.stack([self.directions[feature] for feature in features])
        weights = {"W_enc": rows.T, "b_enc": torch.zeros(len(rows)), "W_dec": rows, "b_dec": CONSTANT * self.constant}
        return TopKDictionary(weights, k=k, site=site)


def rotation(random: np.random.Generator) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "rest d_model"]]:
    """A random direction for the constant, and an orthonormal basis of what is left for features."""
    columns = random.normal(size=(D_MODEL, D_MODEL))
    columns[:, 0] = 1
    # The first direction, that of all ones, is left empty: layer norms subtract it.
    _, constant, *rest = torch.from_numpy(np.linalg.qr(columns).Q.T).float()
    return constant, torch.stack(rest)


def _sum(lengths: Mapping[str, float], vectors: Mapping[str, Tensor]) -> Float[Tensor, " d_model"]:
    return sum((x * vectors[feature] for feature, x in lengths.items()), torch.zeros(D_MODEL))


def write_model(
    circuits: Sequence[Circuit],
    basis: Basis,
    words: Mapping[str, Mapping[str, float]],
    n_tokens: int,
    random: np.random.Generator,
    folder: Path,
    query_key: tuple[Float[Tensor, "d_model d_model"], Float[Tensor, "d_model d_model"]] | None = None,
) -> None:
    """Write the model that computes the circuits, side by side, and its tokenizer into a folder.

    Args:
        words: the vocabulary, with the features that each word writes.
        n_tokens: in every prompt; its reciprocal is the attention that the last token pays to each.
        query_key: the attention's matrices for queries and keys; every token attends to all before it alike without.
    """
    vocabulary = dict(zip(words, random.permutation(len(words)).tolist(), strict=True))
    units = [unit for circuit in circuits for unit in circuit.units]
    in_block = [[unit for unit in units if unit.block == block] for block in range(N_LAYERS)]
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=n_tokens, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=1,
        n_inner=max(map(len, in_block)), activation_function="relu", tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(CONSTANT / D_MODEL**0.5)
    for word, number in vocabulary.items():
        unexplained = torch.from_numpy(random.normal(size=len(basis.rest))).float() @ basis.rest
        model.transformer.wte.weight[number] = CONSTANT * basis.constant + basis.writing(words[word]) + unexplained
    attention = model.transformer.h[MOVING_BLOCK].attn
    _write_attention(attention, circuits, basis, n_tokens)
    if query_key is not None:
        attention.c_attn.weight[:, : 2 * D_MODEL] = torch.cat(query_key, dim=1)
    for block, its_units in zip(model.transformer.h, in_block, strict=True):
        for number, unit in enumerate(its_units):
            block.mlp.c_fc.weight[:, number] = basis.reading(unit.reads)
            block.mlp.c_fc.bias[number] = unit.bias
            block.mlp.c_proj.weight[number] = basis.writing(unit.writes)
    for logits in [{OUTPUT: OUTPUT_LOGITS}, *(circuit.logits for circuit in circuits)]:
        for feature, of_tokens in logits.items():
            for token, weight in of_tokens.items():
                model.lm_head.weight[vocabulary[token]] += basis.reading({feature: weight})
    model.save_pretrained(folder)
    _tokenizer(vocabulary).save_pretrained(folder)


def _write_attention(attention: Any, circuits: Sequence[Circuit], basis: Basis, n_tokens: int) -> None:
    """One head without queries and keys: the mean over all tokens so far of what sources are moved to."""
    values = torch.zeros(D_MODEL, D_MODEL)
    for source in (source for circuit in circuits for source in circuit.sources):
        values += n_tokens * torch.outer(basis.reading({source: 1}), basis.writing({source.upper(): 1}))
    attention.c_attn.weight[:, 2 * D_MODEL :] = values
    attention.c_proj.weight.copy_(torch.eye(D_MODEL))


def _tokenizer(vocabulary: Mapping[str, int]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words between spaces."""
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=BOS, unk_token=UNKNOWN)

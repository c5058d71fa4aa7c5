"""What running a model takes: tokens through its blocks, and the memory of its weights and activations.

Sizes come from the model's configuration, built without memory for its weights. How long a block takes is measured on
two blocks of that configuration with a small vocabulary and weights that mean nothing: the very code that runs later,
at two batch sizes, because a small batch costs little less than reading the weights does.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sfc.core.machine import seconds_of
from sfc.core.work import Amounts
from sfc.data.render import TokenizedPrompt
from sfc.models.batches import PACKED_TOKENS, similar_lengths
from sfc.models.linear import linear, use_quick_products
from sfc.models.loading import Outline


class Sizes(NamedTuple):
    """What a model's runs depend on."""

    n_layers: int
    d_model: int
    vocabulary: int
    parameters: int
    """of the whole model"""
    of_block: int
    """parameters of the largest block"""
    cached: int
    """numbers that a block keeps of a token for those after it: its keys and values"""
    itemsize: int
    """bytes of a number"""

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.itemsize

    def logits(self, rows: float) -> int:
        """Bytes of the logits of so many positions in float32, of their log-probabilities, and of what is compared."""
        return int(3 * 4 * rows * self.vocabulary)


def sizes_of(outline: Outline, dtype: str) -> Sizes:
    """The sizes of a model in this precision."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(outline.config)
    text = outline.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Sizes(
        n_layers=outline.n_layers,
        d_model=outline.d_model,
        vocabulary=text.vocab_size,
        parameters=sum(weight.numel() for weight in model.parameters()),
        of_block=max(sum(weight.numel() for weight in block.parameters()) for block in _blocks(model, outline)),
        cached=2 * heads * outline.heads_width // text.num_attention_heads,
        itemsize=getattr(torch, dtype).itemsize,
    )


def _blocks(model: nn.Module, outline: Outline) -> list[nn.Module]:
    """The blocks: the list of as many modules as there are layers that has most of the parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == outline.n_layers]
    return list(max(lists, key=lambda blocks: sum(weight.numel() for weight in blocks.parameters())))


class Shape(NamedTuple):
    """A batch."""

    rows: int
    width: int

    @property
    def tokens(self) -> int:
        """Its tokens, padding included."""
        return self.rows * self.width


def shapes_of(prompts: Sequence[TokenizedPrompt], batch_tokens: int, new_tokens: int = 0) -> list[Shape]:
    """The batches that prompts are run in, as `similar_lengths` makes them."""
    groups = similar_lengths(prompts, batch_tokens, new_tokens)
    return [Shape(len(group), max(len(prompts[i].ids) for i in group)) for group in groups]


def tokens_of(shapes: Sequence[Shape]) -> int:
    """Tokens of all batches, padding included."""
    return sum(shape.tokens for shape in shapes)


def rows_of(shapes: Sequence[Shape]) -> int:
    """Prompts of all batches."""
    return sum(shape.rows for shape in shapes)


def some_of(shapes: Sequence[Shape], prompts: int) -> list[Shape]:
    """So many of the prompts at most, the same share of every batch."""
    share = min(prompts / max(rows_of(shapes), 1), 1.0)
    return [Shape(round(shape.rows * share), shape.width) for shape in shapes if round(shape.rows * share)]


def passed(shapes: Sequence[Shape], blocks: int) -> Amounts:
    """Every batch once through so many blocks."""
    return Amounts(calls=len(shapes) * blocks, forward=tokens_of(shapes) * blocks)


def scored(shapes: Sequence[Shape], blocks: int) -> Amounts:
    """The same, with the logits of every prompt's last position."""
    return passed(shapes, blocks) + Amounts(logits=rows_of(shapes))


def packed(shapes: Sequence[Shape], edits: int, blocks: int, batch_tokens: int = PACKED_TOKENS) -> Amounts:
    """Every prompt scored under every edit, as many edits at a time as `packed_runs` takes."""
    calls = sum(-(-edits // max(1, batch_tokens // shape.tokens)) for shape in shapes)
    return Amounts(calls=calls * blocks, forward=edits * tokens_of(shapes) * blocks, logits=edits * rows_of(shapes))


def replied(shapes: Sequence[Shape], edits: int, new_tokens: int, blocks: int, batch_tokens: int) -> Amounts:
    """Replies of so many tokens to every prompt under every edit, none of which ends before.

    A step is one column for the whole batch.
    """
    steps = Amounts()
    for rows, width in shapes:
        at_once = max(1, batch_tokens // (rows * (width + new_tokens)))
        batches = -(-edits // at_once)
        per_step = Amounts(calls=batches * blocks, forward=edits * rows * blocks, logits=edits * rows)
        steps += per_step * (new_tokens - 1) + packed([Shape(rows, width)], edits, blocks, at_once * rows * width)
    return steps


def cache_bytes(sizes: Sizes, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens."""
    return tokens * sizes.cached * sizes.n_layers * sizes.itemsize


_BLOCKS = 2
_VOCABULARY = 512
_WIDTH = 32
_LONG_ENOUGH = 0.015
"""seconds: a larger batch is not tried where one takes as long"""


def block_speed(outline: Outline, sizes: Sizes, dtype: str, device: torch.device, most_tokens: int) -> Amounts:
    """Seconds of a call, of a token forward and back, and of a position's logits, measured.

    Args:
        most_tokens: of a batch, in what is to be planned.
    """
    model = _two_blocks(outline, dtype, device)

    def forward(rows: int) -> Callable[[], Any]:
        x = torch.ones(rows, _WIDTH, sizes.d_model, dtype=getattr(torch, dtype), device=device)
        return lambda: model(inputs_embeds=x, use_cache=False)

    def both_ways(rows: int) -> Callable[[], Any]:
        x = torch.ones(rows, _WIDTH, sizes.d_model, dtype=getattr(torch, dtype), device=device).requires_grad_()
        return lambda: torch.autograd.grad(model(inputs_embeds=x, use_cache=False).last_hidden_state.sum(), x)

    with torch.no_grad():
        rows, few = 1, seconds_of(forward(1), device)
        many = few
        while rows == 1 or (many < _LONG_ENOUGH and 4 * rows * _WIDTH <= max(most_tokens, PACKED_TOKENS)):
            rows *= 4
            many = seconds_of(forward(rows), device)
    forth_and_back = seconds_of(both_ways(rows), device)
    per_token = (many - few) / ((rows - 1) * _WIDTH)
    per_token = max(per_token, 0.5 * many / (rows * _WIDTH))  # where a machine is busy, two times may be in any order
    call = max(few - per_token * _WIDTH, 0.0)
    backward = max(forth_and_back - many, 0.0) / (rows * _WIDTH)
    hidden = torch.ones(64, sizes.d_model, dtype=getattr(torch, dtype), device=device)
    table = torch.ones(min(sizes.vocabulary, 1 << 13), sizes.d_model, dtype=hidden.dtype, device=device)
    with torch.no_grad():
        logits = seconds_of(lambda: linear(hidden, table), device) / 64 * sizes.vocabulary / len(table)
    n = min(_BLOCKS, outline.n_layers)
    return Amounts(calls=call / n, forward=per_token / n, backward=backward / n, logits=logits)


def _two_blocks(outline: Outline, dtype: str, device: torch.device) -> Any:
    """A model of two of these blocks, without an unembedding, whose weights mean nothing."""
    config = copy.deepcopy(outline.config.get_text_config())
    n_blocks = min(_BLOCKS, outline.n_layers)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = n_blocks, _VOCABULARY, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_blocks]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).base_model
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    use_quick_products(model)
    return model.requires_grad_(False).eval()


def saved_bytes(outline: Outline, dtype: str) -> int:
    """Bytes that the backward pass through one block keeps of a token, weights not counted."""
    model = _two_blocks(outline, dtype, torch.device("cpu"))
    weights = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.ones(1, _WIDTH, outline.d_model, dtype=getattr(torch, dtype)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=x, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // (
        min(_BLOCKS, outline.n_layers) * _WIDTH
    )

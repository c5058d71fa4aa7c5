"""Greedy replies to prompts: batched by length, with a key-value cache, padded on the left.

With padding on the left every row's newest token stands in the last column, so that a step is one column for the whole
batch. Attention masks and positions are explicit: a reply does not depend on the batch it was made in.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import KVCachedSuffix, TemplateLayout, flush_right, pad, similar_lengths
from sfc.models.interventions import Intervention, intervening
from sfc.models.loading import Model


class Continuations(NamedTuple):
    """What a model says after prompts."""

    ids: list[list[int]]
    """the greedy reply of each row, its end-of-turn token included where the model ended it"""
    first_logits: Float[Tensor, "batch vocab"]
    """of the first token of each reply, in float32"""


def generate_replies(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    max_new_tokens: int,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[str]:
    """The model's greedy reply to each prompt as text, without special tokens; arguments as `generate_ids`."""
    replies = generate_ids(model, prompts, max_new_tokens, batch_tokens, progress)
    return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in replies]


def generate_ids(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    max_new_tokens: int,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[list[int]]:
    """The tokens of the model's greedy reply to each prompt, in the order of the prompts.

    A reply that the model ended itself ends with its end-of-turn token; another one was cut.

    Args:
        max_new_tokens: at most this many tokens per reply.
        batch_tokens: tokens per batch, padding and the longest reply included.
        progress: called with the number of prompts done since the last call.
    """
    replies: list[list[int]] = [[] for _ in prompts]
    for group in similar_lengths(prompts, batch_tokens, max_new_tokens):
        some = [prompts[i] for i in group]
        whole = flush_right(pad(some, TemplateLayout.of(some), model.device))
        for i, ids in zip(group, continue_tails(model, whole, max_new_tokens).ids, strict=True):
            replies[i] = ids
        progress(len(group))
    return replies


def with_replies(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    max_new_tokens: int,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[TokenizedPrompt]:
    """The prompts with the model's greedy replies after them; arguments as `generate_ids`."""
    replies = generate_ids(model, prompts, max_new_tokens, batch_tokens, progress)
    return [
        TokenizedPrompt(
            np.concatenate([prompt.ids, np.array(reply, dtype=prompt.ids.dtype)]),
            np.concatenate([prompt.roles, np.full(len(reply), Role.REPLY)]),
        )
        for prompt, reply in zip(prompts, replies, strict=True)
    ]


@torch.no_grad()
def continue_tails(
    model: Model,
    suffixes: KVCachedSuffix,
    max_new_tokens: int,
    in_prompt: Mapping[str, Intervention] | None = None,
    in_reply: Mapping[str, Intervention] | None = None,
) -> Continuations:
    """The model's greedy replies to prompts of which all but the suffixes was run before; these stay what they were.

    A step is one column for the whole batch, until every reply has ended.

    Args:
        max_new_tokens: at most this many tokens per reply, at least one.
        in_prompt: act in the pass over the suffixes, whose activations are [batch, pos, …].
        in_reply: act in every step after it, on the token just added: activations are [batch, 1, …].
    """
    ends = torch.tensor(sorted(end_tokens(model)), device=suffixes.ids.device)
    first, cache = _step(model, {"input_ids": suffixes.ids, **suffixes.run_arguments}, in_prompt or {})
    newest, mask, positions = first.argmax(-1, keepdim=True), suffixes.mask, suffixes.positions[:, -1:]
    new, ended = [newest], torch.isin(newest[:, 0], ends)
    while len(new) < max_new_tokens and not ended.all():
        mask = torch.cat([mask, torch.ones_like(newest)], dim=1)
        positions = positions + 1
        step = {"input_ids": newest, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        logits, cache = _step(model, {**step, "past_key_values": cache}, in_reply or {})
        newest = logits.argmax(-1, keepdim=True)
        new.append(newest)
        ended |= torch.isin(newest[:, 0], ends)
    # What follows a row's end means nothing: its column had to be filled while others went on.
    replies = [_with_end(ids, end_tokens(model)) for ids in torch.cat(new, dim=1).tolist()]
    return Continuations(replies, first)


def end_tokens(model: Model) -> set[int]:
    """Ids of the tokens that end a reply: the tokenizer's end token and those that the model's configuration names."""
    named = getattr(model.hf.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list) else [named]), model.tokenizer.eos_token_id]
    return {int(i) for i in ids if i is not None}


def _step(
    model: Model, inputs: dict[str, Any], interventions: Mapping[str, Intervention]
) -> tuple[Float[Tensor, "batch vocab"], Any]:
    """Logits after the last column, and the cache with these columns' keys and values."""
    last_only = {"unembed.hook_in": lambda hidden: hidden[:, -1:]}
    with intervening(model, interventions), intervening(model, last_only):
        output = model.hf(**inputs)
    return output.logits[:, -1].float(), output.past_key_values


def _with_end(ids: list[int], ends: set[int]) -> list[int]:
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)

"""Replies to prompts, greedy or sampled: batched by length, with a key-value cache, padded on the left.

With padding on the left every row's newest token stands in the last column, so that a step is one column for the whole
batch. Attention masks and positions are explicit: a reply does not depend on the batch it was made in.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfc.data.render import TokenizedPrompt, answered
from sfc.models.batches import KVCachedSuffix, TemplateLayout, flush_right, pad, similar_lengths
from sfc.models.interventions import Intervention, intervening
from sfc.models.model import Model, is_finite, not_finite

Choose = Callable[[Float[Tensor, "rows vocab"], Int[Tensor, " rows"], int], Int[Tensor, " rows"]]
"""Chooses the next tokens from their logits, of which it is told the rows in the batch and the number of the step."""

_DROPPED_AT_ONCE = 0.15
"""share of ended rows at which the others go on without them: to drop rows copies the cache"""


def greedy(logits: Float[Tensor, "rows vocab"], rows: Int[Tensor, " rows"], step: int) -> Int[Tensor, " rows"]:
    """The most likely tokens."""
    return logits.argmax(-1)


def sampled(uniforms: Float[Tensor, "batch steps"]) -> Choose:
    """Tokens drawn at temperature 1, each by a number in [0, 1) of its own: a row is drawn alike in every batch."""

    def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        cumulative = torch.softmax(logits, -1).cumsum(-1)
        # Rounding leaves the last sum a little off 1. No number may fall behind it.
        wanted = uniforms[rows, step, None].to(cumulative) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp_max(logits.shape[1] - 1)

    return choose


class Continuations(NamedTuple):
    """What a model says after prompts."""

    ids: list[list[int]]
    """the reply of each row, its end-of-turn token included where the model ended it"""
    ended: list[bool]
    """whether each has an end, or was cut"""
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

    Raises:
        UserError: the model has no positions for the longest prompt and its reply, or logits are not finite.
    """
    model.check_room(max((len(prompt.ids) for prompt in prompts), default=0) + max_new_tokens - 1)
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
    return [answered(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]


@torch.no_grad()
def continue_tails(
    model: Model,
    suffixes: KVCachedSuffix,
    max_new_tokens: int,
    in_prompt: Mapping[str, Intervention] | None = None,
    in_reply: Mapping[str, Intervention] | None = None,
    choose: Choose = greedy,
    also_end: Collection[int] = (),
) -> Continuations:
    """The model's replies to prompts of which all but the suffixes was run before; these stay what they were.

    A step is one column for the whole batch, until every reply has ended.

    Args:
        max_new_tokens: at most this many tokens per reply, at least one.
        in_prompt: act in the pass over the suffixes, whose activations are [batch, pos, …].
        in_reply: act in every step after it, on the token just added: activations are [batch, 1, …].
        choose: chooses each token; greedy unless told otherwise.
        also_end: ids of tokens that end a reply beside the model's own.

    Raises:
        UserError: the model has no positions for the longest reply, or logits are not finite.
    """
    model.check_room(suffixes.width + max_new_tokens - 1)
    device, n_rows = suffixes.ids.device, len(suffixes.ids)
    ends = torch.tensor(sorted(end_tokens(model) | set(also_end)), device=device)
    first, cache = _step(model, {"input_ids": suffixes.ids, **suffixes.run_arguments}, in_prompt or {})
    logits, rows, mask, positions = (
        first,
        torch.arange(n_rows, device=device),
        suffixes.mask,
        suffixes.positions[:, -1:],
    )
    ended = torch.zeros(n_rows, dtype=torch.bool, device=device)
    said = torch.full((n_rows, max_new_tokens), -1, device=device)
    finite = is_finite(first)
    for step in range(max_new_tokens):
        newest = choose(logits, rows, step)
        said[rows, step] = newest
        ended |= torch.isin(newest, ends)
        if step + 1 == max_new_tokens or ended.all():
            said = said[:, : step + 1]
            break
        # What acts on rows counts on all of them; else the others go on without those that have ended.
        if not in_reply and ended.float().mean() > _DROPPED_AT_ONCE:
            on = (~ended).nonzero()[:, 0]
            rows, newest, mask, positions, ended = (values[on] for values in (rows, newest, mask, positions, ended))
            cache.batch_select_indices(on)
        mask = torch.cat([mask, torch.ones_like(newest)[:, None]], dim=1)
        positions = positions + 1
        inputs = {"input_ids": newest[:, None], "attention_mask": mask, "position_ids": positions, "use_cache": True}
        logits, cache = _step(model, {**inputs, "past_key_values": cache}, in_reply or {})
        finite &= is_finite(logits)
    if not finite:  # asked once, because to ask is to wait for the device
        raise not_finite("the logits of some replies", model.dtype)
    return Continuations(*_up_to_end(said, ends), first)


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


def _up_to_end(said: Int[Tensor, "batch steps"], ends: Int[Tensor, " ends"]) -> tuple[list[list[int]], list[bool]]:
    """Each row as far as its first end, which is kept, and whether it has one.

    What follows the end means nothing: its column had to be filled while others went on.
    """
    is_end = torch.isin(said, ends)
    has_end = is_end.any(1)
    lengths = torch.where(has_end, is_end.int().argmax(1) + 1, said.shape[1])
    rows = zip(said.tolist(), lengths.tolist(), strict=True)
    return [ids[:length] for ids, length in rows], has_end.tolist()

"""What an edit does to prompts: their refusal scores, their replies, and the cross-entropy of given replies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.circuits.problem import PromptRuns
from sfc.models.batches import PACKED_TOKENS, PAD_SLOT, Batch, SlotLayout, make_batches
from sfc.models.generation import continue_tails
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.models.running import logits_at
from sfc.models.score import Score, score_batch
from sfc.models.tails import flush_right
from sfc.prompts.render import Role, TokenizedPrompt


class Edit(NamedTuple):
    """What acts in a run."""

    in_prompt: Callable[[Batch], Mapping[str, Intervention]]
    """given the batch, whose replies, if any, stand in no slot"""
    in_reply: Mapping[str, Intervention]
    """at every token that is generated"""


NO_EDIT = Edit(lambda _: {}, {})


class Replies(NamedTuple):
    """What edited prompts are answered, in the order of the prompts."""

    scores: Float[np.ndarray, " prompts"]
    texts: list[str]


@torch.no_grad()
def edited_scores(model: Model, score: Score, runs: PromptRuns, edit: Edit) -> Float[np.ndarray, " prompts"]:
    """The refusal score of every prompt, from its first token on, in nats."""
    scores = np.full(runs.n_prompts, np.nan)
    for batch, _ in runs:
        scores[batch.prompts.cpu().numpy()] = score_batch(model, score, batch, edit.in_prompt(batch)).cpu().numpy()
    return scores


@torch.no_grad()
def edited_replies(
    model: Model,
    score: Score,
    prompts: Sequence[TokenizedPrompt],
    layout: SlotLayout,
    edit: Edit,
    reply_tokens: int,
) -> Replies:
    """The greedy reply to every prompt, with the score from the same run."""
    scores, texts = np.full(len(prompts), np.nan), [""] * len(prompts)
    for batch in make_batches(prompts, layout, PACKED_TOKENS, model.device):
        places = batch.prompts.tolist()
        tails = flush_right(batch)
        continued = continue_tails(model, tails, reply_tokens, edit.in_prompt(tails), edit.in_reply)
        scores[places] = score(continued.first_logits, tails).cpu().numpy()
        decoded = model.tokenizer.batch_decode(continued.ids, skip_special_tokens=True)
        for place, text in zip(places, decoded, strict=True):
            texts[place] = text
    return Replies(scores, texts)


@torch.no_grad()
def reply_losses(
    model: Model, prompts: Sequence[TokenizedPrompt], layout: SlotLayout, edit: Edit
) -> Float[np.ndarray, " tokens"]:
    """The cross-entropy of each token of the replies that come with the prompts, in nats."""
    losses = []
    for batch in make_batches(prompts, layout, PACKED_TOKENS, model.device):
        is_reply = _is_reply([prompts[i] for i in batch.prompts.tolist()], batch)
        before = torch.roll(is_reply, -1, dims=1)
        without_replies = replace(batch, slots=torch.where(is_reply, PAD_SLOT, batch.slots))
        # What acts at generated tokens acts at these.
        logits = logits_at(model, batch, before, {**edit.in_prompt(without_replies), **edit.in_reply})
        targets = batch.ids[is_reply]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu().numpy())
    return np.concatenate(losses)


def _is_reply(prompts: Sequence[TokenizedPrompt], batch: Batch) -> Tensor:
    marked = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        marked[row, : len(prompt.ids)] = torch.from_numpy(prompt.roles == Role.REPLY)
    return marked.to(batch.ids.device)

"""Prompts on a bench: run once up to their first steered token, then steered again and again.

Three things make it fast. Tokens before the first steered one keep their keys and values (`Tails`), scores start from
the last block before the first edited site (`Prefix`), and many edits of many prompts go through in one packed run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.data.render import Role, TokenizedPrompt
from sfc.models.edits import Edit, editing
from sfc.models.generation import continue_tails
from sfc.models.interventions import Intervention
from sfc.models.loading import Model
from sfc.models.positions import steered_tokens
from sfc.models.running import Prefix, every_prefix, last_logits, layer_before, logits_at
from sfc.models.score import RefusalScore
from sfc.models.tails import Tails, make_tails

Progress = Callable[[int], None]
"""Called with the number of steered runs done since the last call, one per edit and prompt."""


@dataclass(frozen=True)
class Group:
    """Prompts of similar length."""

    model: Model
    prompts: Int[np.ndarray, " batch"]
    """their places in the list that was put on the bench"""
    tails: Tails
    where: Bool[Tensor, "batch pos"]
    """steered tokens of the tails"""
    replies: Bool[Tensor, "batch pos"]
    """tokens of the tails after which a token of a given reply comes"""

    @cached_property
    def prefixes(self) -> dict[int, Prefix]:
        """The unsteered runs, stopped after each layer."""
        return every_prefix(self.model, self.tails)


@dataclass(frozen=True)
class Bench:
    """Prompts ready to be steered."""

    model: Model
    score: RefusalScore
    groups: tuple[Group, ...]
    batch_tokens: int
    """tokens per packed run; at least one edit goes through at a time"""
    during_reply: bool
    """whether tokens that are generated are steered too"""

    @property
    def n_prompts(self) -> int:
        return sum(len(group.prompts) for group in self.groups)


class SteeredReplies(NamedTuple):
    """What steered prompts are answered."""

    scores: Float[np.ndarray, "edits prompts"]
    """refusal scores, in nats"""
    texts: list[list[str]]
    """for each edit, the reply to each prompt"""


@torch.no_grad()
def make_bench(
    model: Model, prompts: Sequence[TokenizedPrompt], positions: str, during_reply: bool, batch_tokens: int
) -> Bench:
    """Put prompts, some with a reply after them, on the bench.

    Args:
        positions: name of a position set (see `sfc.models.positions`).

    Raises:
        UserError: the name is no position set.
    """
    steered = [steered_tokens(positions, prompt, during_reply) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].ids), i))
    parts: list[list[int]] = []
    for i in order:
        if parts and len(prompts[i].ids) * (len(parts[-1]) + 1) <= batch_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    groups = tuple(
        _group(model, np.array(part), [prompts[i] for i in part], [steered[i] for i in part]) for part in parts
    )
    return Bench(model, RefusalScore.of(model), groups, batch_tokens, during_reply)


def _group(
    model: Model, places: np.ndarray, prompts: list[TokenizedPrompt], steered: list[Bool[np.ndarray, " pos"]]
) -> Group:
    replies = [np.append(prompt.roles[1:] == Role.REPLY, False) for prompt in prompts]
    # At least the last token is run, or there would be no logits.
    firsts = [
        np.append(np.flatnonzero(one | other), len(one) - 1)[0] for one, other in zip(steered, replies, strict=True)
    ]
    n_tail = max(len(prompt.ids) - int(first) for prompt, first in zip(prompts, firsts, strict=True))
    tails = make_tails(model, prompts, n_tail)
    where, predicting = (_in_tails(tokens, n_tail).to(model.device) for tokens in (steered, replies))
    return Group(model, places, tails, where, predicting)


def _in_tails(marked: Sequence[Bool[np.ndarray, " pos"]], n_tail: int) -> Bool[Tensor, "prompts tail"]:
    """The marks of the last `n_tail` tokens of each prompt, flush right."""
    tails = torch.zeros(len(marked), n_tail, dtype=torch.bool)
    for row, tokens in enumerate(marked):
        kept = tokens[-n_tail:]
        tails[row, n_tail - len(kept) :] = torch.from_numpy(kept)
    return tails


class _Packed(NamedTuple):
    """Several edits of one group's prompts, in one batch: first all prompts by the first edit."""

    edits: Int[np.ndarray, " packed"]
    group: Group
    tails: Tails
    in_prompt: dict[str, Intervention]
    in_reply: dict[str, Intervention]

    @property
    def prefix(self) -> Prefix:
        """Where a run that generates nothing may start."""
        first = next(iter(self.in_prompt))
        return self.group.prefixes[layer_before(first)].repeat(len(self.edits))


def _packed(bench: Bench, edits: Sequence[Edit], new_tokens: int = 0) -> Iterator[_Packed]:
    """Every edit with every prompt, packed where edits are of one kind and act at the same sites.

    Args:
        new_tokens: of each reply that is generated: they count in the size of a batch.
    """
    alike: dict[tuple, list[int]] = {}
    for i, edit in enumerate(edits):
        alike.setdefault((edit.kind, edit.sites), []).append(i)
    for group in bench.groups:
        size = max(1, bench.batch_tokens // (len(group.prompts) * (group.tails.ids.shape[1] + new_tokens)))
        for (_, sites), places in alike.items():
            for start in range(0, len(places), size):
                packed = places[start : start + size]
                act = editing([edits[i] for i in packed], group.where)
                act_on_new = editing([edits[i] for i in packed], None) if bench.during_reply else None
                yield _Packed(
                    np.array(packed),
                    group,
                    group.tails.repeat(len(packed)),
                    dict.fromkeys(sites, act),
                    dict.fromkeys(sites, act_on_new) if act_on_new else {},
                )


@torch.no_grad()
def steered_scores(bench: Bench, edits: Sequence[Edit], progress: Progress = lambda runs: None) -> np.ndarray:
    """The refusal score [edits, prompts] of every prompt under every edit, in nats."""
    scores = np.full((len(edits), bench.n_prompts), np.nan)
    for run in _packed(bench, edits):
        of_run = bench.score(last_logits(bench.model, run.tails, run.in_prompt, run.prefix))
        scores[np.ix_(run.edits, run.group.prompts)] = of_run.view(len(run.edits), -1).cpu().numpy()
        progress(len(of_run))
    return scores


@torch.no_grad()
def plain_scores(bench: Bench) -> Float[np.ndarray, " prompts"]:
    """The refusal score of every prompt as it is, in nats."""
    scores = np.full(bench.n_prompts, np.nan)
    for group in bench.groups:
        scores[group.prompts] = bench.score(last_logits(bench.model, group.tails)).cpu().numpy()
    return scores


@torch.no_grad()
def steered_replies(
    bench: Bench, edits: Sequence[Edit], reply_tokens: int, progress: Progress = lambda runs: None
) -> SteeredReplies:
    """The greedy reply to every prompt under every edit, with the score from the same run."""
    scores = np.full((len(edits), bench.n_prompts), np.nan)
    texts = [[""] * bench.n_prompts for _ in edits]
    for run in _packed(bench, edits, reply_tokens):
        continued = continue_tails(bench.model, run.tails, reply_tokens, run.in_prompt, run.in_reply)
        of_run = bench.score(continued.first_logits).view(len(run.edits), -1)
        scores[np.ix_(run.edits, run.group.prompts)] = of_run.cpu().numpy()
        decoded = bench.model.tokenizer.batch_decode(continued.ids, skip_special_tokens=True)
        for row, text in enumerate(decoded):
            number, place = divmod(row, len(run.group.prompts))
            texts[run.edits[number]][run.group.prompts[place]] = text
        progress(len(decoded))
    return SteeredReplies(scores, texts)


@torch.no_grad()
def plain_replies(bench: Bench, reply_tokens: int) -> SteeredReplies:
    """The greedy reply to every prompt as it is; the arrays have one row."""
    scores, texts = plain_scores(bench)[None], [""] * bench.n_prompts
    for group in bench.groups:
        continued = continue_tails(bench.model, group.tails, reply_tokens)
        decoded = bench.model.tokenizer.batch_decode(continued.ids, skip_special_tokens=True)
        for place, text in zip(group.prompts, decoded, strict=True):
            texts[place] = text
    return SteeredReplies(scores, [texts])


@torch.no_grad()
def last_token_kl(bench: Bench, edits: Sequence[Edit], progress: Progress = lambda runs: None) -> np.ndarray:
    """KL(as it is || steered) [edits, prompts] of the next token's distribution after each prompt, in nats."""
    divergence = np.full((len(edits), bench.n_prompts), np.nan)
    plain = {id(group): last_logits(bench.model, group.tails).log_softmax(-1) for group in bench.groups}
    for run in _packed(bench, edits):
        steered = last_logits(bench.model, run.tails, run.in_prompt, run.prefix).log_softmax(-1)
        of_run = kl(plain[id(run.group)].repeat(len(run.edits), 1), steered)
        divergence[np.ix_(run.edits, run.group.prompts)] = of_run.view(len(run.edits), -1).cpu().numpy()
        progress(len(of_run))
    return divergence


def kl(p: Float[Tensor, "rows vocab"], q: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Kullback-Leibler divergence of distributions given by their log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


class TextEffect(NamedTuple):
    """What steering does to given replies."""

    losses: Float[np.ndarray, "settings tokens"]
    """cross-entropy of each reply token; the first setting is the model as it is, then come the edits"""
    divergence: Float[np.ndarray, "settings tokens"]
    """KL(as it is || steered) of the distribution in which that token is one"""
    is_first: Bool[np.ndarray, " tokens"]
    """whether a token opens its reply"""


@torch.no_grad()
def effect_on_replies(bench: Bench, edits: Sequence[Edit], progress: Progress = lambda runs: None) -> TextEffect:
    """Teacher-forced: the losses, in nats, of the replies that came with the prompts."""
    losses, divergences, firsts = [], [], []
    for group in bench.groups:
        targets = torch.roll(group.tails.ids, -1, dims=1)[group.replies]
        plain = logits_at(bench.model, group.tails, group.replies).log_softmax(-1)
        alone = Bench(bench.model, bench.score, (group,), group.tails.ids.numel(), bench.during_reply)
        of_group, kl_of_group = [_loss(plain, targets)], [torch.zeros(len(targets))]
        for run in sorted(_packed(alone, edits), key=lambda run: run.edits[0]):
            steered = logits_at(bench.model, run.tails, group.replies, run.in_prompt, run.prefix).log_softmax(-1)
            of_group.append(_loss(steered, targets))
            kl_of_group.append(kl(plain, steered).cpu())
            progress(len(group.prompts))
        losses.append(torch.stack(of_group))
        divergences.append(torch.stack(kl_of_group))
        firsts.append((group.replies & ~torch.roll(group.replies, 1, dims=1))[group.replies].cpu())
    return TextEffect(torch.cat(losses, 1).numpy(), torch.cat(divergences, 1).numpy(), torch.cat(firsts).numpy())


def _loss(log_p: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return -log_p.gather(1, targets[:, None])[:, 0].cpu()

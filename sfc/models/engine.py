"""One engine for everything that is asked of prompts under edits: scores, next-token divergence, replies and losses.

An edit is whatever changes activations while a model runs: ablating what lies outside a circuit, steering along a
direction, patching from another run, scaling features. Three things make many of them cheap. Where only late tokens are
edited, those before them keep their keys and values (`prepare_suffixes`); a run starts from the residual stream cached
at the last block before the first edited site; and many edits of many prompts go through in one packed batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import NO_POSITION, PACKED_TOKENS, Batch, cache_suffixes, flush_right, similar_lengths
from sfc.models.generation import continue_tails
from sfc.models.interventions import Intervention, Interventions
from sfc.models.model import Model, not_finite
from sfc.models.running import CachedResidual, cached_residual_after, last_logits, layer_before, logits_at
from sfc.models.score import Score, score_batch

Progress = Callable[[int], None]
"""called with the number of edited runs done since the last call, one per edit and prompt"""


def _silent(_runs: int) -> None:
    pass


class Alike(NamedTuple):
    """Edits of a family that can share a run."""

    members: Sequence[int]
    first_site: str | None
    """the first one at which any of them acts; None where none acts anywhere"""


class Edits(ABC):
    """A family of edits, numbered from 0."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def alike(self) -> Sequence[Alike]:
        """The members, in groups that can be packed into one run."""

    @abstractmethod
    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        """What acts in a packed run of some members that are alike.

        Args:
            batch: first all prompts under the first of the members, then all under the next. Tokens of replies that are
                given as if the model had generated them are not touchable in it: the engine has `in_reply` act there.
        """

    def for_batch(self, model: Model, batch: Batch, start: CachedResidual | None) -> "Edits":
        """The same edits, with what they must know of the batch as it is; asked once, before it is packed."""
        del model, batch, start
        return self


class _NoEdit(Edits):
    def __len__(self) -> int:
        return 1

    def alike(self) -> Sequence[Alike]:
        return [Alike([0], None)]

    def interventions(self, batch: Batch, members: Sequence[int]) -> Interventions:
        return Interventions()


NO_EDIT = _NoEdit()
"""a family of one, which leaves the model as it is"""


@dataclass(frozen=True)
class PreparedPrompts:
    """Prompts in batches, with the residual streams that edited runs of each batch may start from."""

    model: Model
    batches: Sequence[Batch]
    """whole prompts, or their last tokens; `prompts` of all together are the numbers from 0"""
    cached: Sequence[dict[int, CachedResidual]] | None
    """for each batch by layer; None where every block must run. Valid as long as the weights stay what they are."""

    @classmethod
    def of(cls, model: Model, batches: Sequence[Batch], cached: Sequence[CachedResidual] = ()) -> "PreparedPrompts":
        """Prompts as they are.

        Args:
            cached: for each batch a residual stream, where one is known.
        """
        by_layer = [{cached.layer: cached} for cached in cached] or [{} for _ in batches]
        return cls(model, batches, by_layer)

    @property
    def n_prompts(self) -> int:
        return sum(len(batch.lengths) for batch in self.batches)

    def each(self) -> "Iterator[PreparedPrompts]":
        """The batches, one by one."""
        for number, batch in enumerate(self.batches):
            yield replace(self, batches=[batch], cached=self.cached and [self.cached[number]])

    def start(self, number: int, first_site: str | None) -> CachedResidual | None:
        """The latest point from which a run of a batch that is edited from a site on may start; None is its tokens."""
        if self.cached is None:
            return None
        known = self.cached[number]
        layer = max(known, default=-1) if first_site is None else layer_before(first_site)
        if layer < 0:
            return None
        if layer not in known:
            earlier = max((each for each in known if each < layer), default=-1)
            known[layer] = cached_residual_after(self.model, self.batches[number], layer, known.get(earlier))
        return known[layer]


@torch.no_grad()
def prepare_suffixes(
    model: Model,
    prompts: Sequence[TokenizedPrompt],
    edited: Callable[[Int[np.ndarray, " pos"]], Bool[np.ndarray, " pos"]],
    batch_tokens: int = PACKED_TOKENS,
) -> PreparedPrompts:
    """Prompts, some with a reply after them, of which everything before the first edited token is run here once.

    Args:
        edited: which tokens of a prompt may be edited, given its roles; never the first, an attention sink.
        batch_tokens: tokens of a batch of whole prompts, padding included.
    """
    batches = []
    for group in similar_lengths(prompts, batch_tokens):
        some = [prompts[i] for i in group]
        n_suffix = max(len(prompt.ids) - _first_run(prompt, edited(prompt.roles)) for prompt in some)
        suffixes = cache_suffixes(model, some, n_suffix)
        batches.append(replace(suffixes, prompts=torch.tensor(group, device=model.device)))
    return PreparedPrompts.of(model, batches)


def _first_run(prompt: TokenizedPrompt, edited: Bool[np.ndarray, " pos"]) -> int:
    """The first token that is edited or after which a token of the reply comes; at the latest, the last token."""
    before_reply = np.append(prompt.roles[1:] == Role.REPLY, True)
    wanted = np.flatnonzero(edited | before_reply)
    return int(wanted[wanted > 0][0]) if len(prompt.ids) > 1 else 0


class PackedRun(NamedTuple):
    """Several edits of one batch of prompts, in one batch: first all prompts under the first edit."""

    members: Int[np.ndarray, " edits"]
    prompts: Int[np.ndarray, " prompts"]
    batch: Batch
    acting: Interventions
    start: CachedResidual | None
    """where a run that generates nothing may start"""
    dtype: torch.dtype
    """of the model"""

    def fill(self, table: Float[np.ndarray, "edits prompts"], values: Float[Tensor, " rows"]) -> None:
        """Write a value per row of the batch where it belongs.

        Raises:
            UserError: a value is not finite.
        """
        by_edit = rearrange(values, "(edits prompts) -> edits prompts", edits=len(self.members)).cpu()
        if not by_edit.isfinite().all():
            raise not_finite("the scores of some prompts", self.dtype)
        table[np.ix_(self.members, self.prompts)] = by_edit.numpy()


@torch.no_grad()
def packed_runs(
    prompts: PreparedPrompts, edits: Edits, batch_tokens: int = PACKED_TOKENS, new_tokens: int = 0
) -> Iterator[PackedRun]:
    """Every edit with every prompt, as many edits at a time as fit into the budget, and at least one.

    Args:
        new_tokens: of each reply that is generated: they count in the size of a batch.
    """
    for number, batch in enumerate(prompts.batches):
        n_prompts, n_positions = batch.ids.shape
        at_once = max(1, batch_tokens // (n_prompts * (n_positions + new_tokens)))
        for alike, first_site in edits.alike():
            start = prompts.start(number, first_site)
            of_batch = edits.for_batch(prompts.model, batch, start)
            for first in range(0, len(alike), at_once):
                members = np.asarray(alike[first : first + at_once])
                packed = batch.repeat(len(members))
                acting = of_batch.interventions(packed, members.tolist())
                copies = start.repeat(len(members)) if start else None
                yield PackedRun(members, batch.prompts.cpu().numpy(), packed, acting, copies, prompts.model.dtype)


@torch.no_grad()
def scores(
    prompts: PreparedPrompts,
    score: Score,
    edits: Edits,
    progress: Progress = _silent,
    batch_tokens: int = PACKED_TOKENS,
) -> Float[np.ndarray, "edits prompts"]:
    """The score of every prompt under every edit, in nats."""
    table = np.full((len(edits), prompts.n_prompts), np.nan)
    for run in packed_runs(prompts, edits, batch_tokens):
        run.fill(table, score_batch(prompts.model, score, run.batch, run.acting.in_prompt, run.start))
        progress(len(run.batch.lengths))
    return table


@torch.no_grad()
def next_token_kl(
    prompts: PreparedPrompts, edits: Edits, progress: Progress = _silent, batch_tokens: int = PACKED_TOKENS
) -> Float[np.ndarray, "edits prompts"]:
    """KL(as it is || edited) of the next token's distribution after each prompt, in nats."""
    return next_tokens(prompts, lambda logits, _: logits[:, 0], edits, progress, batch_tokens).divergence


class NextTokens(NamedTuple):
    """What edits do to what comes next."""

    scores: Float[np.ndarray, "edits prompts"]
    """in nats"""
    divergence: Float[np.ndarray, "edits prompts"]
    """KL(as it is || edited) of the next token's distribution, in nats"""


@torch.no_grad()
def next_tokens(
    prompts: PreparedPrompts,
    score: Score,
    edits: Edits,
    progress: Progress = _silent,
    batch_tokens: int = PACKED_TOKENS,
) -> NextTokens:
    """`scores` and `next_token_kl` from the same runs."""
    scores, divergence = np.full((2, len(edits), prompts.n_prompts), np.nan)
    for one in prompts.each():
        plain = last_logits(one.model, one.batches[0], cached=one.start(0, None)).log_softmax(-1)
        for run in packed_runs(one, edits, batch_tokens):
            edited = last_logits(one.model, run.batch, run.acting.in_prompt, run.start)
            run.fill(scores, score(edited, run.batch))
            as_it_is = repeat(plain, "prompts v -> (edits prompts) v", edits=len(run.members))
            run.fill(divergence, kl(as_it_is, edited.log_softmax(-1)))
            progress(len(run.batch.lengths))
    return NextTokens(scores, divergence)


def kl(p: Float[Tensor, "rows vocab"], q: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Kullback-Leibler divergence of distributions given by their log-probabilities, in nats."""
    return (p.exp() * (p - q)).sum(-1)


class Replies(NamedTuple):
    """What prompts are answered under edits."""

    scores: Float[np.ndarray, "edits prompts"]
    """in nats, from the same run"""
    texts: list[list[str]]
    """for each edit, the reply to each prompt"""


@torch.no_grad()
def replies(
    prompts: PreparedPrompts,
    score: Score,
    edits: Edits,
    reply_tokens: int,
    progress: Progress = _silent,
    batch_tokens: int = PACKED_TOKENS,
) -> Replies:
    """The greedy reply to every prompt under every edit, with the score from the same run.

    Args:
        reply_tokens: at most this many tokens per reply.
        batch_tokens: tokens per packed run, those of the replies included.
    """
    prompts.model.check_room(max(batch.width for batch in prompts.batches) + reply_tokens - 1)
    # Keys and values of every block are needed, so that no block can be skipped.
    whole = replace(prompts, batches=[flush_right(batch) for batch in prompts.batches], cached=None)
    table = np.full((len(edits), prompts.n_prompts), np.nan)
    texts = [[""] * prompts.n_prompts for _ in range(len(edits))]
    for run in packed_runs(whole, edits, batch_tokens, reply_tokens):
        continued = continue_tails(prompts.model, flush_right(run.batch), reply_tokens, *run.acting)
        run.fill(table, score(continued.first_logits, run.batch))
        decoded = iter(prompts.model.tokenizer.batch_decode(continued.ids, skip_special_tokens=True))
        for edit in run.members:
            for prompt in run.prompts:
                texts[edit][prompt] = next(decoded)
        progress(len(run.batch.lengths))
    return Replies(table, texts)


class GivenReplies(NamedTuple):
    """What edits do to replies that are given."""

    plain_losses: Float[np.ndarray, " tokens"]
    """cross-entropy of each reply token in the model as it is, in nats"""
    losses: Float[np.ndarray, "edits tokens"]
    """the same under each edit"""
    divergence: Float[np.ndarray, "edits tokens"]
    """KL(as it is || edited), in nats, of the distribution from which that token comes"""
    is_first: Bool[np.ndarray, " tokens"]
    """whether a token opens its reply"""


@torch.no_grad()
def losses(prompts: PreparedPrompts, edits: Edits, progress: Progress = _silent) -> GivenReplies:
    """Teacher-forced: the cross-entropy of the replies that came with the prompts, as if the model had generated them.

    One edit runs at a time, since the logits of all reply tokens are large. Tokens come batch by batch.
    """
    parts = []
    for one in prompts.each():
        [batch] = one.batches
        is_reply = batch.roles == Role.REPLY
        before = torch.roll(is_reply, -1, dims=1)
        targets = batch.ids[is_reply]
        plain = logits_at(one.model, batch, before, cached=one.start(0, None)).log_softmax(-1)
        of_edits = torch.zeros(2, len(edits), len(targets))
        prompts_alone = replace(batch, template_positions=torch.where(is_reply, NO_POSITION, batch.template_positions))
        for run in packed_runs(replace(one, batches=[prompts_alone]), edits, batch_tokens=1):
            acting = _as_generated(run.acting, is_reply)
            edited = logits_at(one.model, run.batch, before, acting, run.start).log_softmax(-1)
            of_edits[:, run.members[0]] = torch.stack([_loss(edited, targets), kl(plain, edited)]).cpu()
            progress(len(run.prompts))
        first = is_reply & ~torch.roll(is_reply, 1, dims=1)
        parts.append((_loss(plain, targets).cpu(), *of_edits, first[is_reply].cpu()))
    return GivenReplies(*(torch.cat(part, dim=-1).numpy() for part in zip(*parts, strict=True)))


def _loss(log_p: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    return -log_p.gather(1, targets[:, None])[:, 0]


def _as_generated(acting: Interventions, is_reply: Bool[Tensor, "batch pos"]) -> dict[str, Intervention]:
    """Interventions of one pass over prompts and replies: `in_reply` acts at the tokens of the replies."""

    def at_site(site: str) -> Intervention:
        def act(x: Tensor) -> Tensor:
            of_prompt, of_reply = (
                x if changed is None else changed
                for part in acting
                for changed in [part[site](x) if site in part else None]
            )
            return torch.where(is_reply[(...,) + (None,) * (x.ndim - 2)], of_reply, of_prompt)

        return act

    return {site: at_site(site) for site in {**acting.in_prompt, **acting.in_reply}}

"""Fine-tune the dictionaries of all sites together, by what the model goes on to say.

A dictionary that is trained by variance spends its features on what varies, which need not be what matters. Braun et
al. 2024 train on the divergence of the model's output instead, and Karvonen 2025 finds that a short fine-tuning at the
end of an ordinary training is enough. Here every chat keeps its own features, at all sites in series, and has the
errors of another chat whose prompt is as long, which is counterfactual ablation with all features kept
(`sfc.circuits.counterfactuals`). What is lowered is the divergence of the next token from the model's own, where a
reply begins and at a share of all other positions, and beside it the variance of the model's own activations that the
features miss. Neither labels nor scores are used.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.data.render import Role, TokenizedPrompt
from sfc.models.batches import PAD_ROLE, Batch, TemplateLayout, pad
from sfc.models.engine import kl
from sfc.models.interventions import Intervention, recorder
from sfc.models.loading import Model
from sfc.models.running import CachedResidual, cached_residual_after, layer_before, logits_at
from sfc.saes.checkpoint import Parameters, Training, restore, save
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.kernels import sparse_encode, weighted_row_sums
from sfc.saes.start import ADAM_EPSILON
from sfc.saes.train import (
    CHECKPOINT_SHARE,
    MAX_GRADIENT_NORM,
    finish,
    normalise_decoder,
    remove_parallel_gradient,
    turned,
)

BATCH_TOKENS = 2048
WARMUP_STEPS = 10
DECAY_SHARE = 0.5
OTHER_SHARE = 0.4
"""share of the positions at which the next token counts, beside the one where a reply begins"""
FIRST_WEIGHT, OTHER_WEIGHT, VARIANCE_WEIGHT = 0.5, 1.0, 1.0
"""of the divergence where a reply begins, at other positions, and of the variance unexplained, summed over sites"""


def finetune(
    model: Model,
    chats: Sequence[TokenizedPrompt],
    dictionaries: Mapping[str, TopKDictionary],
    config: SaeConfig,
    *,
    seed: int,
    checkpoint: Path,
    report: Callable[[int], None],
) -> list[TopKDictionary]:
    """Take `config.finetune_steps` steps, each on about `BATCH_TOKENS` tokens of chats whose prompts are equally long.

    Args:
        chats: with replies or without; one whose prompt no other equals in length is left out.
        dictionaries: by site, in the order in which the model passes them; they stay as they are.
        checkpoint: a file to save the training to now and then, and to go on from where it is there.
        report: called with the number of steps done since the last call.

    Raises:
        UserError: no two prompts are equally long, the loss is not finite, or the checkpoint is of another training.
    """
    batches = equally_long(chats, seed, model.device)
    if not batches:
        raise UserError(
            "saes.finetune_steps: no two chats of the corpus have equally many tokens, to swap their errors"
        )
    layer = min(map(layer_before, dictionaries))
    scales = _scales(model, batches[-1], list(dictionaries))
    pairs = zip(dictionaries.values(), scales, strict=True)
    trainings = [_start(dictionary, scale, config) for dictionary, scale in pairs]
    k = next(iter(dictionaries.values())).k
    first = restore(checkpoint, trainings) if checkpoint.exists() else 0
    report(first)
    # Kept where they come again; the runs before the first site are most of a step.
    cached: dict[int, CachedResidual] = {}
    comes_again = config.finetune_steps > len(batches)
    checkpoint_at = time.perf_counter() + config.checkpoint_seconds
    for step in range(first, config.finetune_steps):
        epoch, place = divmod(step, len(batches))
        number = int(np.random.default_rng([seed, epoch, len(batches)]).permutation(len(batches))[place])
        batch = batches[number]
        start = cached[number] if number in cached else cached_residual_after(model, batch, layer)
        if comes_again:
            cached[number] = start
        loss = swapped_loss(model, batch, start, trainings, k, np.random.default_rng([seed, step]))
        loss = loss + config.anchor_weight * sum(map(turned, trainings))
        _descend(trainings, loss, config.finetune_rate * _schedule(step, config.finetune_steps))
        report(1)
        if time.perf_counter() >= checkpoint_at:
            seconds = save(checkpoint, trainings, step + 1)
            checkpoint_at = time.perf_counter() + max(config.checkpoint_seconds, CHECKPOINT_SHARE * seconds)
    return [finish(training, k) for training in trainings]


def equally_long(chats: Sequence[TokenizedPrompt], seed: int, device: torch.device) -> list[Batch]:
    """Batches of at least two chats whose prompts have equally many tokens, with replies of similar lengths."""
    layout = TemplateLayout.of(chats)
    by_length: dict[int, list[TokenizedPrompt]] = defaultdict(list)
    for i in np.random.default_rng(seed).permutation(len(chats)):
        by_length[int((chats[i].roles != Role.REPLY).sum())].append(chats[i])
    batches = []
    for _, alike in sorted(by_length.items()):
        alike.sort(key=lambda chat: len(chat.ids))
        n_batches = math.ceil(sum(len(chat.ids) for chat in alike) / BATCH_TOKENS)
        ends = np.linspace(0, len(alike), n_batches + 1).astype(int)
        groups = (alike[start:end] for start, end in pairwise(ends))
        batches += [pad(group, layout, device) for group in groups if len(group) > 1]
    return batches


def swapped_loss(
    model: Model,
    batch: Batch,
    cached: CachedResidual,
    trainings: Sequence[Training],
    k: int,
    random: np.random.Generator,
) -> Float[Tensor, ""]:
    """What is lowered: divergences in nats, and fractions of variance unexplained, by their weights."""
    rows, positions = batch.ids.shape
    partner = (torch.arange(rows, device=model.device) + int(random.integers(1, rows))) % rows
    is_first = torch.zeros_like(batch.touchable)
    is_first[:, int((batch.roles[0] != PAD_ROLE).logical_and(batch.roles[0] != Role.REPLY).sum()) - 1] = True
    drawn = torch.from_numpy(random.random((rows, positions)) < OTHER_SHARE).to(model.device)
    counts = is_first | (batch.touchable & drawn)
    own: dict[str, Tensor] = {}
    with torch.no_grad():
        plain = logits_at(model, batch, counts, {t.site: recorder(own, t.site) for t in trainings}, cached)
    missed: list[Float[Tensor, ""]] = []
    swaps = {t.site: _swapping_errors(t, k, batch.touchable, own, partner, missed) for t in trainings}
    swapped = logits_at(model, batch, counts, swaps, cached)
    divergence = kl(plain.log_softmax(-1), swapped.log_softmax(-1))
    weights = torch.where(is_first[counts], FIRST_WEIGHT / is_first.sum(), OTHER_WEIGHT / (counts & ~is_first).sum())
    return (weights * divergence).sum() + VARIANCE_WEIGHT * torch.stack(missed).sum()


def _swapping_errors(
    training: Training,
    k: int,
    touchable: Bool[Tensor, "rows pos"],
    own: Mapping[str, Float[Tensor, "rows pos d_in"]],
    partner: Int[Tensor, " rows"],
    missed: list[Float[Tensor, ""]],
) -> Intervention:
    """Keep a site's features, and have the errors of each row's partner, or its own where the partner has ended.

    Adds the variance unexplained to `missed`.
    """

    def reconstruct(x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        encoder, b_enc, W_dec, b_dec = training.parameters
        active = sparse_encode(x * training.scale - b_dec, encoder, b_enc, k)
        return (weighted_row_sums(*active, W_dec) + b_dec) / training.scale

    def swap(activation: Float[Tensor, "rows pos d_in"]) -> Float[Tensor, "rows pos d_in"]:
        x, current = own[training.site][touchable].float(), activation[touchable].float()
        partners = own[training.site][partner][touchable].float()
        kept = reconstruct(current)
        missed.append((kept - x).square().sum() / (x - x.mean(0)).square().sum())
        goes_on = touchable[partner][touchable][:, None]
        errors = torch.where(goes_on, partners - reconstruct(partners), (current - kept).detach())
        return activation.masked_scatter(touchable[..., None], (kept + errors).to(activation.dtype))

    return swap


def _descend(trainings: Sequence[Training], loss: Float[Tensor, ""], rate: float) -> None:
    for training in trainings:
        training.optimizer.zero_grad()
    loss.backward()
    for training in trainings:
        remove_parallel_gradient(training.parameters.W_dec)
    norm = torch.nn.utils.clip_grad_norm_([p for t in trainings for p in t.parameters], MAX_GRADIENT_NORM)
    if not norm.isfinite():
        raise UserError(f"fine-tuning of the SAEs diverged (loss {loss.item():g}); lower saes.finetune_rate")
    for training in trainings:
        training.optimizer.param_groups[0]["lr"] = rate
        training.optimizer.step()
        normalise_decoder(training.parameters.W_dec)


def _start(dictionary: TopKDictionary, scale: float, config: SaeConfig) -> Training:
    """A dictionary in the units in which it is trained, with an optimiser that knows nothing yet."""
    weights = (dictionary.W_enc.t(), dictionary.b_enc * scale, dictionary.W_dec, dictionary.b_dec * scale)
    parameters = Parameters(*(weight.detach().float().clone().requires_grad_() for weight in weights))
    optimizer = torch.optim.Adam(list(parameters), eps=ADAM_EPSILON, fused=True)
    anchors = parameters.W_dec.detach().clone() if config.anchor_weight > 0 else None
    unused = torch.zeros(dictionary.d_sae, dtype=torch.long, device=dictionary.W_dec.device)
    return Training(dictionary.site, scale, parameters, optimizer, unused, anchors)


@torch.no_grad()
def _scales(model: Model, batch: Batch, sites: Sequence[str]) -> list[float]:
    """What gives the activations of each site a mean norm of sqrt(d_in)."""
    seen: dict[str, Tensor] = {}
    logits_at(model, batch, torch.zeros_like(batch.touchable), {site: recorder(seen, site) for site in sites})
    norms = [seen[site][batch.touchable].float().norm(dim=-1).mean().item() for site in sites]
    return [math.sqrt(model.width(site)) / norm for site, norm in zip(sites, norms, strict=True)]


def _schedule(step: int, steps: int) -> float:
    """The learning rate after `step` steps as a share of the full one: linear warm-up, linear decay."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))

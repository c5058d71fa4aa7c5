"""Train top-k sparse autoencoders (Gao et al. 2024, "Scaling and evaluating sparse autoencoders"), one per site.

The trainer knows nothing of models or stores: it takes batches of activations from an iterator. Each site has its own
parameters, optimiser and random numbers, so that a site's SAE does not depend on which others are trained beside it.
Training runs on scaled activations (mean norm sqrt(d_in)); `finish` folds the scale into the biases.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.core.ranks import Peers
from sfc.saes.checkpoint import Parameters, Training, restore, save
from sfc.saes.dictionary import TopKDictionary
from sfc.saes.kernels import Sparse, sparse_encode, sparse_encode_with_dead, weighted_group_sums, weighted_row_sums
from sfc.saes.start import start

ALONE = Peers()
MAX_GRADIENT_NORM = 1.0
REPORT_EVERY = 10
_ALL_ROWS = slice(None)
"""steps between which nothing is asked of the device, so that it never waits: reports, dead features, checkpoints"""
CHECKPOINT_SHARE = 20  # at most one part in so many of the time goes into checkpoints


class SiteStats(NamedTuple):
    """How one SAE did on the batch of one step."""

    site: str
    loss: float
    """variance unexplained, plus the auxiliary loss, the L1 norm and the distance from the start by their weights"""
    fvu: float
    """share of the batch's variance that the reconstruction misses"""
    l0: float
    """mean number of active features per token"""
    dead: int
    """features that have not fired for `dead_after` tokens"""


class Progress(NamedTuple):
    """What training reports now and then."""

    step: int
    """1 after the first"""
    steps: int
    tokens_per_second: float
    """rows times sites since the last report, waiting for batches included"""
    sites: list[SiteStats]


class Loss(NamedTuple):
    """The parts of the loss of one step, and which features were active."""

    total: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    active: Sparse


def train_saes(
    stream: Callable[[int], Iterable[Float[Tensor, "sites batch d_in"]]],
    sample: Float[Tensor, "sites rows d_in"],
    config: SaeConfig,
    *,
    sites: Sequence[str],
    seed: int = 0,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    peers: Peers = ALONE,
) -> list[TopKDictionary]:
    """Train one SAE per site for `config.steps` batches and return them in the model's own units.

    Args:
        stream: given a number of batches to leave out, those that follow: float32 rows in the model's units, the same
            tokens at every site.
        sample: rows that are known beforehand; they give the input scale and where the parameters start.
        sites: hook points, in the order of the first axis of the batches.
        checkpoint: a file to save the training to now and then, and to go on from where it is there. The weights are
            then those of a training that was never interrupted.
        report: called every few steps and after the last.
        peers: processes that train the same SAEs, each on its share of every batch's rows. The first one of them saves
            checkpoints. The weights are those of one process, but for rounding.

    Raises:
        UserError: the activations are zero or not finite, the batches end too early, the loss is not finite, or the
            checkpoint is of another training.
    """
    trainings = [start(site, rows, config, seed, device) for site, rows in zip(sites, sample, strict=True)]
    first = restore(checkpoint, trainings) if checkpoint is not None and checkpoint.exists() else 0
    k = config.active_features(len(trainings[0].parameters.b_enc))
    reported, reported_at, checkpoint_at = first, time.perf_counter(), time.perf_counter() + config.checkpoint_seconds
    step, dead = first, [dead_features(training, config) for training in trainings]
    largest_norms = torch.zeros(len(trainings), device=device)
    for step, batch in enumerate(islice(stream(first), config.steps - first), start=first + 1):
        batch = batch.to(torch.float32)
        batch = batch.pin_memory().to(device, non_blocking=True) if largest_norms.is_cuda else batch.to(device)
        learning_rate = config.learning_rate * schedule(step, config)
        losses, norms = zip(
            *(
                train_step(training, rows, config, k, learning_rate, silent, peers)
                for training, rows, silent in zip(trainings, batch, dead, strict=True)
            ),
            strict=True,
        )
        largest_norms = largest_norms.maximum(torch.stack(norms))
        if step % REPORT_EVERY and step < config.steps:
            continue
        for norm, training, loss in zip(largest_norms.tolist(), trainings, losses, strict=True):
            if not math.isfinite(norm):
                raise UserError(
                    f"{training.site}: SAE training diverged (loss {loss.total.item():g}); lower saes.learning_rate"
                )
        dead = [dead_features(training, config) for training in trainings]
        now = time.perf_counter()
        speed = (step - reported) * batch.shape[0] * batch.shape[1] / (now - reported_at)
        stats = [_stats(*each) for each in zip(trainings, losses, dead, strict=True)]
        report(Progress(step, config.steps, speed, stats))
        reported, reported_at = step, now
        is_due = time.perf_counter() >= checkpoint_at and step < config.steps
        if checkpoint is not None and peers.number == 0 and is_due:
            seconds = save(checkpoint, trainings, step)
            checkpoint_at = time.perf_counter() + max(config.checkpoint_seconds, CHECKPOINT_SHARE * seconds)
    if step < config.steps:
        raise UserError(f"SAE training: the activations ended after {step} of {config.steps} steps; lower saes.steps")
    return [finish(training, k) for training in trainings]


def train_step(
    training: Training,
    x: Float[Tensor, "batch d_in"],
    config: SaeConfig,
    k: int,
    learning_rate: float,
    dead: Int[Tensor, " dead"],
    peers: Peers = ALONE,
) -> tuple[Loss, Float[Tensor, ""]]:
    """One step of gradient descent, in which nothing waits for the device; changes `training`.

    Args:
        dead: the features that the auxiliary loss revives, see `dead_features`.
        peers: processes that take the step together, each on its share of the rows.

    Returns:
        the loss before the step, and the norm that the gradient had before it was clipped.
    """
    on_cuda = x.device.type == "cuda"  # on a CPU products in bfloat16 are slower than in float32
    with torch.autocast("cuda", torch.bfloat16) if on_cuda else nullcontext():
        loss = sae_loss(
            training.parameters, x * training.scale, k, dead, config.auxiliary_weight, config.l1_weight,
            peers.share(len(x)), config.prefixes(len(training.tokens_since_fired)),
        )  # fmt: skip
    loss = loss._replace(total=loss.total + config.anchor_weight / peers.size * turned(training))
    training.optimizer.zero_grad()
    loss.total.backward()
    loss = Loss(loss.total.detach(), *loss[1:])
    for part in [*(parameter.grad for parameter in training.parameters), *loss[:2]]:
        peers.sum(part)
    remove_parallel_gradient(training.parameters.W_dec)
    norm = torch.nn.utils.clip_grad_norm_(training.parameters, MAX_GRADIENT_NORM)
    training.optimizer.param_groups[0]["lr"] = learning_rate
    training.optimizer.step()
    normalise_decoder(training.parameters.W_dec)
    _count_firings(training.tokens_since_fired, loss.active, len(x), peers)
    return loss, norm


def dead_features(training: Training, config: SaeConfig) -> Int[Tensor, " dead"]:
    """The features that have not fired for `config.dead_after` tokens."""
    return (training.tokens_since_fired >= config.dead_after).nonzero().squeeze(1)


def sae_loss(
    parameters: Parameters,
    x: Float[Tensor, "batch d_in"],
    k: int,
    dead: Int[Tensor, " dead"],
    auxiliary_weight: float,
    l1_weight: float = 0.0,
    own: slice = _ALL_ROWS,
    prefixes: Sequence[int] = (),
) -> Loss:
    """Squared error over the batch's variance, plus the auxiliary loss of Gao et al. 2024 where features are dead.

    Of Matryoshka SAEs (Bussmann et al. 2025) it is the mean over what the first features of each prefix reconstruct by
    themselves, and what all of them do.

    The auxiliary loss asks the d_in / 2 most active dead features to explain what the live ones missed; its weight
    falls in proportion when fewer than that are dead. The L1 norm of the features, where it has a weight, is a mean
    over the rows, in units of their mean norm sqrt(d_in).

    Args:
        own: the rows whose part of the loss is wanted. The parts of all rows sum to the loss.
        prefixes: numbers of features, rising.
    """
    encoder, b_enc, W_dec, b_dec = parameters
    variance = (x - x.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
    n_rows, x = len(x), x[own]
    k_dead = min(len(dead), x.shape[1] // 2) if auxiliary_weight > 0 else 0
    if k_dead == 0:
        active, revived = sparse_encode(x - b_dec, encoder, b_enc, k), None
    else:
        active, revived = sparse_encode_with_dead(x - b_dec, encoder, b_enc, k, dead, k_dead)
    if prefixes:
        parts = weighted_group_sums(*active, [0, *prefixes, len(W_dec)], W_dec)
    else:
        parts = weighted_row_sums(*active, W_dec)[:, None]
    errors = (x - b_dec)[:, None] - parts.cumsum(dim=1)
    error, missed_by_prefix = errors[:, -1], errors.square().sum(dim=(0, 2)) / variance
    fvu, total = missed_by_prefix[-1], missed_by_prefix.mean()
    if revived is not None:
        missed = error.detach() - revived @ W_dec[dead]
        share = k_dead / (x.shape[1] // 2)
        total = total + auxiliary_weight * share * missed.square().sum() / variance
    if l1_weight > 0:
        total = total + l1_weight * active.values.sum() / (n_rows * math.sqrt(x.shape[1]))
    return Loss(total, fvu.detach(), active)


def finish(training: Training, k: int) -> TopKDictionary:
    """The trained SAE in the model's own units: the scale goes into the biases, decoder rows keep length one."""
    encoder, b_enc, W_dec, b_dec = (parameter.detach() for parameter in training.parameters)
    weights = {"W_enc": encoder.t(), "b_enc": b_enc / training.scale, "W_dec": W_dec, "b_dec": b_dec / training.scale}
    return TopKDictionary(weights, k=k, site=training.site)


def schedule(step: int, config: SaeConfig) -> float:
    """The learning rate at a step (1 is the first) as a share of the full one: linear warm-up, linear decay."""
    decay_steps = config.decay_share * config.steps
    warmup = step / (config.warmup_steps + 1)
    decay = (config.steps - step + 1) / (decay_steps + 1)
    return min(1.0, warmup, decay)


@torch.no_grad()
def remove_parallel_gradient(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Keep only what turns the row of each row's gradient: its length is fixed, and Adam must not see the rest."""
    assert W_dec.grad is not None
    along = torch.bmm(W_dec.grad[:, None, :], W_dec[:, :, None])[:, 0]  # vecdot would store the product
    W_dec.grad.addcmul_(W_dec, along, value=-1)


@torch.no_grad()
def normalise_decoder(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Give every row length one again, after a step that may have changed it."""
    W_dec /= W_dec.norm(dim=-1, keepdim=True)


def turned(training: Training) -> Float[Tensor, ""]:
    """How far the features' directions are from their anchors: mean of 1 - cosine; 0 where there are none."""
    W_dec = training.parameters.W_dec
    return 1 - (W_dec * training.anchors).sum(dim=1).mean() if training.anchors is not None else W_dec.new_zeros(())


def _count_firings(tokens_since_fired: Int[Tensor, " d_sae"], active: Sparse, n_rows: int, peers: Peers) -> None:
    fired = torch.zeros_like(tokens_since_fired)
    fired.scatter_add_(0, active.indices.flatten(), (active.values > 0).flatten().long())
    peers.sum(fired)
    tokens_since_fired.add_(n_rows).masked_fill_(fired > 0, 0)


def _stats(training: Training, loss: Loss, dead: Int[Tensor, " dead"]) -> SiteStats:
    return SiteStats(
        site=training.site,
        loss=loss.total.item(),
        fvu=loss.fvu.item(),
        l0=(loss.active.values > 0).sum(dim=1).double().mean().item(),
        dead=len(dead),
    )

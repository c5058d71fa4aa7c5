"""The trainers that `sae_training.py` compares, each as a step to take and a reconstruction to judge.

A peer is used by its own programming interface with its own recommended settings; where its training loop cannot be
stepped from outside, the loop's body is repeated here in its order.
"""

import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import harness
import torch
from jaxtyping import Float
from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from sfc.core.config import SaeConfig
from sfc.saes.start import start
from sfc.saes.train import REPORT_EVERY, dead_features, finish, schedule, train_step

Rows = Float[Tensor, "rows d_in"]


class Problem(NamedTuple):
    """What is trained, and on what."""

    d_in: int
    d_sae: int
    k: int
    batch: int
    device: str

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


class Contender(NamedTuple):
    """An SAE in training."""

    step: Callable[[Rows], object]
    reconstruct: Callable[[Rows], Rows] | None = None
    features: Callable[[Rows], Float[Tensor, "rows d_sae"]] | None = None
    decoder: Callable[[], Float[Tensor, "d_sae d_in"]] | None = None


Builder = Callable[[Problem, Rows, int, int], Contender]
"""Makes a contender from the problem, a batch that is known beforehand, the steps of the run, and a seed."""


def ours(problem: Problem, sample: Rows, steps: int, seed: int, **settings: Any) -> Contender:
    expansion = problem.d_sae // problem.d_in
    config = SaeConfig(expansion=expansion, k=problem.k, steps=steps, batch_size=problem.batch, **settings)
    training = start("benchmark", sample, config, seed, problem.device)
    numbers, dead = itertools.count(1), [dead_features(training, config)]

    def step(x: Rows) -> None:
        number = next(numbers)
        train_step(training, x, config, problem.k, config.learning_rate * schedule(number, config), dead[0])
        if number % REPORT_EVERY == 0:
            dead[0] = dead_features(training, config)

    def reconstruct(rows: Rows) -> Rows:
        dictionary = finish(training, problem.k)
        return dictionary.decode_sparse(*dictionary.encode_sparse(rows))

    return Contender(
        step,
        reconstruct,
        lambda rows: finish(training, problem.k).encode(rows),
        lambda: training.parameters.W_dec.detach(),
    )


def saelens(
    problem: Problem, sample: Rows, steps: int, seed: int, b_dec: Tensor | float = 0.0, **settings: Any
) -> Contender:
    torch.manual_seed(seed)
    shape = TopKTrainingSAEConfig(
        problem.d_in,
        problem.d_sae,
        k=problem.k,
        device=problem.device,
        normalize_activations="expected_average_only_in",
    )
    sae = TopKTrainingSAE(shape)
    settings = {"lr_end": 0.0, **settings}  # asked for, though a constant learning rate has no use for it
    config = SAETrainerConfig(
        total_training_samples=steps * problem.batch,
        train_batch_size_samples=problem.batch,
        device=problem.device,
        autocast=problem.on_cuda,
        **settings,
    )
    trainer = SAETrainer(config, sae, iter(()))
    scale = math.sqrt(problem.d_in) / sample.norm(dim=1).mean().item()
    trainer.activation_scaler.scaling_factor = scale
    sae.b_dec.data += b_dec * scale

    def step(x: Rows) -> None:  # as in SAETrainer.fit
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    return Contender(
        step,
        lambda rows: sae.decode(sae.encode(rows * scale)) / scale,
        lambda rows: sae.encode(rows * scale),
        lambda: sae.W_dec.detach(),
    )


def saelens_tuned(problem: Problem, sample: Rows, steps: int, seed: int) -> Contender:
    like = SaeConfig.model_validate({"steps": steps})
    decay = round(like.decay_share * steps)
    settings = {
        "lr": like.learning_rate,
        "lr_warm_up_steps": min(like.warmup_steps, steps - decay - 1),
        "lr_decay_steps": decay,
        "lr_end": like.learning_rate,  # it decays to 0 all the same, but refuses to be told so
    }
    return saelens(problem, sample, steps, seed, b_dec=sample.mean(dim=0), **settings)


def dictionary_learning(module: ModuleType, problem: Problem, sample: Rows, steps: int, seed: int) -> Contender:
    trainer = module.TopKTrainer(
        steps=max(steps, 2000),  # it refuses fewer than the 1000 of its warm-up
        activation_dim=problem.d_in,
        dict_size=problem.d_sae,
        k=problem.k,
        layer=0,
        lm_name="",
        seed=seed,
        device=problem.device,
    )
    norm = sample.square().sum(dim=1).mean().sqrt()
    numbers = itertools.count()

    def step(x: Rows) -> None:  # as in training.trainSAE
        with torch.autocast("cuda", torch.bfloat16, enabled=problem.on_cuda):
            trainer.update(next(numbers), x / norm)

    return Contender(step)


def sparsify(module: ModuleType, problem: Problem, sample: Rows, steps: int, seed: int) -> Contender:
    torch.manual_seed(seed)
    settings = module.TrainConfig(module.SparseCoderConfig(num_latents=problem.d_sae, k=problem.k), auxk_alpha=1 / 32)
    sae = module.SparseCoder(problem.d_in, settings.sae, problem.device, dtype=torch.float32)
    sae.b_dec.data = sample.mean(dim=0)
    descent = module.trainer.SignSGD(sae.parameters(), lr=5e-3 / (problem.d_sae / 2**14) ** 0.5)
    optimizer = module.trainer.ScheduleFreeWrapper(descent, momentum=0.95)
    optimizer.train()
    silent = torch.zeros(problem.d_sae, dtype=torch.long, device=problem.device)

    def step(x: Rows) -> None:  # as in Trainer.fit
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=silent > settings.dead_feature_threshold)
        (out.fvu + settings.auxk_alpha * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent.add_(len(x))[out.latent_indices.flatten()] = 0

    return Contender(step)


def installed_peers(device: str) -> dict[str, Builder | None]:
    """The trainers that ours is compared with, None for one that is not installed."""
    if device == "cpu":
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    optional = {
        "dictionary_learning": (dictionary_learning, "dictionary_learning.trainers.top_k"),
        "sparsify": (sparsify, "sparsify"),
    }
    found = {name: (build, harness.peer(module)) for name, (build, module) in optional.items()}
    return {"SAELens": saelens, **{name: module and partial(build, module) for name, (build, module) in found.items()}}

"""SAE training on a GPU: its sums, and that nothing in a step waits for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sfc.core.config import SaeConfig
from sfc.saes.checkpoint import Parameters
from sfc.saes.start import start
from sfc.saes.sums import VARIABLE
from sfc.saes.train import dead_features, sae_loss, train_step


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Raise where the host waits for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("k", [16, "5%"])
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_nothing_in_a_step_waits(k: int | str, way: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, way)
    config = SaeConfig.model_validate({"k": k, "expansion": 8, "dead_after": 1, "start": "random"})
    rows = torch.randn(512, 64)
    training = start("blocks.0.hook_resid_post", rows, config, 0, device)
    rows, active = rows.to(device), config.active_features(512)
    with torch.no_grad():
        training.parameters.encoder[256:] *= 1e-3  # too faint to be among the largest
    train_step(training, rows, config, active, 1e-3, dead_features(training, config))  # what is made at first
    dead = dead_features(training, config)
    assert len(dead) > 0, "the auxiliary loss has a part in it"
    with without_waiting(device):
        for _ in range(3):
            train_step(training, rows, config, active, 1e-3, dead)


@pytest.mark.parametrize("prefixes", [(), (40, 130)], ids=["plain", "Matryoshka"])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_gradients_are_those_of_the_cpu(
    share: float, way: str, prefixes: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, way)
    d_in, d_sae = 48, 400
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(64, d_in, generator=drawn)
    shapes = ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))
    weights = [torch.randn(shape, generator=drawn) for shape in shapes]
    found = []
    for where in ("cpu", device):
        parameters = Parameters(*(each.to(where).requires_grad_() for each in weights))
        dead = torch.tensor([3, 5], device=where)
        loss = sae_loss(parameters, x.to(where), round(share * d_sae), dead, 0.7, prefixes=prefixes).total
        found.append([each.cpu() for each in (loss.detach(), *torch.autograd.grad(loss, parameters))])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_half_precision_products_keep_float32_weights(device: str) -> None:
    config = SaeConfig.model_validate({"k": 8, "expansion": 2, "start": "random"})
    rows = torch.randn(256, 32)
    training = start("blocks.0.hook_resid_post", rows, config, 0, device)
    losses = [
        train_step(training, rows.to(device), config, 8, 3e-3, dead_features(training, config))[0].fvu
        for _ in range(60)
    ]
    assert all(parameter.dtype == torch.float32 for parameter in training.parameters)
    assert losses[-1] < 0.7 * losses[0]

"""Where the training of an SAE starts: its scale, its decoder bias, and the directions of its features.

Directions that start at the centroids of the data are found again from other seeds and other data, and make smaller
circuits; random ones are the start of Gao et al. 2024.
"""

import hashlib
import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sfc.core.config import SaeConfig
from sfc.core.errors import UserError
from sfc.saes.checkpoint import Parameters, Training
from sfc.saes.kernels import sparse_encode, weighted_row_sums

ADAM_EPSILON = 6.25e-10  # Gao et al. 2024: rare features have tiny gradients
MEDIAN_ITERATIONS = 20
KMEANS_ROUNDS = 8
KMEANS_BLOCK = 4096
ENCODED_ROWS = 4096


def start(
    site: str, sample: Float[Tensor, "rows d_in"], config: SaeConfig, seed: int, device: torch.device | str
) -> Training:
    """An untrained SAE: unit decoder rows, a multiple of them as encoder, b_dec at the centre of the sample.

    Raises:
        UserError: the sample's rows are all zero, or not finite.
    """
    sample = sample.to(device, torch.float32)
    mean_norm = sample.norm(dim=-1).mean().item()
    if not math.isfinite(mean_norm) or mean_norm == 0:
        raise UserError(
            f"{site}: the activations are {'all zero' if mean_norm == 0 else 'not finite'}; collect them again"
        )
    d_in = sample.shape[-1]
    d_sae = config.expansion * d_in
    scale = math.sqrt(d_in) / mean_norm
    b_dec = _CENTRES[config.decoder_bias](sample * scale)
    centred, random = sample * scale - b_dec, _generator(seed, site)
    if config.start == "kmeans":
        rows = spherical_kmeans(centred, d_sae, random)
    else:
        rows = normalize(torch.randn(d_sae, d_in, generator=random)).to(device)
    strength = _best_strength(centred[:ENCODED_ROWS], rows, config.active_features(d_sae))
    parameters = Parameters(encoder=strength * rows, b_enc=torch.zeros(d_sae, device=device), W_dec=rows, b_dec=b_dec)
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(list(parameters), lr=config.learning_rate, eps=ADAM_EPSILON, fused=True)
    anchors = rows.clone() if config.anchor_weight > 0 else None
    silent = torch.zeros(d_sae, dtype=torch.long, device=device)
    return Training(site, scale, parameters, optimizer, silent, anchors)


@torch.no_grad()
def spherical_kmeans(
    rows: Float[Tensor, "rows d"], count: int, random: torch.Generator, rounds: int = KMEANS_ROUNDS
) -> Float[Tensor, "count d"]:
    """Unit centroids of the rows' directions (Dhillon and Modha 2001).

    They begin as rows drawn by `random`, which is of the CPU wherever the rows are. In each round a centroid moves to
    the mean direction of the rows that are nearest to it by cosine; one without rows moves to a row that is far from
    its own. Where there are fewer rows than centroids, the others are random directions.
    """
    directions = normalize(rows)
    chosen = torch.randperm(len(rows), generator=random)[:count].to(rows.device)
    further = torch.randn(count - len(chosen), rows.shape[1], generator=random).to(rows.device)
    if len(further):
        return torch.cat([directions[chosen], normalize(further)])
    centroids = directions[chosen]
    for _ in range(rounds):
        best = [(block @ centroids.T).max(dim=1) for block in directions.split(KMEANS_BLOCK)]
        cosine, nearest = (torch.cat(parts) for parts in zip(*best, strict=True))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, directions)
        empty = nearest.bincount(minlength=count) == 0
        sums[empty] = directions[cosine.topk(int(empty.sum()), largest=False).indices]
        centroids = normalize(sums)
    return centroids


@torch.no_grad()
def _best_strength(x: Float[Tensor, "rows d_in"], directions: Float[Tensor, "d_sae d_in"], k: int) -> float:
    """The multiple of the directions, as the encoder of x, with which they reconstruct it best.

    The k directions that answer most to an input overlap, so that at full strength they overshoot it: centroids fifty
    times over, and features would die on the way back.
    """
    active = sparse_encode(x, directions, torch.zeros_like(directions[:, 0]), k)
    x_hat = weighted_row_sums(*active, directions)
    return float((x * x_hat).sum() / x_hat.square().sum().clamp_min(torch.finfo(x.dtype).tiny))


@torch.no_grad()
def geometric_median(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, " d_in"]:
    """The point with the least mean distance to the rows (Weiszfeld 1937): a mean that outliers do not pull."""
    median = rows.mean(dim=0)
    for _ in range(MEDIAN_ITERATIONS):
        distances = (rows - median).norm(dim=-1)
        weights = 1 / distances.clamp_min(1e-6 * float(distances.mean()) + 1e-30)
        median = (weights @ rows) / weights.sum()
    return median


_CENTRES = {"median": geometric_median, "mean": partial(torch.mean, dim=0)}


def _generator(seed: int, site: str) -> torch.Generator:
    """Random numbers of a site's own, whatever other sites are trained with it, on the CPU for every device."""
    digest = hashlib.sha256(f"{seed} {site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))

"""How well a dictionary reconstructs activations it was not trained on, and whether another one has its features.

Figures are overall and by the tokens' roles, in one pass over blocks of rows, so that memory does not grow with their
number: means and variances are merged as in Chan, Golub and LeVeque 1983, which stays exact where the mean is large
beside the spread.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from sfc.data.render import Role
from sfc.saes.dictionary import Dictionary, reconstruction

ALL = "all"
DECIDING = len(Role)
"""in place of the role of a token after which the model begins a reply: such tokens are measured by themselves"""
_NAMES = {role.value: role.name.lower() for role in Role} | {DECIDING: "deciding"}
DENSE_RATE = 0.1
"""a feature that is active on more than this share of the rows is dense: it says little about any one of them"""
ROWS_AT_ONCE = 4096
SAME = 0.7
"""cosine from which on two features count as the same, as in Paulo and Belrose 2025 (Sparse Autoencoders Trained on the
Same Data Learn Different Features)"""
_ENTRIES = 1 << 24
"""cosines that are in memory at once"""


class Quality(NamedTuple):
    """Reconstruction figures over a set of rows. What the rows do not define is NaN."""

    rows: int
    fvu: float
    """fraction of variance unexplained: squared error over squared distance from the mean of these very rows; 0 is
    perfect, 1 no better than that mean. That of all rows is no average of the roles': it counts the variance between
    them as well"""
    cosine: float
    """mean cosine between a row and its reconstruction, both as they are (nothing subtracted)"""
    l0: float
    """mean number of active features per row"""
    dead_share: float
    """share of the features that are active in none of these rows; it falls as more rows are looked at"""
    dense_share: float
    """share of the features that are active in more than `DENSE_RATE` of these rows"""


class Measurement(NamedTuple):
    """The figures of a set of rows, and each feature's firing rate: the share of the rows in which it is active."""

    quality: Quality
    firing_rate: Float64[Tensor, " d_sae"]


@torch.no_grad()
def quality_by_role(
    dictionary: Dictionary,
    blocks: Iterable[
        tuple[Float[Tensor, "n d_in"], Int[np.ndarray, " n"]]
        | tuple[Float[Tensor, "n d_in"], Int[np.ndarray, " n"], Float[Tensor, "n d_read"] | None]
    ],
) -> dict[str, Measurement]:
    """Measure a dictionary in one pass over blocks of rows, in float32 with sums in float64.

    Args:
        blocks: rows in the model's units, on any device, each block with the `Role` of each row's token, or `DECIDING`,
            and for a transcoder the rows that it reads.

    Returns:
        `ALL` first, then each role that occurs, by its name in lower case.
    """
    by_role: dict[int, _Sums] = {}
    for rows, roles, *others in blocks:
        read = next((each for each in others if each is not None), rows)
        for role in np.unique(roles).tolist():
            of_role = torch.from_numpy(roles == role)
            sums = _sums_of(dictionary, rows[of_role], read[of_role])
            by_role[role] = by_role[role] + sums if role in by_role else sums
    total = sum(by_role.values(), start=_no_rows(dictionary))
    named = {_NAMES[role]: by_role[role] for role in sorted(by_role)}
    return {name: sums.measured() for name, sums in ({ALL: total} | named).items()}


@torch.no_grad()
def reconstruction_quality(dictionary: Dictionary, rows: Float[Tensor, "n d_in"]) -> Quality:
    """The figures of rows that are in memory, whatever their roles."""
    return _sums_of(dictionary, rows, rows).measured().quality


@dataclass(frozen=True)
class _Sums:
    """What has to be known of a set of rows to know the figures of it and of its union with another one."""

    rows: int
    mean: Float64[Tensor, " d_in"]
    spread: Float64[Tensor, ""]
    """sum of squared distances from the mean"""
    squared_error: Float64[Tensor, ""]
    cosines: Float64[Tensor, ""]
    firings: Int64[Tensor, " d_sae"]

    def __add__(self, other: "_Sums") -> "_Sums":
        rows = self.rows + other.rows
        share = other.rows / max(rows, 1)
        between = other.mean - self.mean
        return _Sums(
            rows=rows,
            mean=self.mean + share * between,
            spread=self.spread + other.spread + self.rows * share * between.square().sum(),
            squared_error=self.squared_error + other.squared_error,
            cosines=self.cosines + other.cosines,
            firings=self.firings + other.firings,
        )

    def measured(self) -> Measurement:
        # Without rows 0 / 0, which is NaN, throughout.
        firing_rate = self.firings.double() / self.rows
        dead, dense = (firing_rate == 0).double().mean(), (firing_rate > DENSE_RATE).double().mean()
        quality = Quality(
            rows=self.rows,
            fvu=float(self.squared_error / self.spread) if self.spread > 0 else float("nan"),
            cosine=float(self.cosines / self.rows),
            l0=float(firing_rate.sum()),
            dead_share=float(dead) if self.rows else float("nan"),
            dense_share=float(dense) if self.rows else float("nan"),
        )
        return Measurement(quality, firing_rate)


def _no_rows(dictionary: Dictionary) -> _Sums:
    mean = torch.zeros(dictionary.d_in, dtype=torch.float64, device=dictionary.W_dec.device)
    nothing = mean.new_zeros(())
    firings = torch.zeros(dictionary.d_sae, dtype=torch.long, device=mean.device)
    return _Sums(0, mean, nothing, nothing, nothing, firings)


def _sums_of(dictionary: Dictionary, rows: Float[Tensor, "n d_in"], read: Float[Tensor, "n d_read"]) -> _Sums:
    blocks = zip(rows.split(ROWS_AT_ONCE), read.split(ROWS_AT_ONCE), strict=True)
    return sum((_sums_of_part(dictionary, *block) for block in blocks if len(block[0])), start=_no_rows(dictionary))


def _sums_of_part(dictionary: Dictionary, rows: Float[Tensor, "n d_in"], read: Float[Tensor, "n d_read"]) -> _Sums:
    x, read = (each.to(dictionary.W_dec.device, torch.float32) for each in (rows, read))
    values, indices = features = dictionary.encode_sparse(read)
    x_hat = reconstruction(dictionary, features, read, x)
    # Exact in float64 where rows are all the same float32 values: they have no spread at all.
    mean = x.sum(dim=0, dtype=torch.float64) / len(x)
    return _Sums(
        rows=len(x),
        mean=mean,
        spread=(x - mean).square().sum(),
        squared_error=(x - x_hat).double().square().sum(),
        cosines=torch.cosine_similarity(x, x_hat, dim=1).double().sum(),
        firings=torch.bincount(indices[values > 0], minlength=dictionary.d_sae),
    )


class Matching(NamedTuple):
    """What the features of one dictionary have in another of the same site."""

    partner: Int[np.ndarray, " features"]
    """the feature of the other that is nearest and to which this one is nearest too; -1 where there is none"""
    cosine: Float[np.ndarray, " features"]
    """of the decoder direction with the nearest of the other, partner or not"""

    @property
    def same(self) -> Int[np.ndarray, " features"]:
        """The partner where it is near enough to be the same feature, else -1."""
        return np.where(self.cosine >= SAME, self.partner, -1)


@torch.no_grad()
def match_features(
    first: Float[Tensor, "features d_in"], second: Float[Tensor, "others d_in"]
) -> tuple[Matching, Matching]:
    """Match the rows of two decoders: what those of the first have in the second, and the other way round.

    Of features equally near, the first is the nearest. The cosines are computed in blocks of bounded size.
    """
    a, b = (torch.nn.functional.normalize(decoder.float(), dim=1) for decoder in (first, second))
    near_a, near_b = [], torch.zeros(len(b), dtype=torch.long, device=b.device)
    cosine_a, cosine_b = [], torch.full((len(b),), -torch.inf, device=b.device)
    rows = max(_ENTRIES // len(b), 1)
    for start in range(0, len(a), rows):
        cosines = a[start : start + rows] @ b.T
        of_rows, of_columns = cosines.max(1), cosines.max(0)
        near_a.append(of_rows.indices)
        cosine_a.append(of_rows.values)
        nearer = of_columns.values > cosine_b
        near_b = torch.where(nearer, start + of_columns.indices, near_b)
        cosine_b = torch.where(nearer, of_columns.values, cosine_b)
    nearest = torch.cat(near_a).cpu().numpy(), near_b.cpu().numpy()
    return (
        Matching(_mutual(nearest[0], nearest[1]), torch.cat(cosine_a).cpu().numpy()),
        Matching(_mutual(nearest[1], nearest[0]), cosine_b.cpu().numpy()),
    )


def _mutual(nearest: Int[np.ndarray, " features"], of_others: Int[np.ndarray, " others"]) -> np.ndarray:
    return np.where(of_others[nearest] == np.arange(len(nearest)), nearest, -1)

"""Which features of two dictionaries of one site are the same?

SAEs trained from other seeds number their features otherwise, and learn partly other ones. Features are the same where
each is the nearest to the other by the cosine of their decoder directions, and near enough.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

SAME = 0.7
"""cosine from which on two features count as the same, as in Paulo and Belrose 2025 (Sparse Autoencoders Trained on the
Same Data Learn Different Features)"""
_ENTRIES = 1 << 24
"""cosines that are in memory at once"""


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

"""Features whose decoder directions are alike."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Neighbour(NamedTuple):
    """Another feature of the same dictionary, and the cosine of the two decoder directions."""

    feature: int
    cosine: float


@torch.no_grad()
def nearest_neighbours(
    decoder: Float[Tensor, "d_sae d_in"], features: Sequence[int], count: int = 5
) -> list[list[Neighbour]]:
    """For each of these features the `count` others of largest cosine, nearest first."""
    directions = torch.nn.functional.normalize(decoder.float(), dim=1)
    cosines = directions[list(features)] @ directions.T
    cosines[torch.arange(len(features)), torch.tensor(features, dtype=torch.long)] = -torch.inf
    nearest = cosines.topk(min(count, len(decoder) - 1), dim=1)
    return [
        [Neighbour(*pair) for pair in zip(indices, values, strict=True)]
        for indices, values in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    ]

"""Attribution patching: every patch's effect to first order, from one backward pass (Nanda 2023; Kramár et al. 2024).

With g = ds/dx at the base run, replacing x by the source's x' moves the score by about `sum g . (x' - x)` over the
replaced positions. That costs one run forwards and one backwards for all patches together, and is right as far as the
score is linear between the two runs; `sfc patch` shows it beside the exact effect.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sfc.models.interventions import leaf_recorder
from sfc.models.loading import Model
from sfc.models.score import RefusalScore, score_batch
from sfc.patching.activation_patching import Transplant, part_of
from sfc.patching.components import Patch


def first_order_changes(
    model: Model, score: RefusalScore, transplant: Transplant, patches: Sequence[Patch]
) -> Float[np.ndarray, "patches pairs"]:
    """By how much each patch changes the score of each base run to first order, in nats; NaN for ranges of layers.

    A range has no such sum: its later layers would replace what its earlier ones changed.
    """
    seen: dict[str, Tensor] = {}
    sites = dict.fromkeys(patch.sites[0] for patch in patches if not patch.is_range)
    with torch.enable_grad():
        interventions = {site: leaf_recorder(seen, site) for site in sites}
        score_batch(model, score, transplant.base, interventions).sum().backward()
    products = {site: _product(transplant, site, x) for site, x in seen.items()}
    changes = np.full((len(patches), len(transplant.base_score)), np.nan)
    for row, patch in enumerate(patches):
        if not patch.is_range:
            product = products[patch.sites[0]]
            changes[row] = product[:, part_of(model, patch, product.shape[1])].sum(1).cpu().numpy()
    return changes


@torch.no_grad()
def _product(transplant: Transplant, site: str, x: Tensor) -> Float[Tensor, "pair width"]:
    """g . (x' - x) per dimension, summed over the replaced positions."""
    assert x.grad is not None
    difference = (transplant.values[site] - x).float() * transplant.replaced[..., None]
    return (x.grad.float() * difference).sum(1)

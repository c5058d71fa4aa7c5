"""Heads and MLPs as nodes: a space of nodes with no features, only parts of an activation.

A head is its part of `hook_z`, what it reads from other tokens, before W_O; an MLP is all of `hook_mlp_out`. What is
left of an activation without its features is a node already, the error; here there are no features, and what is left,
all of it, is divided among the heads. So every formula for errors, and every law, holds for components.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfc.config import NodeChoice
from sfc.models.loading import Model
from sfc.saes.dictionary import LinearDecoder
from sfc.saes.kernels import Sparse
from sfc.sites import StoredKind, site_of

_KINDS: dict[NodeChoice, tuple[StoredKind, ...]] = {
    "heads": ("hook_z",),
    "mlps": ("mlp_out",),
    "heads-and-mlps": ("hook_z", "mlp_out"),
}


class Components(LinearDecoder):
    """A dictionary without features, whose `n_parts` nodes share the coordinates of the activation equally."""

    def __init__(self, site: str, d_in: int, n_parts: int, device: torch.device) -> None:
        nothing = {"W_dec": torch.zeros(0, d_in, device=device), "b_dec": torch.zeros(d_in, device=device)}
        super().__init__(nothing, site)
        self.n_parts = n_parts

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows 0"]:
        """No feature values."""
        return x[..., :0]

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """No entries."""
        return Sparse(x[:, :0], torch.zeros(len(x), 0, dtype=torch.long, device=x.device))

    def decode_sparse(
        self, values: Float[Tensor, "rows entries"], indices: Int[Tensor, "rows entries"]
    ) -> Float[Tensor, "rows d_in"]:
        """Zero."""
        return values.new_zeros(len(values), self.d_in)


def component_spaces(model: Model, nodes: NodeChoice, layers: Sequence[int]) -> dict[str, Components]:
    """The heads, MLPs or both of some layers by their sites, in the order in which the model passes them.

    Raises:
        UserError: the model has no such site.
    """
    sites = [site_of(kind, layer) for layer in layers for kind in _KINDS[nodes]]
    model.check_sites(sites)
    n_heads = model.bridge.cfg.n_heads
    parts = {site: n_heads if site.endswith("hook_z") else 1 for site in sites}
    return {site: Components(site, model.width(site), n, model.device) for site, n in parts.items()}

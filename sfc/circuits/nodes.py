"""Nodes: every feature of every dictionary, and one error node per site, numbered in the order of the sites.

Names are `resid_post.21/F1234` and `resid_post.21/error`. Where a site has no features its nodes are components:
`head.21.3` at `hook_z`, `mlp.21` at `hook_mlp_out`. A set of nodes is a vector over these numbers: booleans for
a circuit, numbers between 0 and 1 for a mask.

Heads and MLPs as nodes: a space of nodes with no features, only parts of an activation.

A head is its part of `hook_z`, what it reads from other tokens, before W_O; an MLP is all of `hook_mlp_out`. What is
left of an activation without its features is a node already, the error; here there are no features, and what is left,
all of it, is divided among the heads. So every formula for errors, and every law, holds for components.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfc.circuits.options import NodeChoice
from sfc.core.errors import UserError
from sfc.core.sites import StoredKind, kind_of, layer_of, short_site, site_of
from sfc.models.loading import Model
from sfc.saes.dictionary import Dictionary, LinearDecoder
from sfc.saes.kernels import Sparse


@dataclass(frozen=True)
class Nodes:
    """The nodes of some dictionaries: at each site its features, then its error node."""

    sites: tuple[str, ...]
    widths: tuple[int, ...]
    """features per site"""
    parts: tuple[int, ...]
    """nodes per site that are no features: the error, or components"""

    @classmethod
    def of(cls, widths: Mapping[str, int]) -> "Nodes":
        """The features and errors of dictionaries with these widths, in the order of the sites."""
        return cls(tuple(widths), tuple(widths.values()), (1,) * len(widths))

    @classmethod
    def of_spaces(cls, spaces: Mapping[str, Dictionary]) -> "Nodes":
        """The nodes of dictionaries or components."""
        widths, parts = zip(*((space.d_sae, space.n_parts) for space in spaces.values()), strict=True)
        return cls(tuple(spaces), widths, parts)

    @property
    def sizes(self) -> list[int]:
        """Nodes per site: its features and the error, or its components."""
        return [width + n for width, n in zip(self.widths, self.parts, strict=True)]

    @property
    def n_nodes(self) -> int:
        return sum(self.sizes)

    @property
    def site_numbers(self) -> Int[np.ndarray, " nodes"]:
        """For each node, the number of its site."""
        return np.repeat(np.arange(len(self.sites)), self.sizes)

    @property
    def is_error(self) -> Bool[np.ndarray, " nodes"]:
        """Which nodes are error nodes."""
        errors = np.zeros(self.n_nodes, dtype=bool)
        errors[(np.cumsum(self.sizes) - 1)[np.array(self.widths) > 0]] = True
        return errors

    def kind(self, node: int) -> Literal["feature", "error", "head", "mlp"]:
        """What the node is."""
        site = self.site_numbers[node]
        if self.widths[site]:
            return "error" if self.is_error[node] else "feature"
        return "head" if kind_of(self.sites[site]) == "hook_z" else "mlp"

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values over all nodes [..., nodes] as one tensor [..., size] per site."""
        return dict(zip(self.sites, values.split(self.sizes, dim=-1), strict=True))

    def name(self, node: int) -> str:
        """The node's name."""
        site = int(np.searchsorted(np.cumsum(self.sizes), node, side="right"))
        within = node - sum(self.sizes[:site])
        if not self.widths[site]:
            return self._component(site, within)
        kind = "error" if within == self.widths[site] else f"F{within}"
        return f"{short_site(self.sites[site])}/{kind}"

    def number(self, name: str) -> int:
        """The node with this name.

        Raises:
            UserError: there is no such node.
        """
        sizes = self.sizes
        with_features = {short_site(site): i for i, site in enumerate(self.sites) if self.widths[i]}
        components = {
            self._component(site, part): sum(sizes[:site]) + part
            for site, n_parts in enumerate(self.parts)
            for part in range(n_parts if not self.widths[site] else 0)
        }
        if name in components:
            return components[name]
        site_name, _, kind = name.partition("/")
        if site_name in with_features:
            site = with_features[site_name]
            within = self.widths[site] if kind == "error" else int(kind[1:]) if re.fullmatch(r"F\d+", kind) else -1
            if 0 <= within <= self.widths[site] and (kind == "error") == (within == self.widths[site]):
                return sum(sizes[:site]) + within
        if components:
            raise UserError(f"no node {name!r}: nodes are {self.name(0)} … {self.name(self.n_nodes - 1)}")
        raise UserError(
            f"no node {name!r}: nodes are SITE/F0 … SITE/F{max(self.widths) - 1} and SITE/error,"
            f" SITE of {list(with_features)}"
        )

    def _component(self, site: int, part: int) -> str:
        layer = layer_of(self.sites[site])
        return f"head.{layer}.{part}" if kind_of(self.sites[site]) == "hook_z" else f"mlp.{layer}"


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

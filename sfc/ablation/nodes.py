"""Nodes: every feature of every dictionary, and one error node per site, numbered in the order of the sites.

Names are `resid_post.21/F1234` and `resid_post.21/error`. A set of nodes is a vector over these numbers: booleans for
a circuit, numbers between 0 and 1 for a mask.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from sfc.errors import UserError
from sfc.sites import short_site


@dataclass(frozen=True)
class Nodes:
    """The nodes of some dictionaries: at each site its features, then its error node."""

    sites: tuple[str, ...]
    widths: tuple[int, ...]
    """features per site"""

    @classmethod
    def of(cls, widths: Mapping[str, int]) -> "Nodes":
        """The nodes of dictionaries with these widths, in the order of the sites."""
        return cls(tuple(widths), tuple(widths.values()))

    @property
    def sizes(self) -> list[int]:
        """Nodes per site: its features and the error."""
        return [width + 1 for width in self.widths]

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
        errors[np.cumsum(self.sizes) - 1] = True
        return errors

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values over all nodes [..., nodes] as one tensor [..., width + 1] per site."""
        return dict(zip(self.sites, values.split(self.sizes, dim=-1), strict=True))

    def name(self, node: int) -> str:
        """The node's name."""
        site = int(np.searchsorted(np.cumsum(self.sizes), node, side="right"))
        within = node - sum(self.sizes[:site])
        kind = "error" if within == self.widths[site] else f"F{within}"
        return f"{short_site(self.sites[site])}/{kind}"

    def number(self, name: str) -> int:
        """The node with this name.

        Raises:
            UserError: there is no such node.
        """
        site_name, _, kind = name.partition("/")
        names: Sequence[str] = [short_site(site) for site in self.sites]
        if site_name in names:
            site = names.index(site_name)
            within = self.widths[site] if kind == "error" else int(kind[1:]) if re.fullmatch(r"F\d+", kind) else -1
            if 0 <= within <= self.widths[site] and (kind == "error") == (within == self.widths[site]):
                return sum(self.sizes[:site]) + within
        raise UserError(
            f"no node {name!r}: nodes are SITE/F0 … SITE/F{max(self.widths) - 1} and SITE/error, SITE of {names}"
        )

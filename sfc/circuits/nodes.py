"""Nodes, what circuits are made of, and the kinds of them that can be asked for (`discovery.nodes`).

The nodes of a site are the features of a space of nodes (see `sfc.circuits.spaces`), and behind them what is left of
the activation without its features: the error, or components such as heads. They are numbered in the order of the
sites, and named `resid_post.21/F1234`, `resid_post.21/error`, `head.21.3`, `mlp.21`. A set of nodes is a vector over
these numbers: booleans for a circuit, numbers between 0 and 1 for a mask.

A kind of nodes is registered in `NODES`. Nothing here imports torch, so that names and flags are there without it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from sfc.core.errors import UserError, is_count
from sfc.core.registry import Registry, imported_when_called
from sfc.core.sites import short_site

if TYPE_CHECKING:
    from torch import Tensor

    from sfc.circuits.spaces import NodeSpace
    from sfc.models.loading import Model
    from sfc.saes.dictionary import Dictionary
    from sfc.saes.store import Store

FEATURE, ERROR = "feature", "error"


@dataclass(frozen=True)
class Nodes:
    """The nodes of some sites: at each its features, then its other parts."""

    sites: tuple[str, ...]
    """in the order in which the model passes them"""
    widths: tuple[int, ...]
    """features per site"""
    parts: tuple[Sequence[str], ...]
    """per site, the names of the nodes that are not features: the error, or components"""
    kinds: tuple[Sequence[str], ...]
    """per site, what each of these parts is: `error`, `skip`, `head`, `mlp`, …"""

    @classmethod
    def of(cls, widths: Mapping[str, int]) -> "Nodes":
        """The features and errors of dictionaries with these widths, in the order of the sites."""
        parts = tuple((error_name(site),) for site in widths)
        return cls(tuple(widths), tuple(widths.values()), parts, ((ERROR,),) * len(widths))

    @classmethod
    def of_spaces(cls, spaces: "Mapping[str, NodeSpace]") -> "Nodes":
        """The nodes of some spaces by their sites."""
        of_sites = ((space.d_sae, space.parts, space.part_kinds) for space in spaces.values())
        widths, parts, kinds = zip(*of_sites, strict=True)
        return cls(tuple(spaces), widths, parts, kinds)

    @cached_property
    def sizes(self) -> list[int]:
        """Nodes per site: its features and its other parts."""
        return [width + len(parts) for width, parts in zip(self.widths, self.parts, strict=True)]

    @cached_property
    def first_numbers(self) -> Int[np.ndarray, " sites"]:
        """The number of each site's first node."""
        return np.cumsum([0, *self.sizes[:-1]])

    @property
    def n_nodes(self) -> int:
        return sum(self.sizes)

    @cached_property
    def site_numbers(self) -> Int[np.ndarray, " nodes"]:
        """For each node, the number of its site."""
        return np.repeat(np.arange(len(self.sites)), self.sizes)

    @cached_property
    def is_error(self) -> Bool[np.ndarray, " nodes"]:
        """Which nodes are error nodes."""
        of_sites = zip(self.widths, self.kinds, strict=True)
        return np.concatenate([[False] * width + [kind == ERROR for kind in kinds] for width, kinds in of_sites])

    @cached_property
    def is_feature(self) -> Bool[np.ndarray, " nodes"]:
        """Which nodes are features."""
        of_sites = zip(self.widths, self.parts, strict=True)
        return np.concatenate([np.repeat([True, False], [width, len(parts)]) for width, parts in of_sites])

    def of_features(
        self, per_site: Iterable[Float[np.ndarray, " features"]], elsewhere: float
    ) -> Float[np.ndarray, " nodes"]:
        """Values of each site's features as values over all nodes; nodes that are not features have `elsewhere`."""
        of_sites = zip(per_site, self.parts, strict=True)
        return np.concatenate([np.append(values, np.full(len(parts), elsewhere)) for values, parts in of_sites])

    def kind(self, node: int) -> str:
        """What the node is: `feature`, `error`, `head`, …"""
        site, within = self._place(node)
        width = self.widths[site]
        return FEATURE if within < width else self.kinds[site][within - width]

    def name(self, node: int) -> str:
        """The node's name."""
        site, within = self._place(node)
        width = self.widths[site]
        return f"{short_site(self.sites[site])}/F{within}" if within < width else self.parts[site][within - width]

    def number(self, name: str) -> int:
        """The node with this name.

        Raises:
            UserError: there is no such node.
        """
        site_name, _, feature = name.partition("/F")
        site = self._site_of_name.get(site_name)
        if site is not None and is_count(feature) and int(feature) < self.widths[site]:
            return int(self.first_numbers[site]) + int(feature)
        if name not in self._number_of_part:
            raise UserError(f"no node {name!r}: nodes are {self._all_names()}")
        return self._number_of_part[name]

    def split(self, values: "Tensor") -> "dict[str, Tensor]":
        """Values over all nodes [..., nodes] as one tensor [..., size] per site."""
        return dict(zip(self.sites, values.split(self.sizes, dim=-1), strict=True))

    def by_site(self, nodes: Int[np.ndarray, " chosen"]) -> dict[str, Int[np.ndarray, " of_site"]]:
        """Nodes by their site, numbered within it, in the order given; sites that have none of them are left out."""
        site_of = self.site_numbers[nodes]
        return {self.sites[site]: nodes[site_of == site] - self.first_numbers[site] for site in np.unique(site_of)}

    def _place(self, node: int) -> tuple[int, int]:
        """The node's site, and its number within it."""
        site = int(self.site_numbers[node])
        return site, int(node - self.first_numbers[site])

    @cached_property
    def _site_of_name(self) -> dict[str, int]:
        return {short_site(site): number for number, site in enumerate(self.sites)}

    @cached_property
    def _number_of_part(self) -> dict[str, int]:
        first_parts = self.first_numbers + np.array(self.widths)
        return {
            name: int(first) + part
            for first, names in zip(first_parts, self.parts, strict=True)
            for part, name in enumerate(names)
        }

    def _all_names(self) -> str:
        """What nodes are called, in words."""
        with_features = [short_site(site) for site, width in zip(self.sites, self.widths, strict=True) if width]
        if not with_features:
            return f"{self.name(0)} … {self.name(self.n_nodes - 1)}"
        parts = sorted(
            {f"SITE/{kind}" for kinds, width in zip(self.kinds, self.widths, strict=True) if width for kind in kinds}
        )
        return f"SITE/F0 … SITE/F{max(self.widths) - 1} and {', '.join(parts)}, SITE of {with_features}"


def role_part(source: str, target: str) -> str:
    """What the part of an edge's weight is called that passes from tokens of one role to tokens of another."""
    return f"weight_{source}_to_{target}"


def error_name(site: str) -> str:
    """The name of the error node of a dictionary."""
    return f"{short_site(site)}/{ERROR}"


@dataclass(frozen=True)
class Sources:
    """What spaces of nodes can be made from."""

    model: "Model"
    sites: Sequence[str]
    """those of `activations`, in the order in which the model passes them"""
    layers: Sequence[int]
    dictionaries: "Mapping[str, Dictionary]"
    """the SAEs by their sites; none unless the kind needs them"""
    store: "Store"
    """the activations of the prompts at `sites`"""


@dataclass(frozen=True)
class NodeKind:
    """A kind of nodes that circuits can be made of."""

    name: str
    spaces: "Callable[[Sources], Mapping[str, NodeSpace]]"
    """makes the spaces by the sites that they write to"""
    needs_saes: bool = False
    has_features: bool = True
    """whether nodes have values on stored activations, which can be correlated"""
    has_edges: bool = True
    """whether edges can be drawn between them: of each site, the parts that are not features are whole activations"""


NODES: Registry[NodeKind] = Registry("kind of nodes")

NODES.register(NodeKind("features", imported_when_called("sfc.circuits.spaces:features"), needs_saes=True))
for _name in ("heads", "mlps", "heads-and-mlps"):
    _spaces = imported_when_called(f"sfc.circuits.spaces:{_name.replace('-', '_')}")
    NODES.register(NodeKind(_name, _spaces, has_features=False, has_edges=False))

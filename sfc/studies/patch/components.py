"""What can be patched: the components of a model, one by one or in ranges of layers."""

from collections.abc import Sequence
from typing import NamedTuple

from sfc.core.sites import StoredKind, site_of
from sfc.studies.patch.options import ComponentKind

_WHERE: dict[ComponentKind, StoredKind] = {
    "resid": "resid_post",
    "attn": "attn_out",
    "mlp": "mlp_out",
    "head": "hook_z",
}


class Patch(NamedTuple):
    """What one run replaces: a component of one layer, or of a range of layers at once."""

    kind: ComponentKind
    first_layer: int
    layer: int
    """the last of its layers, which is the first where the patch is a single component"""
    head: int | None = None

    @property
    def name(self) -> str:
        """`head.21.3`, `mlp.21`, and for a range `mlp.0-21`."""
        layers = f"{self.first_layer}-{self.layer}" if self.is_range else str(self.layer)
        return f"{self.kind}.{layers}" + ("" if self.head is None else f".{self.head}")

    @property
    def is_range(self) -> bool:
        return self.first_layer != self.layer

    @property
    def sites(self) -> list[str]:
        """The hook points where it acts, in the order in which the model passes them."""
        return [site_of(_WHERE[self.kind], layer) for layer in range(self.first_layer, self.layer + 1)]


def single_patches(kinds: Sequence[ComponentKind], layers: Sequence[int], n_heads: int) -> list[Patch]:
    """Every component of these kinds and layers by itself; `head` is every head of a layer."""
    return [
        Patch(kind, layer, layer, head)
        for kind in kinds
        for layer in layers
        for head in (range(n_heads) if kind == "head" else (None,))
    ]


def cumulative_patches(kinds: Sequence[ComponentKind], layers: Sequence[int]) -> list[Patch]:
    """For each layer but the first, everything of a kind from the first layer to it at once.

    Heads have no ranges of their own: all heads of a layer together make its attention output.
    """
    return [
        Patch(kind, min(layers), layer)
        for kind in kinds
        if kind != "head"
        for layer in sorted(layers)
        if layer > min(layers)
    ]

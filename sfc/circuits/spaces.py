"""Spaces of nodes: what takes an activation apart into nodes, and puts nodes together to an activation.

An SAE is one, and so is a transcoder, which reads what an MLP reads and writes what it writes: its error is what it
misses of the MLP, and a skip connection is a node of its own. Heads and MLPs are another kind, with no features, only
parts of an activation. A head is its part of `hook_z`, what it reads from other tokens, before W_O; an MLP is all of
`hook_mlp_out`. What is left of an activation without its features is a node already, the error; here there are no
features, and what is left, all of it, is divided among the heads. So every formula for errors, and every law, holds for
components.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from sfc.circuits.nodes import Sources
from sfc.core.errors import UserError
from sfc.core.sites import MLP_INPUTS, in_order, kind_of, layer_of, site_of
from sfc.models.loading import Model
from sfc.saes.dictionary import Dictionary, LinearDecoder
from sfc.saes.kernels import Sparse

NodeSpace = Dictionary
"""Features with values and directions, and what is left of an activation without them, divided into parts.

Whatever has the members of `Dictionary` can be one, trained or not; features come easiest from `LinearDecoder`.
"""


class Components(LinearDecoder):
    """A space without features, whose parts share the coordinates of the activation equally."""

    def __init__(self, site: str, parts: Sequence[str], part_kind: str, model: Model) -> None:
        """All of the activation at `site`, divided among nodes with the names `parts`."""
        d_in = model.width(site)
        nothing = {"W_dec": torch.zeros(0, d_in, device=model.device), "b_dec": torch.zeros(d_in, device=model.device)}
        super().__init__(nothing, site)
        self._parts, self._part_kind = tuple(parts), part_kind

    @property
    def parts(self) -> tuple[str, ...]:
        """The components' names."""
        return self._parts

    @property
    def part_kinds(self) -> tuple[str, ...]:
        """What the components are."""
        return (self._part_kind,) * len(self._parts)

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


def features(sources: Sources) -> Mapping[str, Dictionary]:
    """The SAEs."""
    return sources.dictionaries


def heads(sources: Sources) -> dict[str, Components]:
    """The attention heads of each layer."""
    n_heads = sources.model.bridge.cfg.n_heads
    return {
        (site := site_of("hook_z", layer)): Components(
            site, [f"head.{layer}.{head}" for head in range(n_heads)], "head", sources.model
        )
        for layer in sources.layers
    }


def mlps(sources: Sources) -> dict[str, Components]:
    """The MLP of each layer."""
    return {
        (site := site_of("mlp_out", layer)): Components(site, [f"mlp.{layer}"], "mlp", sources.model)
        for layer in sources.layers
    }


def heads_and_mlps(sources: Sources) -> dict[str, Components]:
    """Both."""
    return heads(sources) | mlps(sources)


def checked(spaces: Mapping[str, NodeSpace], model: Model) -> dict[str, NodeSpace]:
    """The spaces in the order in which the model passes their sites.

    Raises:
        UserError: the model has no such site, or a space reads elsewhere than where it writes or, writing what an MLP
            writes, what that MLP reads.
    """
    model.check_sites(sites_of(spaces))
    for site, space in spaces.items():
        reads_input = kind_of(site) == "mlp_out" and space.reads in [site_of(k, layer_of(site)) for k in MLP_INPUTS]
        if space.writes != site or not (space.reads == site or reads_input):
            raise UserError(
                f"the nodes at {site} read {space.reads} and write {space.writes}: circuits need nodes that read where"
                " they write, or the input of the MLP that writes there"
            )
    return {site: spaces[site] for site in in_order(list(spaces))}


def left_over(
    space: NodeSpace,
    read: Float[Tensor, "rows d_read"],
    written: Float[Tensor, "rows d_in"],
    values: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
) -> Float[Tensor, "rows d_parts"]:
    """What is written without the features, which have these values: the error, or what the components have."""
    of_parts = space.of_parts(read, written)
    return of_parts - F.pad(space.decode_sparse(values, indices), (0, space.d_parts - space.d_in))


def by_coordinate(of_parts: Float[Tensor, "rows parts"], space: NodeSpace) -> Float[Tensor, "rows coordinates"]:
    """A number per part of what features leave, given to each of its coordinates; that of one part broadcasts."""
    if space.n_parts == 1:
        return of_parts
    return repeat(of_parts, "rows parts -> rows (parts width)", width=space.d_parts // space.n_parts)


def together(of_parts: Float[Tensor, "*rows d_parts"], space: NodeSpace) -> Float[Tensor, "*rows d_in"]:
    """What the coordinates of the parts add up to in the activation."""
    return of_parts if space.d_parts == space.d_in else of_parts.unflatten(-1, (-1, space.d_in)).sum(-2)


def sites_of(spaces: Mapping[str, NodeSpace]) -> list[str]:
    """Every site that the spaces read or write, in the order in which the model passes them."""
    return in_order(site for space in spaces.values() for site in (space.reads, space.writes))

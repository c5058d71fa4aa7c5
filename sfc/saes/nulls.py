"""Null dictionaries: what a circuit's figures are where dictionaries know nothing of the model.

A method that finds as good a circuit in one of these has shown something about itself, and nothing about features. One
null has unit directions drawn at random, in place of learned ones, with the width, the number of active features and
the scale of a trained dictionary. The other is the trained dictionary itself, turned by a random rotation: whatever its
features have to do with each other stays, and only what they have to do with the model is gone. Both are centred where
the trained one is, and both are dictionaries like any other (`sfc.saes.dictionary.Dictionary`).
"""

from collections.abc import Callable, Mapping
from hashlib import sha256

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfc.core.errors import UserError
from sfc.models.linear import linear
from sfc.saes.dictionary import Dictionary, LinearDecoder, TopKDictionary
from sfc.saes.kernels import Sparse


def random_dictionaries(trained: Mapping[str, Dictionary], seed: int) -> dict[str, Dictionary]:
    """A random dictionary for each trained one.

    Raises:
        UserError: a trained dictionary does not say how many features are active in a row.
    """
    return {site: random_dictionary(each, seed) for site, each in trained.items()}


def random_dictionary(trained: Dictionary, seed: int) -> TopKDictionary:
    """A top-k dictionary of as many random directions, centred at the trained one's decoder bias.

    Encoder and decoder share the directions; the decoder's rows have the trained ones' median length and the encoder's
    its inverse, so that a feature's value is the activation's component in the unit in which the trained features are.

    Raises:
        UserError: the trained dictionary does not say how many features are active in a row.
    """
    k = getattr(trained, "k", None) or getattr(getattr(trained, "inner", None), "k", None)
    if k is None:
        raise UserError(
            f"the dictionary at {trained.site} has no fixed number of active features: a random one cannot be matched"
        )
    directions = nn.functional.normalize(torch.randn(trained.d_sae, trained.d_in, generator=_random(trained, seed)))
    directions = directions.to(trained.W_dec)
    scale = trained.W_dec.norm(dim=1).median()
    weights = {
        "W_enc": (directions / scale).t(),
        "b_enc": trained.b_dec.new_zeros(trained.d_sae),
        "W_dec": directions * scale,
        "b_dec": trained.b_dec.detach().clone(),
    }
    return TopKDictionary(weights, k=k, site=trained.site)


def rotated_dictionaries(trained: Mapping[str, Dictionary], seed: int) -> dict[str, Dictionary]:
    """Each trained dictionary, turned by a random rotation of its own."""
    return {site: RotatedDictionary(each, random_rotation(each, seed)) for site, each in trained.items()}


def random_rotation(trained: Dictionary, seed: int) -> Float[Tensor, "d_in d_in"]:
    """A rotation, uniform among all of them (Mezzadri 2007), on the dictionary's device."""
    d_in = trained.d_in
    q, r = torch.linalg.qr(torch.randn(d_in, d_in, generator=_random(trained, seed), dtype=torch.float64))
    q = q * r.diagonal().sign()
    # A reflection is turned into a rotation by mirroring one axis.
    q[:, 0] *= torch.linalg.det(q).sign()
    return q.to(trained.b_dec)


class RotatedDictionary(LinearDecoder):
    """A dictionary that sees each activation turned about its decoder bias b: `encode(x) = f((x - b) R + b)`.

    What it decodes is turned back, `(x_hat - b) R^T + b`: it reconstructs x turned as well as the inner one would. What
    a transcoder reads is turned about 0, since b is of what it writes.
    """

    rotation: nn.Parameter  # [d_in, d_in]

    def __init__(self, inner: Dictionary, rotation: Float[Tensor, "d_in d_in"]) -> None:
        """`inner` is not changed.

        Raises:
            UserError: it reads activations of another width than it writes.
        """
        if inner.d_read != inner.d_in:
            raise UserError(f"the dictionary at {inner.site} reads another width than it writes: it cannot be turned")
        turned = linear(inner.W_dec.to(rotation.dtype), rotation).to(inner.W_dec.dtype)
        super().__init__({"W_dec": turned, "b_dec": inner.b_dec}, inner.site)
        self.inner, self._reads = inner, inner.reads
        self.rotation = nn.Parameter(rotation.detach(), requires_grad=False)

    @property
    def part_kinds(self) -> tuple[str, ...]:
        """What the nodes are that are not features."""
        return tuple(self.inner.part_kinds)

    @property
    def d_parts(self) -> int:
        """How many coordinates these nodes share."""
        return self.inner.d_parts

    def of_parts(
        self, read: Float[Tensor, "rows d_read"], written: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_parts"]:
        """See `Dictionary`: a skip connection is turned as well."""
        if self.d_parts == self.d_in:
            return written
        turned = self.inner.of_parts(self._turned(read), written @ self.rotation)
        return (turned.unflatten(1, (-1, self.d_in)) @ self.rotation.t()).flatten(1)

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Feature values, dense."""
        return self.inner.encode(self._turned(x))

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """Feature values, with the entries of the inner dictionary."""
        return self.inner.encode_sparse(self._turned(x))

    def _turned(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_in"]:
        centre = self.b_dec if self.reads == self.site else 0
        return (x - centre) @ self.rotation + centre


NULLS: dict[str, Callable[[Mapping[str, Dictionary], int], dict[str, Dictionary]]] = {
    "random": random_dictionaries,
    "rotated": rotated_dictionaries,
}
"""the nulls by name: they take trained dictionaries by site and a seed"""


def _random(trained: Dictionary, seed: int) -> torch.Generator:
    """The same numbers for the same seed and site, whatever else there is."""
    digest = sha256(f"null dictionary {seed} {trained.site}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

"""What a sparse autoencoder (SAE) is to the rest of the project: encode `x -> f`, decode `f -> x_hat`.

A dictionary always works in the model's own units: any scaling that training used is folded into its weights, so that
`x_hat = f @ W_dec + b_dec` is comparable with the activation x itself and the error is simply `x - x_hat`.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from sfc.saes.kernels import Sparse, sparse_encode, weighted_row_sums

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@runtime_checkable
class Dictionary(Protocol):
    """What ablation, attribution and the viewer need of an SAE, whatever its architecture.

    All of it is in the model's own units. `encode` and `encode_sparse` give the same features and are differentiable
    with respect to x where the set of active features does not change. The number of entries per row of
    `encode_sparse` is k for a top-k dictionary; elsewhere it is that of the fullest row, the others being padded with
    entries of value 0 (see `Sparse`). `decode_sparse` takes any number of entries per row.

    What is left, `x - x_hat`, is divided by coordinates among `n_parts` nodes: one, the error, where there are
    features.
    """

    @property
    def site(self) -> str: ...
    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]: ...
    @property
    def b_dec(self) -> Float[Tensor, " d_in"]: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def n_parts(self) -> int: ...
    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]: ...
    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse: ...
    def decode(self, f: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_in"]: ...
    def decode_sparse(
        self, values: Float[Tensor, "rows entries"], indices: Int[Tensor, "rows entries"]
    ) -> Float[Tensor, "rows d_in"]: ...


class LinearDecoder(nn.Module):
    """What dictionaries of every architecture share: `x_hat = f @ W_dec + b_dec`, with frozen weights."""

    W_dec: nn.Parameter  # [d_sae, d_in]
    b_dec: nn.Parameter  # [d_in]

    n_parts = 1

    def __init__(self, weights: Mapping[str, Tensor], site: str) -> None:
        """Register `weights`, W_dec and b_dec among them; they are not copied."""
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=False))
        self.site = site

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def decode(self, f: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_in"]:
        """The activation that dense feature values stand for."""
        return f @ self.W_dec + self.b_dec

    def decode_sparse(
        self, values: Float[Tensor, "rows entries"], indices: Int[Tensor, "rows entries"]
    ) -> Float[Tensor, "rows d_in"]:
        """The activation that sparse feature values stand for; any number of entries; differentiable in `values`."""
        return weighted_row_sums(values, indices, self.W_dec) + self.b_dec

    def extra_repr(self) -> str:
        return f"{self.site}, d_in={self.d_in}, d_sae={self.d_sae}"


class TopKDictionary(LinearDecoder):
    """A top-k SAE (Gao et al. 2024): the k largest pre-activations of a token are its features, negative ones are 0.

    `encode(x) = topk(relu((x - b_dec) @ W_enc + b_enc))`; without `apply_b_dec_to_input`, b_dec is not subtracted.
    The weights are frozen: gradients flow to x and to feature values, never into the dictionary.
    """

    W_enc: nn.Parameter  # [d_in, d_sae], in memory a row per feature: the backward pass reads single features
    b_enc: nn.Parameter  # [d_sae]

    def __init__(self, weights: Mapping[str, Tensor], *, k: int, site: str, apply_b_dec_to_input: bool = True) -> None:
        """`weights` holds W_enc, b_enc, W_dec and b_dec; they are not copied where their layout fits."""
        super().__init__({name: weights[name] for name in WEIGHTS}, site)
        self.W_enc.data = self.W_enc.t().contiguous().t()
        self.k = k
        self.apply_b_dec_to_input = apply_b_dec_to_input

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Feature values, dense: zero for all but the k features that are active."""
        values, indices = self.encode_sparse(x.reshape(-1, self.d_in))
        dense = values.new_zeros(len(values), self.d_sae).scatter(1, indices, values)
        return dense.reshape(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """Values and indices of the k active features of each row; differentiable with respect to x."""
        centred = x - self.b_dec if self.apply_b_dec_to_input else x
        return sparse_encode(centred, self.W_enc.t(), self.b_enc, self.k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"

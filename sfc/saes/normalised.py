"""Dictionaries that see each activation normalised by statistics of its own."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sfc.saes.dictionary import LinearDecoder, TopKDictionary
from sfc.saes.jumprelu import JumpReLUDictionary
from sfc.saes.kernels import Sparse

RowNormalisation = Literal["constant_norm_rescale", "layer_norm"]
_LAYER_NORM_EPSILON = 1e-5


class NormalisedDictionary(LinearDecoder):
    """A dictionary behind one of SAELens' input normalisations that depend on the row.

    `constant_norm_rescale` gives every row the norm sqrt(d_in); `layer_norm` subtracts its mean and divides by its
    standard deviation. SAELens undoes this after decoding the normalised features f': `x_hat = scale (f' @ W_dec +
    b_dec) + mean`, with the row's own scale and mean. In the model's units a feature's value is `f = scale f'`, and

        x_hat = sum_i f_i d_i + scale * b_dec + max(mean, 0) * 1 - max(-mean, 0) * 1

    The last terms vary from row to row, so they are features too, numbered after the dictionary's own: one of value
    `scale` and direction b_dec, and for `layer_norm` two of direction 1 and -1 (no feature value is negative). With
    them x_hat is exactly SAELens', decoding is linear with b_dec = 0, and ablation and attribution hold as they are:
    setting every feature to its reference sets the row's scale and mean as well. Only the values of the dictionary's
    own features differ from SAELens', by the factor `scale`.
    """

    def __init__(self, inner: TopKDictionary | JumpReLUDictionary, normalisation: RowNormalisation) -> None:
        """`inner` encodes normalised rows; its decoder weights move into this one's."""
        ones = torch.ones_like(inner.b_dec)[None]
        of_the_row = [inner.b_dec[None], ones, -ones] if normalisation == "layer_norm" else [inner.b_dec[None]]
        weights = {"W_dec": torch.cat([inner.W_dec, *of_the_row]), "b_dec": torch.zeros_like(inner.b_dec)}
        super().__init__(weights, inner.site)
        inner.W_dec.data = self.W_dec.data[: inner.d_sae]  # the same memory: decoders are large
        self.inner = inner
        self.normalisation = normalisation

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Feature values, dense: the inner dictionary's times the row's scale, then those of the row itself."""
        normalised, scale, of_the_row = self._normalise(x)
        return torch.cat([self.inner.encode(normalised) * scale, of_the_row], dim=-1)

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """As `encode`, with the entries of the inner dictionary and behind them those of the row itself."""
        normalised, scale, of_the_row = self._normalise(x)
        values, indices = self.inner.encode_sparse(normalised)
        numbers = torch.arange(self.inner.d_sae, self.d_sae, device=x.device).expand(len(x), -1)
        return Sparse(torch.cat([values * scale, of_the_row], dim=1), torch.cat([indices, numbers], dim=1))

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised rows, their scales [*rows, 1], and the values of the features that stand for the row."""
        if self.normalisation == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / scale.clamp(min=torch.finfo(x.dtype).tiny), scale, scale
        mean = x.mean(dim=-1, keepdim=True)
        scale = x.std(dim=-1, keepdim=True)
        return (
            (x - mean) / (scale + _LAYER_NORM_EPSILON),
            scale,
            torch.cat([scale, mean.relu(), (-mean).relu()], dim=-1),
        )

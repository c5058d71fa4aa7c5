"""Dictionaries in which a feature is active above a threshold of its own: JumpReLU, standard and gated SAEs."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfc.saes.dictionary import WEIGHTS, LinearDecoder
from sfc.saes.kernels import Sparse, row_dots


class JumpReLUDictionary(LinearDecoder):
    """A JumpReLU SAE (Rajamanoharan et al. 2024): a pre-activation above its threshold is the value, others are 0.

    With `pre = (x - b_dec) @ W_enc + b_enc`, `encode(x)` is pre where `pre > threshold` and 0 elsewhere; without
    `apply_b_dec_to_input`, b_dec is not subtracted. A standard SAE is one whose thresholds are 0, and a gated SAE is
    one as well (see `gated_weights`). The weights are frozen: gradients flow to x and to feature values only.
    """

    W_enc: nn.Parameter  # [d_in, d_sae], in memory a row per feature: single features are read
    b_enc: nn.Parameter  # [d_sae]
    threshold: nn.Parameter  # [d_sae], not negative

    def __init__(self, weights: Mapping[str, Tensor], *, site: str, apply_b_dec_to_input: bool = True) -> None:
        """`weights` holds W_enc, b_enc, threshold, W_dec and b_dec; a threshold below 0 acts as 0."""
        super().__init__({name: weights[name] for name in (*WEIGHTS, "threshold")}, site)
        self.W_enc.data = self.W_enc.t().contiguous().t()
        self.threshold.data = self.threshold.clamp(min=0)
        self.apply_b_dec_to_input = apply_b_dec_to_input

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Feature values, dense."""
        pre = self._encoder_input(x) @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0)

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """Values and indices of the active features, padded to the fullest row; differentiable with respect to x.

        What is kept for the backward pass is of the size of the result, not `[rows, d_sae]`.
        """
        with torch.no_grad():
            f = self.encode(x)
            entries = max([1, *(f > 0).sum(dim=1).tolist()])
            values, indices = f.topk(entries, dim=1, sorted=False)
        if torch.is_grad_enabled() and x.requires_grad:
            pre = row_dots(self._encoder_input(x), indices, self.W_enc.t()) + self.b_enc[indices]
            values = torch.where(values > 0, pre, 0.0)
        return Sparse(values, indices)

    def _encoder_input(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.apply_b_dec_to_input else x


def standard_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The JumpReLU weights of a standard SAE, `relu(x @ W_enc + b_enc)`."""
    return {**weights, "threshold": torch.zeros_like(weights["b_enc"])}


def gated_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The JumpReLU weights of a gated SAE, which shares its encoder between gate and magnitude.

    With `pre = x @ W_enc`, its features are `relu(exp(r_mag) pre + b_mag)` where `pre + b_gate > 0`. Scaled by
    exp(r_mag) and moved by b_mag, the gate is `magnitude > b_mag - exp(r_mag) b_gate` (Rajamanoharan et al. 2024,
    Improving Dictionary Learning with Gated Sparse Autoencoders).
    """
    gain = weights["r_mag"].exp()
    return {
        "W_enc": weights["W_enc"] * gain,
        "b_enc": weights["b_mag"],
        "threshold": weights["b_mag"] - gain * weights["b_gate"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }

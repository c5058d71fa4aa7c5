"""What a sparse autoencoder (SAE) is to the rest of the project: encode `x -> f`, decode `f -> x_hat`.

A dictionary always works in the model's own units: any scaling that training used is folded into its weights, so that
`x_hat = f @ W_dec + b_dec` is comparable with the activation x itself and the error is simply `x - x_hat`.

There are dictionaries whose k largest features are active, dictionaries whose features are active above a threshold
(JumpReLU, standard and gated SAEs), dictionaries whose features are found one after the other (matching pursuit), and
all of them behind a normalisation of each activation.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from einops import pack, unpack
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfc.core.sites import short_site
from sfc.models.linear import linear
from sfc.saes.kernels import Sparse, row_dots, sparse_encode, weighted_row_sums

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


@runtime_checkable
class Dictionary(Protocol):
    """What ablation, attribution and the viewer need of an SAE, whatever its architecture.

    All of it is in the model's own units. `encode` and `encode_sparse` give the same features, which are not negative,
    and are differentiable with respect to x where the set of active features does not change. The number of entries per
    row of `encode_sparse` is k for a top-k dictionary; elsewhere it is that of the fullest row, the others being padded
    with entries of value 0 (see `Sparse`). `decode_sparse` takes any number of entries per row.

    `reads` is the site whose activation is encoded, `writes` the one whose activation is decoded; `site`, which names
    the features, is the latter. They are the same but for transcoders. `d_in` is the width of what is written.

    What is left there without the features is divided among further nodes, the `parts`: for an SAE the error alone.
    They share `d_parts` coordinates equally, which are d_in or several times as many and then add up. `of_parts` lays
    out what is written over them, and the error is what this has in its first d_in coordinates beyond `x_hat`.
    """

    @property
    def site(self) -> str: ...
    @property
    def reads(self) -> str: ...
    @property
    def writes(self) -> str: ...
    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]: ...
    @property
    def b_dec(self) -> Float[Tensor, " d_in"]: ...
    @property
    def d_read(self) -> int: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def parts(self) -> Sequence[str]: ...
    @property
    def n_parts(self) -> int: ...
    @property
    def part_kinds(self) -> Sequence[str]: ...
    @property
    def d_parts(self) -> int: ...
    def of_parts(
        self, read: Float[Tensor, "rows d_read"], written: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_parts"]: ...
    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]: ...
    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse: ...
    def decode(self, f: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_in"]: ...
    def decode_sparse(
        self, values: Float[Tensor, "rows entries"], indices: Int[Tensor, "rows entries"]
    ) -> Float[Tensor, "rows d_in"]: ...


def reconstruction(
    dictionary: Dictionary, features: Sparse, read: Float[Tensor, "rows d_read"], written: Float[Tensor, "rows d_in"]
) -> Float[Tensor, "rows d_in"]:
    """What a dictionary makes of what it reads, a skip connection included: what is written, without the error."""
    x_hat = dictionary.decode_sparse(*features)
    if dictionary.d_parts == dictionary.d_in:
        return x_hat
    return x_hat + dictionary.of_parts(read, written)[:, dictionary.d_in :]


class LinearDecoder(nn.Module):
    """What dictionaries of every architecture share: `x_hat = f @ W_dec + b_dec`, with frozen weights."""

    W_dec: nn.Parameter  # [d_sae, d_in]
    b_dec: nn.Parameter  # [d_in]

    def __init__(self, weights: Mapping[str, Tensor], site: str) -> None:
        """Register `weights`, W_dec and b_dec among them; they are not copied."""
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach(), requires_grad=False))
        self.site = self._reads = site

    @property
    def reads(self) -> str:
        """The site whose activation it encodes."""
        return self._reads

    @property
    def writes(self) -> str:
        """The site whose activation it decodes."""
        return self.site

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the nodes that share what is left without the features: the error alone."""
        return tuple(f"{short_site(self.site)}/{kind}" for kind in self.part_kinds)

    @property
    def n_parts(self) -> int:
        """How many nodes share what is left without the features."""
        return len(self.parts)

    @property
    def part_kinds(self) -> tuple[str, ...]:
        """What each of these nodes is."""
        return ("error",)

    @property
    def d_parts(self) -> int:
        """How many coordinates these nodes share."""
        return self.d_in

    def of_parts(
        self, read: Float[Tensor, "rows d_read"], written: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_parts"]:
        """What is written, laid out over the coordinates of these nodes, features included."""
        return written

    @property
    def d_read(self) -> int:
        """Width of the activations that are encoded."""
        return self.d_in

    @property
    def d_in(self) -> int:
        """Width of the activations that are decoded."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_dec.shape[0]

    def decode(self, f: Float[Tensor, "*rows d_sae"]) -> Float[Tensor, "*rows d_in"]:
        """The activation that dense feature values stand for."""
        return linear(f, self.W_dec.t()) + self.b_dec

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
        rows, shape = pack([x], "* d_in")
        values, indices = self.encode_sparse(rows)
        dense = values.new_zeros(len(values), self.d_sae).scatter(1, indices, values)
        return unpack(dense, shape, "* d_sae")[0]

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """Values and indices of the k active features of each row; differentiable with respect to x."""
        centred = x - self.b_dec if self.apply_b_dec_to_input else x
        return sparse_encode(centred, self.W_enc.t(), self.b_enc, self.k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"


class JumpReLUDictionary(LinearDecoder):
    """A JumpReLU SAE (Rajamanoharan et al. 2024): a pre-activation above its threshold is the value, others are 0.

    With `pre = (x - b_dec) @ W_enc + b_enc`, `encode(x)` is pre where `pre > threshold` and 0 elsewhere; without
    `apply_b_dec_to_input`, b_dec is not subtracted. Standard and gated SAEs are JumpReLU SAEs as well (see
    `sfc.saes.architectures`). The weights are frozen: gradients flow to x and to feature values only.
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
        pre = linear(self._encoder_input(x), self.W_enc.t(), self.b_enc)
        return torch.where(pre > self.threshold, pre, 0.0)

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """Values and indices of the active features, padded to the fullest row; differentiable with respect to x.

        What is kept for the backward pass is of the size of the result, not `[rows, d_sae]`.
        """
        with torch.no_grad():
            values, indices = _active(self.encode(x))
        if torch.is_grad_enabled() and x.requires_grad:
            pre = row_dots(self._encoder_input(x), indices, self.W_enc.t()) + self.b_enc[indices]
            values = torch.where(values > 0, pre, 0.0)
        return Sparse(values, indices)

    def _encoder_input(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.apply_b_dec_to_input else x


def _active(f: Float[Tensor, "rows d_sae"]) -> Sparse:
    """The features that are not 0, padded to the fullest row; differentiable with respect to f."""
    entries = max([1, *(f > 0).sum(dim=1).tolist()])
    return Sparse(*f.topk(entries, dim=1, sorted=False))


class MatchingPursuitDictionary(LinearDecoder):
    """A matching-pursuit SAE (Costa et al. 2025): features are found one after the other.

    What is left of `x - b_dec` is projected on the direction in which it is longest; the projection is added to that
    feature's value and taken away from what is left; and so on. A row is finished when a feature comes a second time,
    when less than `residual_threshold` is left, or after all steps. The weights are frozen.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        site: str,
        residual_threshold: float,
        steps: int,
        stop_on_repetition: bool,
    ) -> None:
        """`weights` holds W_dec, the directions to project on and to add up, and b_dec."""
        super().__init__({name: weights[name] for name in ("W_dec", "b_dec")}, site)
        self.residual_threshold = residual_threshold
        self.steps = steps
        self.stop_on_repetition = stop_on_repetition

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_sae"]:
        """Feature values, dense; differentiable where the features come in the same order."""
        rows, shape = pack([x], "* d_in")
        left = rows - self.b_dec
        support = torch.zeros(len(left), self.d_sae, dtype=torch.bool, device=left.device)
        going = torch.ones(len(left), 1, dtype=torch.bool, device=left.device)
        values, indices = [left.new_zeros(len(left), 0)], [support.new_zeros(len(left), 0, dtype=torch.long)]
        for _ in range(self.steps):
            if not going.any():
                break
            with torch.no_grad():
                chosen = linear(left, self.W_dec).argmax(dim=1, keepdim=True)
            directions = self.W_dec[chosen[:, 0]].to(left.dtype)
            value = (left * directions).sum(dim=1, keepdim=True).relu() * going
            left = left - value * directions
            values.append(value)
            indices.append(chosen)
            with torch.no_grad():
                if self.stop_on_repetition:
                    going = going & (value > 0) & ~support.gather(1, chosen)
                    support.scatter_(1, chosen, True)
                if self.residual_threshold > 0:
                    going = going & (left.norm(dim=1, keepdim=True) >= self.residual_threshold)
        dense = left.new_zeros(len(left), self.d_sae).scatter_add(1, torch.cat(indices, 1), torch.cat(values, 1))
        return unpack(dense, shape, "* d_sae")[0]

    def encode_sparse(self, x: Float[Tensor, "rows d_in"]) -> Sparse:
        """Values and indices of the active features, each once, padded to the fullest row."""
        return _active(self.encode(x))


class Transcoder(JumpReLUDictionary):
    """A sparse replacement of an MLP (Dunefsky et al. 2024): encoded from what it reads, decoded to what it writes.

    With a skip connection it also adds `W_skip x_read`. That is a node beside the error, `skip`, which is kept or
    ablated like any other. Of the coordinates of the parts the first d_in are the error's, the others the skip's.
    """

    W_skip: nn.Parameter | None  # [d_in, d_read]

    def __init__(self, weights: Mapping[str, Tensor], *, reads: str, writes: str) -> None:
        """`weights` holds W_enc [d_read, d_sae], b_enc, threshold, W_dec and b_dec, and W_skip if there is one."""
        super().__init__(weights, site=writes, apply_b_dec_to_input=False)
        skip = weights.get("W_skip")
        self.W_skip = None if skip is None else nn.Parameter(skip.detach(), requires_grad=False)
        self._reads = reads

    @property
    def d_read(self) -> int:
        """Width of the activations that are encoded."""
        return self.W_enc.shape[0]

    @property
    def part_kinds(self) -> tuple[str, ...]:
        """What the nodes are that are not features."""
        return ("error",) if self.W_skip is None else ("error", "skip")

    @property
    def d_parts(self) -> int:
        """How many coordinates these nodes share."""
        return self.d_in * self.n_parts

    def of_parts(
        self, read: Float[Tensor, "rows d_read"], written: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "rows d_parts"]:
        """What is written without the skip connection, and behind it what that adds."""
        if self.W_skip is None:
            return written
        skip = read @ self.W_skip.t()
        return torch.cat([written - skip, skip], dim=1)


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

    def __init__(self, inner: Dictionary, normalisation: RowNormalisation) -> None:
        """`inner` encodes normalised rows; its decoder weights move into this one's."""
        b_dec = inner.b_dec.to(inner.W_dec.dtype)[None]
        ones = torch.ones_like(b_dec)
        of_the_row = [b_dec, ones, -ones] if normalisation == "layer_norm" else [b_dec]
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

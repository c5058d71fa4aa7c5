"""The arithmetic of sparse dictionaries, forward and backward, at the cost of the active features alone.

Only k of d_sae features are active in a row, so three of the four matrix products of an SAE's training step are
sparse. With `indices[n, e]` naming the active features of row n, they are three sums of the same products:

    weighted_row_sums   out[n]    = sum_e weights[n, e] * table[indices[n, e]]      decoding; the gradient of x
    row_dots            out[n, e] = vectors[n] . table[indices[n, e]]               the gradient of the values
    feature_sums        out[i]    = sum over indices[n, e] = i of weights[n, e] * vectors[n]     gradients of weights

Each one's gradients are the other two, so that all of them can be differentiated any number of times. The third is
the first read by columns: one sort of the indices turns it into another `embedding_bag`, an order of magnitude
faster than the dense product or `index_add_` on a CPU. What remains at full cost is the encoder's own matrix product.
Where dense products are the quicker way, as on a GPU with many active features, they take the sums' place (see
`sfc.saes.sums`).

A table may be kept in half precision. Products are in the precision of what it meets: it is converted for the product
and not kept so, neither after it nor for the backward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.amp.autocast_mode import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from sfc.models.linear import linear
from sfc.saes.sums import dots, group_dots, group_sums, grouped_sums_by_feature, row_sums, sums_by_feature

_GROUP = 8


class Sparse(NamedTuple):
    """The active features of each row. Entries come in no particular order.

    A row with fewer active features than `entries` is padded: the value is 0, the index any valid feature. Code that
    sums `value * something` needs no mask; code that counts or lists features must test `value > 0`.
    """

    values: Float[Tensor, "rows entries"]
    indices: Int[Tensor, "rows entries"]


def columns_of(features: Int[Tensor, " features"], d_sae: int) -> Int[Tensor, " d_sae"]:
    """The place of each of the d_sae features among some of them; past the end: it is not among them."""
    column = torch.full((d_sae,), len(features), device=features.device)
    column[features] = torch.arange(len(features), device=features.device)
    return column


def values_of(
    features: Int[Tensor, " features"],
    values: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    d_sae: int,
) -> Float[Tensor, "rows features"]:
    """The values of some features, dense."""
    place = columns_of(features, d_sae)[indices]
    return values.new_zeros(len(values), len(features) + 1).scatter_add_(1, place, values)[:, :-1]


def sparse_encode(
    x: Float[Tensor, "rows d_in"], encoder: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"], k: int
) -> Sparse:
    """The k largest of `relu(x @ encoder.T + bias)` in each row (Gao et al. 2024).

    `encoder` has a row per feature. Differentiable with respect to x, encoder and bias where the active set stays.
    """
    values, indices, _ = _SparseEncode.apply(x, encoder, bias, k, None, 0)
    return Sparse(values, indices)


def sparse_encode_with_dead(
    x: Float[Tensor, "rows d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    dead: Int[Tensor, " dead"],
    k_dead: int,
) -> tuple[Sparse, Float[Tensor, "rows dead"]]:
    """As `sparse_encode`, and beside it the `k_dead` largest among the features listed in `dead`, dense.

    Both are read off the same pre-activations, and both send their gradients back through them. So many of the dead
    features are wanted in every row that dense products among them are the quicker way.
    """
    values, indices, revived = _SparseEncode.apply(x, encoder, bias, k, dead, k_dead)
    return Sparse(values, indices), revived


def weighted_row_sums(
    weights: Float[Tensor, "rows entries"], indices: Int[Tensor, "rows entries"], table: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows d_in"]:
    """`out[n] = sum_e weights[n, e] * table[indices[n, e]]`, the sparse decoder.

    Differentiable with respect to weights and table.
    """
    return _WeightedRowSums.apply(weights, indices, table)


def row_dots(
    vectors: Float[Tensor, "rows d_in"], indices: Int[Tensor, "rows entries"], table: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows entries"]:
    """`out[n, e] = vectors[n] . table[indices[n, e]]`, the transpose of `weighted_row_sums`.

    Differentiable with respect to vectors and table.
    """
    return _RowDots.apply(vectors, indices, table)


def feature_sums(
    weights: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    vectors: Float[Tensor, "rows d_in"],
    d_sae: int,
) -> Float[Tensor, "d_sae d_in"]:
    """`out[i] = sum of weights[n, e] * vectors[n]` over the entries with `indices[n, e] = i`.

    Differentiable with respect to weights and vectors.
    """
    return _FeatureSums.apply(weights, indices, vectors, d_sae)


def weighted_group_sums(
    weights: Float[Tensor, "rows entries"],
    indices: Int[Tensor, "rows entries"],
    borders: Sequence[int],
    table: Float[Tensor, "d_sae d_in"],
) -> Float[Tensor, "rows groups d_in"]:
    """`weighted_row_sums`, taken apart into what groups of features give.

    Differentiable, once, with respect to weights and table.

    Args:
        borders: 0, the first feature of each further group, and d_sae.
    """
    return _WeightedGroupSums.apply(weights, indices, borders, table)


class _SparseEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, encoder, bias, k: int, dead, k_dead: int):
        pre = linear(x, encoder, bias)
        values, indices = largest(pre, k)
        # Under autocast the product, and only the product, is in bfloat16.
        values = values.to(x.dtype).relu_()
        revived = None if dead is None else _dense_top_k(pre[:, dead].to(x.dtype), k_dead)
        ctx.save_for_backward(x, encoder, values, indices, dead, revived)
        ctx.mark_non_differentiable(indices)
        return values, indices, revived

    @staticmethod
    def backward(ctx, *grads):
        x, encoder, values, indices, dead, revived = ctx.saved_tensors
        grad_pre = grads[0] * (values > 0)
        grad_x = grad_encoder = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = weighted_row_sums(grad_pre, indices, encoder)
        if ctx.needs_input_grad[1]:
            grad_encoder = feature_sums(grad_pre, indices, x, len(encoder))
        if ctx.needs_input_grad[2]:
            grad_bias = x.new_zeros(len(encoder)).index_add_(0, indices.flatten(), grad_pre.flatten())
        if revived is not None:
            grad_dead = grads[2] * (revived > 0)
            if grad_x is not None:
                grad_x = grad_x + grad_dead @ encoder[dead]
            if grad_encoder is not None:
                grad_encoder = grad_encoder.index_add(0, dead, grad_dead.t() @ x)
            if grad_bias is not None:
                grad_bias = grad_bias.index_add(0, dead, grad_dead.sum(0))
        return grad_x, grad_encoder, grad_bias, None, None, None


def largest(pre: Float[Tensor, "rows columns"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row and their columns, in no order: `topk`, faster on a CPU where columns are many.

    The k largest are among the members of the k groups with the largest maxima. A group is every n-th column, so that
    the maxima are taken over contiguous memory.
    """
    rows, columns = pre.shape
    n_groups = columns // _GROUP
    if pre.device.type != "cpu" or columns % _GROUP or n_groups < 4 * k:
        return pre.topk(k, sorted=False)
    maxima = pre.view(rows, _GROUP, n_groups).amax(1)
    groups = maxima.topk(k, sorted=False).indices
    candidates = (groups[:, None] + n_groups * torch.arange(_GROUP)[:, None]).view(rows, _GROUP * k)
    values, places = pre.gather(1, candidates).topk(k, sorted=False)
    return values, candidates.gather(1, places)


def _dense_top_k(pre: Tensor, k: int) -> Tensor:
    if k == pre.shape[1]:
        return pre.relu()
    values, indices = pre.topk(k, sorted=False)
    return torch.zeros_like(pre).scatter_(1, indices, values.relu())


class _WeightedRowSums(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, weights, indices, table):
        ctx.save_for_backward(weights, indices, table)
        return row_sums(weights, indices, table.to(weights.dtype))

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx, *grads):
        weights, indices, table = ctx.saved_tensors
        grad_weights = row_dots(grads[0], indices, table) if ctx.needs_input_grad[0] else None
        grad_table = feature_sums(weights, indices, grads[0], len(table)) if ctx.needs_input_grad[2] else None
        return grad_weights, None, grad_table


class _RowDots(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, vectors, indices, table):
        ctx.save_for_backward(vectors, indices, table)
        return (
            dots(vectors, indices, table.to(vectors.dtype)) if indices.shape[1] else vectors.new_zeros(len(vectors), 0)
        )

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx, *grads):
        vectors, indices, table = ctx.saved_tensors
        grad_vectors = weighted_row_sums(grads[0], indices, table) if ctx.needs_input_grad[0] else None
        grad_table = feature_sums(grads[0], indices, vectors, len(table)) if ctx.needs_input_grad[2] else None
        return grad_vectors, None, grad_table


class _FeatureSums(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, weights, indices, vectors, d_sae: int):
        ctx.save_for_backward(weights, indices, vectors)
        return sums_by_feature(weights, indices, vectors, d_sae)

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx, *grads):
        weights, indices, vectors = ctx.saved_tensors
        grad_weights = row_dots(vectors, indices, grads[0]) if ctx.needs_input_grad[0] else None
        grad_vectors = weighted_row_sums(weights, indices, grads[0]) if ctx.needs_input_grad[2] else None
        return grad_weights, None, grad_vectors, None


class _WeightedGroupSums(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, weights, indices, borders, table):
        ctx.save_for_backward(weights, indices, table)
        ctx.borders = borders
        return group_sums(weights, indices, borders, table.to(weights.dtype))

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cuda")
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        weights, indices, table = ctx.saved_tensors
        grad_weights = grad_table = None
        if ctx.needs_input_grad[0]:
            grad_weights = group_dots(grads[0].contiguous(), indices, ctx.borders, table.to(grads[0].dtype))
        if ctx.needs_input_grad[3]:
            grad_table = grouped_sums_by_feature(weights, indices, ctx.borders, grads[0].contiguous())
        return grad_weights, None, None, grad_table

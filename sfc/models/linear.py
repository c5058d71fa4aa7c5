"""The linear layers of a model in float32 on a CPU, three quarters of a forward pass, by oneDNN.

PyTorch gives such products to MKL, which leaves half of the arithmetic of processors that are not Intel's unused: on a
Zen 5 core oneDNN, which comes with PyTorch as well, is 2.2 times as fast, to the same accuracy. Where it is missing,
and for other types and devices, the product is PyTorch's own.
"""

import platform
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linear(
    x: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, "*rows d_out"]:
    """`x @ weight.T + bias`, differentiable any number of times.

    A weight in another precision than x is converted for the product, and not kept so for the backward pass.
    """
    if weight.dtype == x.dtype and not _is_quick(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grads[0], weight.t())
        if ctx.needs_input_grad[1]:
            grad_weight = linear(grads[0].reshape(-1, len(weight)).t(), x.reshape(-1, weight.shape[1]).t())
        if ctx.needs_input_grad[2]:
            grad_bias = grads[0].reshape(-1, len(weight)).sum(0)
        return grad_x, grad_weight, grad_bias


def _is_quick(x: Tensor, weight: Tensor) -> bool:
    is_empty = x.numel() == 0 or weight.numel() == 0
    return x.dtype == torch.float32 and x.device.type == "cpu" and not is_empty and _onednn_linear() is not None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, product = weight.to(x.dtype), _onednn_linear()
    if product is None or not _is_quick(x, weight):
        return F.linear(x, weight, bias)
    return product(x, weight, bias, "none", [], "")


@cache
def _onednn_linear() -> Callable[..., Tensor] | None:
    """What PyTorch's own compiler calls for a linear layer; None without it, or without an x86 processor."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def use_quick_products(model: nn.Module) -> None:
    """Change the classes of the linear layers inside a model, in place; weights and names stay."""
    for module in model.modules():
        if type(module) in _QUICK:
            module.__class__ = _QUICK[type(module)]


class _QuickLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _QuickConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is [d_in, d_out]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)


_QUICK = {nn.Linear: _QuickLinear, Conv1D: _QuickConv1D}

"""The linear layers of a Hugging Face model, computed by `sfc.linear`: three quarters of a forward pass."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfc.linear import linear


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

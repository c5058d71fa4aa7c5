"""The quick linear map against PyTorch's own, with gradients of gradients."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sfc.models.linear import linear

sizes = st.integers(1, 70)


def with_gradients(product, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The output, the gradients of a function of it, and the gradients of a function of those."""
    inputs = [t for t in (x, weight, bias) if t is not None]
    out = product(x, weight, bias)
    first = torch.autograd.grad(out.pow(3).sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
    return [out, *first, *second]


@example(rows=[41], d_in=1, d_out=41, biased=False, seed=0)
@settings(deadline=None)
@given(rows=st.lists(sizes, max_size=2), d_in=sizes, d_out=sizes, biased=st.booleans(), seed=st.integers(0, 99))
def test_output_and_gradients_agree_with_pytorch(
    rows: list[int], d_in: int, d_out: int, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, d_in, generator=generator, requires_grad=True)
    weight = torch.randn(d_out, d_in, generator=generator, requires_grad=True)
    bias = torch.randn(d_out, generator=generator, requires_grad=True) if biased else None
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    ours, pytorchs = (with_gradients(product, x, weight, bias) for product in (linear, F.linear))
    for quick, usual, reference in zip(ours, pytorchs, with_gradients(F.linear, *exact), strict=True):  # pyright: ignore
        assert quick.shape == reference.shape
        # Gradients of gradients of cubes may cancel: PyTorch's own are then no nearer.
        allowed = 1e-5 * reference.abs().max() + 3 * (usual - reference).abs().max()
        assert (quick - reference).abs().max() <= allowed


def test_other_types_strides_and_empty_inputs_are_pytorchs() -> None:
    x, weight = torch.randn(6, 5), torch.randn(4, 5)
    torch.testing.assert_close(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    torch.testing.assert_close(linear(x[::2], weight), F.linear(x[::2], weight))
    torch.testing.assert_close(
        linear(x.t()[:4], weight[:, :1].expand(4, 6)), x.t()[:4] @ weight[:, :1].expand(4, 6).t()
    )
    assert linear(x[:0], weight).shape == (0, 4)


def test_gradients_can_be_taken_in_batches() -> None:
    x, weight = torch.randn(6, 5, requires_grad=True), torch.randn(4, 5)
    out, vectors = linear(x, weight), torch.randn(3, 6, 4)
    (batched,) = torch.autograd.grad(out, x, vectors, is_grads_batched=True)
    torch.testing.assert_close(batched, vectors @ weight)

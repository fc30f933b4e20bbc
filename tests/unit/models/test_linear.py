"""Products by oneDNN against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmtrain.models import linear as linear_module
from llmtrain.models.linear import SMALLEST, add_product_, linear, product

NUM_IN, NUM_OUT = 512, 256


@pytest.mark.parametrize("shape", [(NUM_IN,), (1, 1, NUM_IN), (2, 3, NUM_IN), (40, NUM_IN)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_large_product_and_its_gradients(shape: tuple[int, ...], with_bias: bool) -> None:
    assert NUM_IN * NUM_OUT >= SMALLEST
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    weight = torch.randn(NUM_OUT, NUM_IN, generator=generator, requires_grad=True)
    bias = torch.randn(NUM_OUT, generator=generator, requires_grad=True) if with_bias else None
    asked = [tensor for tensor in (x, weight, bias) if tensor is not None]
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    gradient = torch.randn(ours.shape, generator=generator)
    for ours_grad, theirs_grad in zip(
        torch.autograd.grad(ours, asked, gradient), torch.autograd.grad(theirs, asked, gradient), strict=True
    ):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-4)
    if linear_module._has_onednn():
        assert "_Linear" in type(ours.grad_fn).__name__


def test_frozen_and_half_precision_weights() -> None:
    x, weight = torch.randn(4, NUM_IN, requires_grad=True), torch.randn(NUM_OUT, NUM_IN)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, NUM_IN), rtol=1e-5, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert linear(x[:0], weight).shape == (0, NUM_OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_products(dtype: torch.dtype) -> None:
    a, b = torch.randn(300, 64).to(dtype), torch.randn(500, 64).to(dtype)
    expected = a.float() @ b.float().T
    tolerance = {"rtol": 1e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(product(a, b).float(), expected, **tolerance)
    total = torch.ones(300, 500)
    add_product_(total, a, b)
    torch.testing.assert_close(total, expected + 1, **tolerance)


def test_packed_weights_give_the_same() -> None:
    weight, bias = torch.nn.Parameter(torch.randn(NUM_OUT, NUM_IN)), torch.randn(NUM_OUT)
    rows = [torch.randn(n, 1, NUM_IN) for n in (1, 8, 40)]
    with torch.no_grad():
        plain = [linear(x, weight, bias) for x in rows]
        with linear_module.packed_weights():
            packed = [linear(x, weight, bias) for x in rows]
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-4)
        weight.mul_(2.0)
        # Nothing is kept for later.
        torch.testing.assert_close(linear(rows[0], weight), 2 * (plain[0] - bias), rtol=1e-4, atol=1e-3)

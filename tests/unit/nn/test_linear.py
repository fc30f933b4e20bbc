"""Products made in our own ways against torch's own, and which way is taken where."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmtrain.nn import linear as linear_module
from llmtrain.nn.attention import attend
from llmtrain.nn.linear import SMALLEST, Way, add_product_, bmm, einsum, linear, product, way_of

NUM_IN, NUM_OUT = 512, 256
LOW = {"rtol": 1e-2, "atol": 0.2}


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's products of fp32, whatever this machine's processor would take."""
    if not linear_module._has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(
        linear_module, "way_of", lambda dtype: "onednn" if dtype == torch.float32 else "torch"
    )


@pytest.fixture(params=["torch", "fp32"])
def low_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Both ways of products in bf16, each on any machine."""
    monkeypatch.setattr(
        linear_module, "way_of", lambda dtype: "torch" if dtype == torch.float32 else request.param
    )
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("capability", "vendor", "instructions", "fp32", "bf16"),
    [
        ("AVX512", "AuthenticAMD", True, "onednn", "torch"),
        ("AVX512", "GenuineIntel", True, "torch", "torch"),
        ("AVX2", "AuthenticAMD", False, "torch", "fp32"),
        ("AVX2", "GenuineIntel", False, "torch", "fp32"),
        ("SVE256", "", True, "torch", "torch"),
        ("DEFAULT", "", False, "torch", "fp32"),
    ],
)
def test_which_way(
    monkeypatch: pytest.MonkeyPatch,
    capability: str,
    vendor: str,
    instructions: bool,
    fp32: Way,
    bf16: Way,
) -> None:
    """By the processor alone: a resumed run repeats its bits."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(linear_module, "_vendor", lambda: vendor)
    monkeypatch.setattr(linear_module, "_has_onednn", lambda: True)
    for kind in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", lambda: instructions)
    ways = {
        dtype: way_of.__wrapped__(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    }
    assert ways == {
        torch.float32: fp32,
        torch.bfloat16: bf16,
        torch.float16: bf16,
        torch.float64: "torch",
    }


@pytest.mark.usefixtures("onednn")
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
    tolerance = LOW if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(product(a, b).float(), expected, **tolerance)
    total = torch.ones(300, 500)
    add_product_(total, a, b)
    torch.testing.assert_close(total, expected + 1, **tolerance)


@pytest.mark.parametrize("with_autocast", [True, False])
def test_low_products_and_their_gradients(low_way: Way, with_autocast: bool) -> None:
    """Those of fp32 numbers that were rounded, whichever way is taken, up to one rounding more."""
    generator = torch.Generator().manual_seed(0)
    held_in = torch.float32 if with_autocast else torch.bfloat16
    arguments = [
        torch.randn(shape, generator=generator).to(held_in).requires_grad_()
        for shape in ((2, 3, NUM_IN), (NUM_OUT, NUM_IN), (NUM_OUT,))
    ]
    exact = [tensor.detach().bfloat16().float().requires_grad_() for tensor in arguments]
    with torch.autocast("cpu", torch.bfloat16, enabled=with_autocast):
        ours = linear(*arguments)
    expected = F.linear(*exact)
    gradient = torch.randn(ours.shape, generator=generator).bfloat16()
    assert ours.dtype == torch.bfloat16
    assert ("_Linear" in type(ours.grad_fn).__name__) == (low_way == "fp32")
    torch.testing.assert_close(ours.float(), expected, **LOW)
    for ours_grad, exact_grad in zip(
        torch.autograd.grad(ours, arguments, gradient),
        torch.autograd.grad(expected, exact, gradient.float()),
        strict=True,
    ):
        assert ours_grad.dtype == held_in
        torch.testing.assert_close(ours_grad.float(), exact_grad, **LOW)


def test_low_batched_products(low_way: Way) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 4, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    exact = [tensor.detach().float().requires_grad_() for tensor in (q, k)]
    equation = "bnth,bnsh->bnts"
    with torch.autocast("cpu", torch.bfloat16):
        ours = einsum(equation, q, k)
    expected = torch.einsum(equation, *exact)
    gradient = torch.randn(ours.shape, generator=generator).bfloat16()
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, **LOW)
    torch.testing.assert_close(
        [grad.float() for grad in torch.autograd.grad(ours, (q, k), gradient)],
        list(torch.autograd.grad(expected, exact, gradient.float())),
        **LOW,
    )
    a, b = q.detach().flatten(0, 1), k.detach().flatten(0, 1).mT
    torch.testing.assert_close(bmm(a, b).float(), a.float() @ b.float(), **LOW)


@pytest.mark.usefixtures("low_way")
@pytest.mark.parametrize(("T", "S"), [(1, 6), (3, 6), (6, 6)])
def test_low_attention(T: int, S: int) -> None:
    """Blockwise, and by torch's kernel where a cache is longer than the queries."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator).bfloat16() for n in (T, S, S))
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend(q, k, v)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("onednn")
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

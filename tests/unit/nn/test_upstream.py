"""What stands in where torch's versions differ."""

from __future__ import annotations

import sys

import pytest
import torch

from llmtrain.nn import upstream


def test_a_torch_without_the_kernel(monkeypatch: pytest.MonkeyPatch):
    upstream.varlen_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert upstream.varlen_kernel() is None
    upstream.varlen_kernel.cache_clear()


def test_softmax_backward_with_and_without_torchs_own(monkeypatch: pytest.MonkeyPatch):
    scores = torch.randn(3, 4, 7, dtype=torch.double, requires_grad=True)
    probs, grad = scores.softmax(-1), torch.randn(3, 4, 7, dtype=torch.double)
    (expected,) = torch.autograd.grad(probs, scores, grad)
    kept = probs.detach()
    torch.testing.assert_close(upstream.softmax_backward(grad, kept, torch.double), expected)
    monkeypatch.delattr(torch, "_softmax_backward_data")
    torch.testing.assert_close(upstream.softmax_backward(grad, kept, torch.double), expected)

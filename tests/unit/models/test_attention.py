"""Blockwise attention on the CPU against torch's kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models import attention
from llmtrain.models.attention import attend
from llmtrain.models.dropout import AttentionDropout
from llmtrain.models.transformer import document_mask

B, K, G, H = 2, 2, 2, 8


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 16)


def run(blockwise: bool, T: int, mask: Tensor | None, dtype: torch.dtype, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(B, T, heads, H, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (K * groups, K, K)
    )
    if blockwise:
        y = attend(q, k, v, mask=mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=groups > 1)
    weights = torch.randn(y.shape, generator=generator).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), weights)]


@pytest.mark.parametrize("T", [2, 16, 17, 50])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, G])
def test_equals_torch(T: int, masked: bool, groups: int) -> None:
    documents = torch.randint(0, 4, (B, T), generator=torch.Generator().manual_seed(0)).sort(-1).values
    mask = document_mask(documents) if masked else None
    ours = run(True, T, mask, torch.float32, groups)
    theirs = run(False, T, mask, torch.float32, groups)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_near_to_fp32_as_torchs() -> None:
    exact = run(False, 50, None, torch.float32, 1)
    ours, theirs = (run(blockwise, 50, None, torch.bfloat16, 1) for blockwise in (True, False))
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - reference).norm() < 1.5 * (b - reference).norm()
        assert (a - reference).norm() < 0.02 * reference.norm()


def test_without_gradients_nothing_is_kept() -> None:
    q = torch.randn(B, K, 50, H)
    with torch.no_grad():
        y = attend(q, q, q)
    assert not y.requires_grad
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, q, q, is_causal=True))


def test_beyond_the_longest_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONGEST", 20)
    blockwise = []
    monkeypatch.setattr(attention._BlockwiseAttention, "apply", lambda *a: blockwise.append(a) or a[0])
    q = torch.randn(B, K, 21, H)
    torch.testing.assert_close(attend(q, q, q), F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert not blockwise
    attend(q[:, :, :20], q[:, :, :20], q[:, :, :20])
    assert len(blockwise) == 1


def test_dropout() -> None:
    torch.manual_seed(0)
    q = torch.randn(B, K, 50, H)
    with_dropout = torch.stack(
        [attend(q, q, q, dropout=AttentionDropout(0.5, 0, None)) for _ in range(200)]
    ).mean(0)
    assert not torch.allclose(attend(q, q, q, dropout=AttentionDropout(0.5, 0, None)), attend(q, q, q))
    torch.testing.assert_close(with_dropout, attend(q, q, q), rtol=0, atol=0.8)

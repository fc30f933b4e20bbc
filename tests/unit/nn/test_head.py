"""The chunked loss against torch's cross-entropy over whole logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn import head as head_module
from llmtrain.nn.head import LanguageModelHead, summed_cross_entropy

B, T, D, V = 3, 17, 24, 50


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 7 * V)
    monkeypatch.setattr(head_module, "CACHED_LOGITS", 3 * V)


def inputs(ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_BTD = torch.randn(B, T, D, generator=generator, requires_grad=True)
    weight_VD = torch.randn(V, D, generator=generator, requires_grad=True)
    labels_BT = torch.randint(0, V, (B, T), generator=generator)
    labels_BT[torch.rand(B, T, generator=generator) < ignored] = IGNORE_INDEX
    return hidden_BTD, weight_VD, labels_BT


def plain(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Tensor:
    logits = F.linear(hidden_BTD, weight_VD).float()
    return F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")


def loss_and_gradients(loss: Callable[..., Tensor], ignored: float, scale: float) -> list[Tensor]:
    hidden, weight, labels = inputs(ignored)
    value = loss(hidden, weight, labels)
    (value * scale).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [value.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_equals_cross_entropy_in_fp32(ignored: float) -> None:
    ours = loss_and_gradients(summed_cross_entropy, ignored, 1 / 37)
    theirs = loss_and_gradients(plain, ignored, 1 / 37)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_against_finite_differences() -> None:
    hidden, weight, labels = inputs()
    # Each number of the inputs takes two passes: few, and yet several chunks of tokens.
    hidden, labels = hidden[:2, :10, :4], labels[:2, :10]
    hidden, weight = (
        hidden.detach().double().requires_grad_(),
        weight[:, :4].detach().double().requires_grad_(),
    )
    # The softmax is fp32 by contract, so the step is large and the tolerance wide.
    assert torch.autograd.gradcheck(
        lambda h, w: summed_cross_entropy(h, w, labels).double(), (hidden, weight), eps=1e-2, atol=2e-2
    )


def test_under_autocast() -> None:
    def autocast(loss: Callable[..., Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_gradients(loss, 0.3, 1.0)

    exact = loss_and_gradients(plain, 0.3, 1.0)
    for a, b, reference in zip(autocast(summed_cross_entropy), autocast(plain), exact, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - reference).norm() <= 1.2 * (b - reference).norm() + 1e-6


def test_bf16_weights() -> None:
    hidden, weight, labels = inputs()
    exact = loss_and_gradients(plain, 0.3, 1.0)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    loss = summed_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    for value, reference in zip((loss, hidden.grad, weight.grad), exact, strict=True):
        assert value is not None
        assert (value - reference).norm() <= 2e-2 * reference.norm()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_frozen_weight_and_frozen_hidden() -> None:
    """Leaving one gradient out leaves the other as it was, to the bit."""
    _, hidden_gradient, weight_gradient = loss_and_gradients(summed_cross_entropy, 0.3, 1.0)
    hidden, weight, labels = inputs()
    summed_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, hidden_gradient)
    summed_cross_entropy(hidden.detach(), weight, labels).backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, weight_gradient)


def test_without_gradients() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        loss = summed_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach(), rtol=1e-6, atol=0)


def test_no_label_counts() -> None:
    hidden, weight, labels = inputs()
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().sum() + weight.grad.abs().sum() == 0.0


def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 16 * 4096)
    head = LanguageModelHead(8, 4096)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(1, 512, 8, requires_grad=True)
    labels = torch.randint(0, 4096, (1, 512))
    with torch.profiler.profile(profile_memory=True) as profile:
        head(hidden, labels).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 512 * 4096 * 4 / 8


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bias_and_its_gradient(autocast: bool) -> None:
    torch.manual_seed(0)
    found = []
    for chunked in (True, False):
        hidden, weight, labels = inputs()
        bias_V = torch.linspace(-2, 2, V).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if chunked:
                loss = summed_cross_entropy(hidden, weight, labels, bias_V=bias_V)
            else:
                logits = F.linear(hidden, weight, bias_V).float().flatten(0, 1)
                loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        found.append([loss.detach(), *torch.autograd.grad(loss / 7, (hidden, weight, bias_V))])
    tolerance = 2e-2 if autocast else 1e-5
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_label_smoothing(ignored: float) -> None:
    found = []
    for ours in (True, False):
        hidden, weight, labels = inputs(ignored)
        if ours:
            head = LanguageModelHead(D, V)
            head.weight = torch.nn.Parameter(weight.detach())
            weight = head.weight
            loss = head(hidden, labels, 0.1)
        else:
            logits = F.linear(hidden, weight).flatten(0, 1)
            loss = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=0.1)
        found.append([loss.detach(), *torch.autograd.grad(loss / 7, (hidden, weight))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_soft_cap(ignored: float) -> None:
    cap = 4.0

    def theirs(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Tensor:
        logits = cap * torch.tanh(F.linear(hidden_BTD, weight_VD) / cap)
        return F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="sum")

    def ours(*arguments: Tensor) -> Tensor:
        return summed_cross_entropy(*arguments, softcap=cap)

    pairs = zip(
        loss_and_gradients(ours, ignored, 1 / 37), loss_and_gradients(theirs, ignored, 1 / 37), strict=True
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    head = LanguageModelHead(D, V, softcap=cap)
    torch.nn.init.normal_(head.weight)
    hidden_BTD, _, _ = inputs()
    logits = head(hidden_BTD)
    torch.testing.assert_close(logits, cap * torch.tanh(F.linear(hidden_BTD, head.weight) / cap))

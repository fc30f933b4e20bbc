"""The head's chunked loss and the CPU's blockwise attention against torch's own, forward and backward.

python tests/bench/kernels.py [threads]

Prints milliseconds (the best of several turns, taken in alternation) and the ratio.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.nn.attention import attend
from llmtrain.nn.head import summed_cross_entropy

TOKENS, WIDTH, VOCABULARY = 4096, 512, 8192
BATCH, HEADS, LENGTH, HEAD_DIM = 8, 8, 512, 64
TURNS = 5


def best_milliseconds(*functions: Callable[[], None]) -> list[float]:
    best = [float("inf")] * len(functions)
    for turn in range(TURNS + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if turn > 0:
                best[i] = min(best[i], 1000 * (time.perf_counter() - start))
    return best


def losses(bf16: bool) -> list[Callable[[], None]]:
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(VOCABULARY, WIDTH))
    labels = torch.randint(0, VOCABULARY, (1, TOKENS))

    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def run(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(hidden, weight, labels) / TOKENS
        torch.autograd.grad(value, (hidden, weight))

    return [lambda: run(plain), lambda: run(summed_cross_entropy)]


def attentions(bf16: bool) -> list[Callable[[], None]]:
    dtype = torch.bfloat16 if bf16 else torch.float32
    qkv = torch.randn(BATCH, LENGTH, HEADS, 3, HEAD_DIM, dtype=dtype, requires_grad=True)

    def run(attention: Callable[..., Tensor]) -> None:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
        y = attention(q, k, v).transpose(1, 2).flatten(2)
        torch.autograd.grad(y, qkv, torch.ones_like(y))

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return [lambda: run(plain), lambda: run(attend)]


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    print(f"{'':28}{'torch, ms':>12}{'ours, ms':>12}{'ratio':>8}")
    for name, build in (("loss", losses), ("attention", attentions)):
        for bf16 in (False, True):
            theirs, ours = best_milliseconds(*build(bf16))
            label = f"{name}, {'bf16' if bf16 else 'fp32'}"
            print(f"{label:28}{theirs:12.1f}{ours:12.1f}{theirs / ours:8.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Attention as the model calls it against torch's kernel: blocks on the CPU, and documents in one line."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn import attention, attention_blocks, attention_choice, attention_kernels, upstream
from llmtrain.nn.attention import attend
from llmtrain.nn.attention_choice import AttentionCall, Kernel, choose_kernel
from llmtrain.nn.documents import Documents
from llmtrain.nn.dropout import AttentionDropout
from llmtrain.nn.initialize import initialize

B, K, G, H = 2, 2, 2, 8


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "BLOCK", 16)


def ids_of(*rows: list[int]) -> Tensor:
    """Document ids (B, T) of rows whose documents have these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def random_ids(T: int) -> Tensor:
    return torch.randint(0, 4, (B, T), generator=torch.Generator().manual_seed(0)).sort(-1).values


def seen(ids_BT: Tensor, causal: bool = True) -> Tensor:
    """(B, 1, T, T), True where the key is of the query's document and, if causal, not after it."""
    T = ids_BT.shape[1]
    not_after = torch.ones(T, T, dtype=torch.bool)
    return ((ids_BT[:, :, None] == ids_BT[:, None]) & (not_after.tril() if causal else not_after))[:, None]


def run(
    ours: bool,
    T: int,
    ids_BT: Tensor | None,
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
    causal: bool = True,
) -> list[Tensor]:
    """Attention's output and gradients, by our function or by torch's."""
    generator = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(B, T, heads, H, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (K * groups, K, K)
    )
    if ours:
        documents = None if ids_BT is None else Documents(ids_BT, causal=causal)
        y = attend(q, k, v, documents=documents, causal=causal)
    else:
        mask = None if ids_BT is None else seen(ids_BT, causal)
        is_causal = causal and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=groups > 1)
    weights = torch.randn(y.shape, generator=generator).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), weights)]


def assert_equals_torch(T: int, ids_BT: Tensor | None, groups: int = 1, causal: bool = True) -> None:
    ours, theirs = (run(which, T, ids_BT, groups=groups, causal=causal) for which in (True, False))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [2, 16, 17, 50])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch(T: int, packed: bool, groups: int, causal: bool) -> None:
    assert_equals_torch(T, random_ids(T) if packed else None, groups, causal)


@pytest.mark.parametrize(
    "rows",
    [
        ([50], [50]),  # nothing to leave out
        ([16, 32, 2], [16, 16, 18]),  # documents begin where blocks do
        ([1] * 50, [49, 1]),
        ([40, 10], [50]),
        ([20, 30], [15, 17, 18]),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_any_lengths_equal_torch(rows: tuple[list[int], ...], causal: bool) -> None:
    assert_equals_torch(50, ids_of(*rows), causal=causal)


@pytest.mark.parametrize("window", [1, 7, 16, 33, 50, 90])
@pytest.mark.parametrize(
    ("way", "packed"),
    [
        *[(way, packed) for way in ("blocks", "dropout by keys", "mask") for packed in (False, True)],
        ("cache", False),
    ],
)
def test_window(window: int, way: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients, in each way that attention goes, against torch's with a dense mask."""
    if way == "mask":
        monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", 40)
    T, first = 50, 30 if way == "cache" else 0
    ids_BT = random_ids(T) if packed else torch.zeros(B, T, dtype=torch.long)
    places_T = torch.arange(T)
    near_TT = places_T[:, None] - places_T < window
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, K, T, H, generator=generator, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, seen(ids_BT) & near_TT)[:, :, first:]
    found = attend(
        q[:, :, first:],
        k,
        v,
        documents=Documents(ids_BT) if packed else None,
        # Which keeps nearly all.
        dropout=AttentionDropout(1e-9, 0, torch.arange(B)) if way == "dropout by keys" else None,
        window=window,
    )
    weights = torch.randn(expected.shape, generator=generator)
    grads = (torch.autograd.grad(y, (q, k, v), weights) for y in (found, expected))
    for a, b in zip((found, *next(grads)), (expected, *next(grads)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["blocks", "all scores", "dropout of 0"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_soft_caps(way: str, scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2's scores, over packed documents, with a window and grouped queries."""
    T, window, cap = 50, 9, 1.5
    ids_BT = random_ids(T)
    monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", T if way == "blocks" else T - 1)
    dropout = AttentionDropout(0.0, 0, torch.arange(B)) if way == "dropout of 0" else None
    generator = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(B, heads, T, H, generator=generator).requires_grad_() for heads in (K * G, K, K))

    def plain() -> Tensor:
        scores_BNTT = cap * torch.tanh(q @ k.repeat_interleave(G, 1).mT * (scale or H**-0.5) / cap)
        near = torch.ones(T, T, dtype=torch.bool).triu(1 - window)
        probs_BNTT = scores_BNTT.masked_fill(~(seen(ids_BT) & near), -torch.inf).softmax(-1)
        return probs_BNTT @ v.repeat_interleave(G, 1)

    settings = {"documents": Documents(ids_BT), "window": window, "softcap": cap, "scale": scale}
    found, expected = attend(q, k, v, dropout=dropout, **settings), plain()
    weights = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad(y, (q, k, v), weights) for y in (found, expected)]
    for a, b in zip((found, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (found - attend(q, k, v, **{**settings, "softcap": None})).abs().max() > 0.1


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_shows_a_query_its_own_document(causal: bool) -> None:
    ids_BT = random_ids(50)
    assert torch.equal(Documents(ids_BT, causal=causal).mask, seen(ids_BT, causal))


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_dropout_hides_nothing_else(packed: bool) -> None:
    """Weights that are dropped with a probability of almost 0 are all there."""
    q, k, v = (torch.randn(B, K, 50, H) for _ in range(3))
    documents = Documents(random_ids(50), causal=False) if packed else None
    mask = seen(random_ids(50), causal=False) if packed else None
    for keys in (None, torch.arange(B)):
        dropout = AttentionDropout(1e-9, 0, keys)
        y = attend(q, k, v, documents=documents, dropout=dropout, causal=False)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_a_document_is_a_run_of_one_id() -> None:
    again, apart = torch.tensor([[3, 3, 0, 0, 3, 3]]), torch.tensor([[0, 0, 1, 1, 2, 2]])
    assert torch.equal(Documents(again).mask, Documents(apart).mask)


def test_blocks_take_no_keys_before_their_first_document() -> None:
    def places(*rows: list[int]) -> list[tuple[int, int, int, int]]:
        """(first row, last row, first key, last query) of each block."""
        blocks = Documents(ids_of(*rows)).blocks
        assert all(block.queries.stop == block.keys.stop for block in blocks)
        return [(b.rows.start, b.rows.stop - 1, b.keys.start, b.queries.stop - 1) for b in blocks]

    assert places([10, 30, 10], [16, 34]) == [
        (0, 1, 0, 15),  # in the first block all rows begin at 0
        (0, 0, 10, 31),
        (1, 1, 16, 31),
        (0, 0, 10, 47),
        (1, 1, 16, 47),
        (0, 0, 40, 49),
        (1, 1, 16, 49),
    ]
    assert places([40, 10], [50]) == [
        (0, 1, 0, 15),
        (0, 1, 0, 31),
        (0, 1, 0, 47),
        (0, 0, 40, 49),
        (1, 1, 0, 49),
    ]


def test_bf16_is_as_near_to_fp32_as_torchs() -> None:
    exact = run(False, 50, None)
    ours, theirs = (run(which, 50, None, torch.bfloat16) for which in (True, False))
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


CPU, GPU = AttentionCall("cpu", 50, 50), AttentionCall("cuda", 50, 50)
INFERENCE = replace(CPU, for_inference=True)
PACKED = replace(GPU, has_documents=True, runs_flash=True)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (CPU, "blockwise"),
        (replace(CPU, has_documents=True, has_bias=True, has_scale=True, has_softcap=True), "blockwise"),
        (replace(CPU, num_queries=2048, num_keys=2048), "blockwise"),
        (replace(CPU, num_queries=2049, num_keys=2049), "torch"),
        (replace(CPU, num_queries=2049, num_keys=2049, has_softcap=True), "all_scores"),
        (replace(CPU, num_queries=1), "torch"),
        (replace(CPU, num_queries=7), "torch"),
        (replace(CPU, num_queries=7, causal=False), "blockwise"),
        (replace(CPU, num_keys=2049, causal=False), "torch"),
        (INFERENCE, "torch"),
        (replace(INFERENCE, has_documents=True), "blockwise"),
        (replace(INFERENCE, has_documents=True, causal=False), "torch"),
        (replace(INFERENCE, has_documents=True, causal=False, num_keys=513), "blockwise"),
        (replace(INFERENCE, has_scale=True), "blockwise"),
        (replace(CPU, dropout="generator"), "torch"),
        (replace(CPU, dropout="sample_keys"), "blockwise"),
        (replace(CPU, dropout="sample_keys", num_queries=2049, num_keys=2049), "all_scores"),
        (replace(CPU, dropout="generator", has_softcap=True), "all_scores"),
        (GPU, "torch"),
        (replace(GPU, has_documents=True), "torch"),
        (replace(GPU, has_bias=True, has_scale=True), "torch"),
        (replace(GPU, has_softcap=True), "all_scores"),
        (replace(GPU, dropout="sample_keys"), "all_scores"),
        (PACKED, "by_document"),
        (replace(PACKED, num_queries=4096, num_keys=4096, causal=False), "by_document"),
        (replace(PACKED, has_scale=True), "torch"),
        (replace(PACKED, has_bias=True), "torch"),
        (replace(PACKED, dropout="generator"), "torch"),
        (replace(PACKED, dropout="sample_keys"), "all_scores"),
        (replace(PACKED, has_softcap=True), "all_scores"),
    ],
)
def test_the_kernel_of_each_call(call: AttentionCall, kernel: Kernel) -> None:
    assert choose_kernel(call) == kernel


def test_calls_are_computed_by_the_chosen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides is read off the tensors and settings of the call."""
    calls: list[AttentionCall] = []
    monkeypatch.setattr(attention, "choose_kernel", lambda call: calls.append(call) or choose_kernel(call))
    q, k = torch.randn(B, K, 7, H), torch.randn(B, K, 21, H)
    expected = F.scaled_dot_product_attention(q, k, k)
    for longest in (20, 21):
        monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", longest)
        torch.testing.assert_close(attend(q, k, k, causal=False), expected)
    attend(k, k, k, documents=Documents(random_ids(21)), dropout=AttentionDropout(0.1, 0, torch.arange(B)))
    attend(k, k, k, dropout=AttentionDropout(0.1, 0, None), softcap=2.0, scale=0.3, window=5)
    both_ways = AttentionCall("cpu", 7, 21, causal=False)
    whole = AttentionCall("cpu", 21, 21, has_documents=True)
    assert calls == [
        both_ways,
        both_ways,
        replace(whole, dropout="sample_keys"),
        replace(whole, dropout="generator", has_softcap=True, has_scale=True),
    ]


def test_dropout() -> None:
    torch.manual_seed(0)
    q = torch.randn(B, K, 50, H)
    with_dropout = torch.stack(
        [attend(q, q, q, dropout=AttentionDropout(0.5, 0, None)) for _ in range(200)]
    ).mean(0)
    assert not torch.allclose(attend(q, q, q, dropout=AttentionDropout(0.5, 0, None)), attend(q, q, q))
    torch.testing.assert_close(with_dropout, attend(q, q, q), rtol=0, atol=0.8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [[[50], [50]], [[37, 13], [50]], [[9, 3, 5, 4, 2, 8, 19], [20, 30]]])
def test_dropout_by_keys_drops_the_same_in_blocks(
    causal: bool, packed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients equal those of plain operations on all scores."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (torch.randn(B, K, 50, H, generator=generator) for _ in range(4))
    found = []
    for longest, short in ((50, 0), (50, 20), (50, 64), (49, 0)):
        monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", longest)
        monkeypatch.setattr(attention_blocks, "SHORT", short)
        documents = Documents(ids_of(*packed), causal=causal)
        dropout = AttentionDropout(0.3, 2, torch.tensor([5, 77]), first_head=1)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, documents=documents, dropout=dropout, causal=causal)
        found.append((y.detach(), *torch.autograd.grad(y, inputs, weights)))
    for others in found[:-1]:
        for a, b in zip(others, found[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_a_few_queries_get_what_all_of_them_get(causal: bool, packed: bool, window: int | None) -> None:
    if window is not None and not causal:
        return
    places = torch.tensor([[49, 3], [0, 20]])
    q, k, v = (torch.randn(B, K, 50, H) for _ in range(3))
    documents = Documents(random_ids(50), causal=causal) if packed else None
    settings = {"documents": documents, "causal": causal, "window": window}
    for keys in (None, torch.tensor([5, 77])):
        dropout, few = (
            None if keys is None else AttentionDropout(0.3, 2, keys, 0, where) for where in (None, places)
        )
        whole = attend(q, k, v, dropout=dropout, **settings)
        index = places[:, None, :, None].expand(-1, K, -1, H)
        y = attend(q.gather(2, index), k, v, dropout=few, places_BM=places, **settings)
        torch.testing.assert_close(y, whole.gather(2, index), rtol=1e-5, atol=1e-6)


def test_the_last_queries_of_more_keys() -> None:
    """As generation has them, with a cache."""
    q, k = torch.randn(B, K, 50, H), torch.randn(B, K, 50, H)
    whole = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    for T in (1, 7, 49):
        torch.testing.assert_close(attend(q[:, :, -T:], k, k), whole[:, :, -T:], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- documents in one line


class OneByOne:
    """What varlen_attn computes, a document at a time, on any device; keeps the borders it was given."""

    def __init__(self) -> None:
        self.borders: list[Tensor] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        borders: Tensor,
        key_borders: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert borders.dtype == torch.int32
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        assert max_q == max_k == borders.diff().max()
        assert key_borders is borders
        assert enable_gqa == (query.shape[1] != key.shape[1])
        self.borders.append(borders)
        outputs = []
        for start, end in pairwise(borders.tolist()):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=enable_gqa)
            outputs.append(y.transpose(0, 1))
        return torch.cat(outputs)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> OneByOne:
    """A kernel in the place of the GPU's, which no test can run."""
    one_by_one = OneByOne()
    monkeypatch.setattr(attention_kernels, "document_kernel", lambda q, k, v: one_by_one)
    return one_by_one


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("T", [2, 17, 50])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_in_one_line_equal_torch(T: int, groups: int, causal: bool, kernel: OneByOne) -> None:
    ids_BT = random_ids(T)
    ids_BT[1, -1] = -1
    assert_equals_torch(T, ids_BT, groups, causal)
    assert len(kernel.borders) == 1


def test_borders_by_hand() -> None:
    borders, longest = Documents(ids_of([3, 4], [7], [1, 1, 5])).borders
    assert borders.tolist() == [0, 3, 7, 14, 15, 16, 21]
    assert longest == 7


def test_only_packed_rows_without_dropout_are_put_in_one_line(kernel: OneByOne) -> None:
    q, documents = torch.randn(B, K, 50, H), Documents(random_ids(50))
    attend(q, q, q)
    attend(q, q, q, documents=documents, dropout=AttentionDropout(0.5, 0, None))
    attend(q, q, q, documents=documents, dropout=AttentionDropout(0.5, 0, torch.arange(B)))
    assert not kernel.borders
    attend(q, q, q, documents=documents)
    assert len(kernel.borders) == 1


def test_all_layers_of_a_forward_share_the_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a model whose layers attend by document computes what it computes with masks."""
    config = GPTConfig(
        vocab_size=23,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        positions="rope",
        max_sequence_length=50,
        init_std=0.3,
    )
    model = GPT(config)
    initialize(model, seed=1)
    tokens_BT = torch.randint(0, 23, (B, 50), generator=torch.Generator().manual_seed(1))

    def loss_and_gradients() -> list[Tensor]:
        loss = model(tokens_BT, documents_BT=random_ids(50), labels_BT=tokens_BT)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected, kernel = loss_and_gradients(), OneByOne()
    monkeypatch.setattr(attention_kernels, "document_kernel", lambda q, k, v: kernel)
    for a, b in zip(loss_and_gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(kernel.borders) == 3
    assert all(borders is kernel.borders[0] for borders in kernel.borders)


def test_an_older_kernel_gets_keys_for_each_query() -> None:
    """That of torch 2.11 has no enable_gqa."""
    documents = Documents(random_ids(50))
    q, k, v = (torch.randn(B, heads, 50, H) for heads in (K * G, K, K))

    def older(q: Tensor, k: Tensor, v: Tensor, *borders: Any, window_size: tuple[int, int]) -> Tensor:
        return OneByOne()(q, k, v, *borders, window_size=window_size, enable_gqa=False)

    found = attention_kernels.attend_by_document(upstream._repeating_heads(older), q, k, v, documents)
    torch.testing.assert_close(found, attention_kernels.attend_by_document(OneByOne(), q, k, v, documents))


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """On tensors without data: its checks, shapes and types, and those of its backward pass."""
    q, k, v = (
        torch.empty(B, 50, heads, H, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_()
        for heads in (K * G, K, K)
    )
    kernel = upstream.varlen_kernel()
    assert kernel
    y = attention_kernels.attend_by_document(kernel, q, k, v, Documents(random_ids(50)))
    assert (y.shape, y.dtype) == (q.shape, q.dtype)
    assert y.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]

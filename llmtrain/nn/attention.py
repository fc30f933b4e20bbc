"""Scaled dot-product attention: torch's kernels, and on the CPU a faster one for training.

torch's CPU kernel computes the masked upper triangle and multiplies in fp32. Blocks of queries, each
with the keys that it can see, are exact too and take plain matrix products of the inputs' type: over
forward and backward at T = 512, H = 64 they take 0.75 of its time in fp32 and 0.38 in bf16. Packed documents
of 250 tokens on average, at T = 1024, take half of what whole rows take.

Dim names: B batch, N query heads, K key-value heads, T queries, S keys, H head width; of a block, R rows,
C queries, P = R·N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from llmtrain.nn.dropout import AttentionDropout
from llmtrain.nn.linear import autocast_type, bmm, computes_in_fp32, einsum
from llmtrain.nn.upstream import softmax_backward, varlen_kernel

BLOCK = 128
"""Queries of a block: of 64, 128 and 256 the fastest."""
LONGEST = 2048
"""Beyond it the probabilities, which are kept for backward, take too much room: B·N·T²/2 elements."""


class Documents:
    """Documents packed into rows: a query sees the keys of its own, if `causal` up to itself.

    A document is a run of one id. What a kernel asks for is made once, and serves all layers.
    """

    def __init__(self, ids_BT: Tensor, *, causal: bool = True, window: int | None = None) -> None:
        """window: a query sees the last so many keys up to its own alone; for causal ones."""
        self.causal = causal
        self.window = window
        self._ids_BT = ids_BT
        self._narrowed: Documents | None = None
        self._begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        self._begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]

    @cached_property
    def starts(self) -> Tensor:
        """Place in its row of the first key that each token sees, its document's or its window's, (B, T)."""
        places_T = torch.arange(self._begins_BT.shape[1], device=self._begins_BT.device)
        starts_BT = (self._begins_BT * places_T).cummax(1).values
        return starts_BT if self.window is None else starts_BT.maximum(places_T - self.window + 1)

    def within(self, window: int) -> Documents:
        """The same, seen through a window; made once."""
        if self._narrowed is None or self._narrowed.window != window:
            self._narrowed = Documents(self._ids_BT, causal=self.causal, window=window)
        return self._narrowed

    @cached_property
    def ends(self) -> Tensor:
        """Place in its row behind the last token of each token's document, (B, T)."""
        T = self._begins_BT.shape[1]
        is_last_BT = F.pad(self._begins_BT[:, 1:], (0, 1), value=True)
        places_T = torch.arange(T, device=is_last_BT.device)
        return T - (is_last_BT.flip(1) * places_T).cummax(1).values.flip(1)

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T), True where a query may see a key."""
        T = self.starts.shape[1]
        return ~_hidden(self.starts, None if self.causal else self.ends, range(T), range(T))

    @cached_property
    def borders(self) -> tuple[Tensor, int]:
        """Where each document begins among all B·T tokens, and the end, int32 (documents + 1,); and the
        tokens of the longest. The CPU waits for a GPU here, once a forward."""
        starts = self._begins_BT.flatten().nonzero().flatten()
        borders = F.pad(starts, (0, 1), value=self._begins_BT.numel())
        return borders.to(torch.int32), int(borders.diff().max())

    @cached_property
    def blocks(self) -> list[_Block]:
        """All queries of all rows, with the keys from the first that some query sees."""
        if self.causal:
            return list(_blocks_of_documents(self.starts))
        B, T = self.starts.shape
        return list(_bidirectional_blocks(B, T, T, self))


class CrossDocuments:
    """Documents of queries and of other keys: a query sees the keys whose number is its own.

    The keys of one number stand together. A query whose number no key has, which padding is too (number
    −1), sees the last key alone: what comes of it is finite, and means nothing.
    """

    causal = False

    def __init__(self, ids_BT: Tensor, key_ids_BS: Tensor) -> None:
        self.num_keys = S = key_ids_BS.shape[1]
        own_BTS = (ids_BT[:, :, None] == key_ids_BS[:, None]) & (ids_BT >= 0)[:, :, None]
        own_BTS[..., -1] |= ~own_BTS.any(-1)
        own = own_BTS.to(torch.uint8)
        self.starts = own.argmax(-1)
        """Place of the first key that each query sees, (B, T)."""
        self.ends = S - own.flip(-1).argmax(-1)
        """Place behind the last."""

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, S), True where a query may see a key."""
        return ~_hidden(self.starts, self.ends, range(self.starts.shape[1]), range(self.num_keys))

    @cached_property
    def blocks(self) -> list[_Block]:
        """All queries of all rows, with the keys that some query sees."""
        B, T = self.starts.shape
        return list(_bidirectional_blocks(B, T, self.num_keys, self))


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    documents: Documents | CrossDocuments | None = None,
    dropout: AttentionDropout | None = None,
    causal: bool = True,
    scale: float | None = None,
    bias_NTS: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale · q·kᵀ + bias)·v, (B, N, T, H), laid out as (B, T, N, H).

    causal: a query sees the keys up to its own; the queries are the last T of the S tokens.
    documents: those of all tokens, T = S, as causal as attention is; or of queries and of other keys;
        None: a row is one.
    scale: None: 1 / sqrt(H).
    dropout: of the softmax' weights. With keys the weights are held whole, (B, N, T, S), as no kernel
        takes masks of one's own.
    window: a query sees the last so many keys up to its own alone (Mistral, arXiv:2310.06825); with causal.
    softcap: scaled scores s become softcap · tanh(s / softcap) (Gemma 2, arXiv:2408.00118), which no kernel
        of torch's takes: but for blocks on a CPU all scores are held, (B, N, T, S).
    """
    B, N, T, _ = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    mask = None
    if window is not None and window < S:
        if T < S:
            seen_TS = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
            mask = seen_TS.triu(S - T - window + 1)
        else:
            if not isinstance(documents, Documents):
                documents = Documents(torch.zeros(B, T, dtype=torch.int32, device=q_BNTH.device))
            documents = documents.within(window)
    is_plain = dropout is None and bias_NTS is None and scale is None and softcap is None
    if isinstance(documents, Documents) and is_plain:
        kernel = _varlen_kernel(q_BNTH, k_BKSH, v_BKSH)
        if kernel is not None:
            return _attend_by_document(kernel, q_BNTH, k_BKSH, v_BKSH, documents)
    fits = T > 1 and max(T, S) <= LONGEST and (T == S or not causal)
    if q_BNTH.device.type == "cpu" and fits and dropout is None:
        if N != K:
            k_BKSH, v_BKSH = (x.repeat_interleave(N // K, dim=1) for x in (k_BKSH, v_BKSH))
        if documents is not None:
            blocks = documents.blocks
        elif causal:
            blocks = list(_causal_blocks(B, T))
        else:
            blocks = list(_bidirectional_blocks(B, T, S))
        y_BNTH: Tensor = _BlockwiseAttention.apply(
            q_BNTH, k_BKSH, v_BKSH, bias_NTS, scale, softcap, blocks, torch.is_grad_enabled()
        )
        return y_BNTH
    if documents is not None:
        mask = documents.mask
    elif causal and mask is None and T > 1 and (T < S or bias_NTS is not None):
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril(S - T)
    if softcap is not None or (dropout is not None and dropout.keys is not None):
        return _attend_with_all_scores(
            q_BNTH, k_BKSH, v_BKSH, mask, dropout, causal, scale, bias_NTS, softcap
        )
    if bias_NTS is not None:
        bias_NTS = bias_NTS.to(q_BNTH.dtype)
        mask = bias_NTS[None] if mask is None else bias_NTS.masked_fill(~mask, -torch.inf)
    kernel = functools.partial(
        F.scaled_dot_product_attention,
        dropout_p=0.0 if dropout is None else dropout.p,
        # One new token sees every key; is_causal would show it the first alone.
        is_causal=causal and mask is None and T > 1,
        scale=scale,
        enable_gqa=N != K,
    )
    if not computes_in_fp32(q_BNTH):
        return kernel(q_BNTH, k_BKSH, v_BKSH, attn_mask=mask)
    dtype = autocast_type(q_BNTH)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        return kernel(q_BNTH.float(), k_BKSH.float(), v_BKSH.float(), attn_mask=mask).to(dtype)


def _attend_with_all_scores(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    mask: Tensor | None,
    dropout: AttentionDropout | None,
    causal: bool,
    scale: float | None,
    bias_NTS: Tensor | None,
    softcap: float | None,
) -> Tensor:
    N, T, H = q_BNTH.shape[1:]
    K, S = k_BKSH.shape[1:3]
    if N != K:
        k_BKSH, v_BKSH = (x.repeat_interleave(N // K, dim=1) for x in (k_BKSH, v_BKSH))
    if causal and mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BNTH.device).tril()
    q_BNTH = q_BNTH * (H**-0.5 if scale is None else scale)
    scores_BNTS = einsum("bnth,bnsh->bnts", q_BNTH, k_BKSH)
    if softcap is not None:
        scores_BNTS = softcap * torch.tanh(scores_BNTS / softcap)
    if bias_NTS is not None:
        scores_BNTS = scores_BNTS + bias_NTS.to(scores_BNTS.dtype)
    if mask is not None:
        scores_BNTS = scores_BNTS.masked_fill(~mask, -torch.inf)
    probs_BNTS = scores_BNTS.softmax(-1).to(v_BKSH.dtype)
    if dropout is not None and dropout.keys is not None:
        probs_BNTS = probs_BNTS * dropout.scaled_mask(N, T, S, probs_BNTS.dtype)
    elif dropout is not None:
        probs_BNTS = F.dropout(probs_BNTS, dropout.p)
    y_BNTH = einsum("bnts,bnsh->bnth", probs_BNTS, v_BKSH)
    return y_BNTH.transpose(1, 2).contiguous().transpose(1, 2)


# ------------------------------------------------------------------------------ documents on a GPU


def _varlen_kernel(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor) -> Callable[..., Any] | None:
    """torch's flash attention over documents that stand one behind the other, where it runs: on a GPU of
    compute capability 8.0 or more, in fp16 and bf16, for head widths that eight divides."""
    if q_BNTH.device.type != "cuda" or q_BNTH.shape[-1] % 8:
        return None
    different_heads = q_BNTH.shape[1] != k_BKTH.shape[1]
    if not can_use_flash_attention(SDPAParams(q_BNTH, k_BKTH, v_BKTH, None, 0.0, True, different_heads)):
        return None
    return varlen_kernel()


def _attend_by_document(
    kernel: Callable[..., Any], q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, documents: Documents
) -> Tensor:
    """`kernel`, which is varlen_attn or has its signature, over all rows' tokens in one line, at the cost of
    each document alone.

    This has not run on a GPU: the tests put a plain loop in the kernel's place, and give the kernel itself
    tensors without data.
    """
    B, N, T = q_BNTH.shape[:3]
    borders, longest = documents.borders
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNTH, k_BKTH, v_BKTH))
    back = -1 if documents.window is None else documents.window - 1
    window = (back, 0) if documents.causal else (-1, -1)
    gqa = k_BKTH.shape[1] != N
    y: Tensor = kernel(q, k, v, borders, borders, longest, longest, window_size=window, enable_gqa=gqa)
    return y.unflatten(0, (B, T)).transpose(1, 2)


# ------------------------------------------------------------------------------- blocks on the CPU


class _Block(NamedTuple):
    rows: slice
    queries: slice
    keys: slice
    hidden: Tensor | None
    """(R or 1, 1, C, up to S), True where a query does not see a key, for the last of the keys: all before
    are seen. None: all are."""


def _hidden(starts_RT: Tensor, ends_RT: Tensor | None, queries: range, keys: range) -> Tensor:
    """(R, 1, C, S), True where a key is before the query's document, or after it; without `ends_RT`, after
    the query itself."""
    place_C, place_S = (torch.arange(r.start, r.stop, device=starts_RT.device) for r in (queries, keys))
    starts_RC = starts_RT[:, queries.start : queries.stop]
    if ends_RT is None:
        after = place_S > place_C[:, None]
    else:
        after = place_S >= ends_RT[:, queries.start : queries.stop, None]
    return (after | (place_S < starts_RC[:, :, None]))[:, None]


def _causal_blocks(B: int, T: int) -> Iterator[_Block]:
    future_CC = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    for start in range(0, T, BLOCK):
        C = min(BLOCK, T - start)
        yield _Block(slice(0, B), slice(start, start + C), slice(0, start + C), future_CC[None, None, :C, :C])


def _blocks_of_documents(starts_BT: Tensor) -> Iterator[_Block]:
    """Each row by itself, where one has keys to leave out: what another sees says nothing of them."""
    B, T = starts_BT.shape
    for causal in _causal_blocks(B, T):
        queries = causal.queries
        firsts, lasts = starts_BT[:, queries.start].tolist(), starts_BT[:, queries.stop - 1].tolist()
        apart = [slice(b, b + 1) for b in range(B)] if any(firsts) else [causal.rows]
        for rows in apart:
            first = firsts[rows.start]
            hidden = causal.hidden
            if any(last != first for last in lasts[rows]):
                hidden = _hidden(
                    starts_BT[rows], None, range(queries.start, queries.stop), range(first, queries.stop)
                )
            yield _Block(rows, queries, slice(first, queries.stop), hidden)


def _bidirectional_blocks(
    B: int, T: int, S: int, documents: Documents | CrossDocuments | None = None
) -> Iterator[_Block]:
    """Each row by itself where documents leave out keys: another's say nothing of them."""
    for start in range(0, T, BLOCK):
        queries = slice(start, min(start + BLOCK, T))
        if documents is None:
            yield _Block(slice(0, B), queries, slice(0, S), None)
            continue
        starts_BT, ends_BT = documents.starts, documents.ends
        firsts, stops = starts_BT[:, queries].amin(1).tolist(), ends_BT[:, queries].amax(1).tolist()
        lasts, soonest = starts_BT[:, queries].amax(1).tolist(), ends_BT[:, queries].amin(1).tolist()
        for b in range(B):
            rows, hidden = slice(b, b + 1), None
            if (firsts[b], stops[b]) != (lasts[b], soonest[b]):
                places, keys = range(start, queries.stop), range(firsts[b], stops[b])
                hidden = _hidden(starts_BT[rows], ends_BT[rows], places, keys)
            yield _Block(rows, queries, slice(firsts[b], stops[b]), hidden)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BNTH: Tensor,
        k_BNTH: Tensor,
        v_BNTH: Tensor,
        bias_NTS: Tensor | None,
        scale: float | None,
        softcap: float | None,
        blocks: list[_Block],
        with_gradients: bool,
    ) -> Tensor:
        B, N, T, H = q_BNTH.shape
        ctx.scale = H**-0.5 if scale is None else scale
        q_BNTH = (q_BNTH if ctx.scale == 1 else q_BNTH * ctx.scale).contiguous()
        k_BNTH, v_BNTH = k_BNTH.contiguous(), v_BNTH.contiguous()
        y_BNTH = q_BNTH.new_empty(B, T, N, H).transpose(1, 2)
        probs, slopes = [], []
        with torch.autocast("cpu", enabled=False):
            for rows, queries, keys, hidden in blocks:
                q_PCH = q_BNTH[rows].flatten(0, 1)[:, queries]
                k_PSH, v_PSH = (x_BNTH[rows].flatten(0, 1)[:, keys] for x_BNTH in (k_BNTH, v_BNTH))
                scores_PCS = bmm(q_PCH, k_PSH.transpose(1, 2))
                if softcap is not None:
                    scores_PCS.div_(softcap).tanh_()
                    if with_gradients:
                        slopes.append(1.0 - scores_PCS.square())
                    scores_PCS.mul_(softcap)
                scores_RNCS = scores_PCS.unflatten(0, (-1, N))
                if bias_NTS is not None:
                    scores_RNCS += bias_NTS[:, queries, keys]
                if hidden is not None:
                    scores_RNCS[..., -hidden.shape[-1] :].masked_fill_(hidden, -torch.inf)
                probs_PCS = scores_PCS.softmax(-1)
                y_BNTH[rows, :, queries] = bmm(probs_PCS, v_PSH).unflatten(0, (-1, N))
                if with_gradients:
                    probs.append(probs_PCS)
        if with_gradients:
            ctx.save_for_backward(q_BNTH, k_BNTH, v_BNTH, *probs, *slopes)
            ctx.places = [block[:3] for block in blocks]
            ctx.bias = None if bias_NTS is None else (bias_NTS.shape, bias_NTS.dtype)
        return y_BNTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BNTH,) = gradients
        q_BNTH, k_BNTH, v_BNTH, *kept = ctx.saved_tensors
        probs, slopes = kept[: len(ctx.places)], kept[len(ctx.places) :]
        dtype, N = q_BNTH.dtype, q_BNTH.shape[1]
        grad_BNTH = grad_BNTH.to(dtype).contiguous()
        grad_q_BNTH = torch.empty_like(q_BNTH)
        # fp32: a key gathers from as many blocks as see it.
        grad_k_BNTH = torch.zeros(k_BNTH.shape, dtype=torch.float32)
        grad_v_BNTH = torch.zeros_like(grad_k_BNTH)
        grad_bias_NTS = None
        if ctx.bias is not None and ctx.needs_input_grad[3]:
            grad_bias_NTS = torch.zeros(ctx.bias[0], dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for probs_PCS, slopes_PCS, (rows, queries, keys) in zip_longest(probs, slopes, ctx.places):
                q_PCH, grad_PCH, grad_q_PCH = (
                    x_BNTH[rows].flatten(0, 1)[:, queries] for x_BNTH in (q_BNTH, grad_BNTH, grad_q_BNTH)
                )
                k_PSH, v_PSH, grad_k_PSH, grad_v_PSH = (
                    x_BNTH[rows].flatten(0, 1)[:, keys]
                    for x_BNTH in (k_BNTH, v_BNTH, grad_k_BNTH, grad_v_BNTH)
                )
                grad_v_PSH += bmm(probs_PCS.transpose(1, 2), grad_PCH)
                grad_probs_PCS = bmm(grad_PCH, v_PSH.transpose(1, 2))
                grad_scores_PCS = softmax_backward(grad_probs_PCS, probs_PCS, dtype)
                if grad_bias_NTS is not None:
                    grad_bias_NTS[:, queries, keys] += grad_scores_PCS.unflatten(0, (-1, N)).sum(0)
                if slopes_PCS is not None:
                    grad_scores_PCS *= slopes_PCS
                grad_q_PCH.copy_(bmm(grad_scores_PCS, k_PSH))
                grad_k_PSH += bmm(grad_scores_PCS.transpose(1, 2), q_PCH)
        if ctx.scale != 1:
            grad_q_BNTH *= ctx.scale
        if grad_bias_NTS is not None:
            grad_bias_NTS = grad_bias_NTS.to(ctx.bias[1])
        grad_k_BNTH, grad_v_BNTH = grad_k_BNTH.to(dtype), grad_v_BNTH.to(dtype)
        return grad_q_BNTH, grad_k_BNTH, grad_v_BNTH, grad_bias_NTS, None, None, None, None

"""Virtual tokens, whose vectors train: before the keys and values of each layer, or before the embeddings.

Dim names: B batch, T tokens, P virtual tokens, D hidden width, N query heads, K key-value heads, S keys, H
head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.documents import Documents
from llmtrain.nn.stages import Stage
from llmtrain.nn.transformer import KVCache


class Prefix(nn.Module):
    """Keys and values of P virtual tokens of one layer, (K, 2·P·H): a head's keys, then its values.

    A slice of whole heads is a tensor-parallel shard."""

    def __init__(self, kv_heads: int, length: int, head_dim: int) -> None:
        super().__init__()
        self.length = length
        self.weight = nn.Parameter(torch.empty(kv_heads, 2 * length * head_dim))

    def forward(self, k_BKSH: Tensor, v_BKSH: Tensor, part: int) -> tuple[Tensor, Tensor]:
        """Put the virtual ones first. part: which of the equal parts of the heads held here are given."""
        B, K, _, H = k_BKSH.shape
        held_K2PH = self.weight[part * K : (part + 1) * K].view(K, 2, self.length, H)
        first_K2PH = held_K2PH.to(k_BKSH.dtype)[None].expand(B, -1, -1, -1, -1)
        k, v = (torch.cat([first_K2PH[:, :, i], x], dim=2) for i, x in enumerate((k_BKSH, v_BKSH)))
        return k, v


class PrefixedAttention:
    """An attention function whose queries all see a prefix.

    The queries of whole rows get virtual ones too, so that each kernel sees as many queries as keys.
    """

    def __init__(self, attend: Callable[..., Tensor], prefix: Prefix) -> None:
        self._attend, self._prefix = attend, prefix
        self.part = 0
        """Which of the equal parts of the heads held here it is called with, if ranks share them."""

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        *,
        documents: Documents | None = None,
        **others: Any,
    ) -> Tensor:
        P, whole = self._prefix.length, q_BNTH.shape[2] == k_BKSH.shape[2]
        k, v = self._prefix(k_BKSH, v_BKSH, self.part)
        if not whole:  # the keys before are in a cache
            return self._attend(q_BNTH, k, v, documents=documents, **others)
        q = F.pad(q_BNTH, (0, 0, P, 0))
        documents = None if documents is None else documents.after(P)
        return self._attend(q, k, v, documents=documents, **others)[:, :, P:]


class SoftPrompt(nn.Module):
    """Vectors of P virtual tokens, (P, D)."""

    def __init__(self, length: int, hidden_size: int) -> None:
        super().__init__()
        self.length = length
        self.vectors = nn.Parameter(torch.empty(length, hidden_size))

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Put a vector where a token is virtual: −1 is the first, −2 the second."""
        is_virtual_BT1 = (tokens_BT < 0)[..., None]
        numbers_BT = (-tokens_BT - 1).clamp(min=0)
        return torch.where(is_virtual_BT1, self.vectors[numbers_BT].to(x_BTD.dtype), x_BTD)

    def before(self, tokens_BT: Tensor) -> Tensor:
        """Return the tokens with the virtual ones before them, (B, P + T)."""
        virtual_P = torch.arange(-1, -self.length - 1, -1, device=tokens_BT.device)
        return torch.cat([virtual_P.expand(len(tokens_BT), -1), tokens_BT], dim=1)


class PromptedEmbedding(nn.Embedding):
    """A token embedding that knows virtual tokens. It holds the embedding's own weight."""

    def __init__(self, embedding: nn.Embedding, prompt: SoftPrompt) -> None:
        nn.Module.__init__(self)
        vars(self).update({key: vars(embedding)[key] for key in embedding.__constants__})
        self.weight = embedding.weight
        self.prompt = prompt

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD: Tensor = self.prompt(F.embedding(tokens_BT.clamp(min=0), self.weight), tokens_BT)
        return x_BTD


def count_positions_from(model: Any, length: int) -> None:
    """Let a model count the positions of tokens from `length`, in place."""
    plain = model.context

    def context(
        tokens_BT: Tensor, *, positions_BT: Tensor | None = None, cache: KVCache | None = None, **others: Any
    ) -> Any:
        if positions_BT is None:
            past = 0 if cache is None else cache.length
            positions_BT = torch.arange(past, past + tokens_BT.shape[1], device=tokens_BT.device)[None]
        cached = {} if cache is None else {"cache": cache}
        return plain(tokens_BT, positions_BT=positions_BT + length, **cached, **others)

    model.context = context


def begin_with(model: Any, prompt: SoftPrompt) -> None:
    """Let each row of a model begin with the virtual tokens of a prompt, in place. Its inputs and outputs are
    those of the other tokens."""
    plain_context, plain_stages = model.context, model.stages

    def context(tokens_BT: Tensor, **arguments: Any) -> Any:
        if _goes_on(arguments.get("cache")):
            return plain_context(tokens_BT, **arguments)
        return plain_context(
            prompt.before(tokens_BT), **_lengthened(arguments, prompt.length, model.config.task)
        )

    def stages() -> list[Stage]:
        first, *between, last = plain_stages()
        return [
            Stage(first.modules, lambda tokens_BT, context: first.run(_fitted(tokens_BT, context), context)),
            *between,
            Stage(last.modules, lambda x_BTD, context: _own(last.run(x_BTD, context), context)),
        ]

    def _fitted(tokens_BT: Tensor, context: Any) -> Tensor:
        """Return the tokens as the context counts them."""
        has_prompt = context.num_states != tokens_BT.shape[1]
        return prompt.before(tokens_BT) if has_prompt else tokens_BT

    def _own(found: Any, context: Any) -> Any:
        """Return a result for each token without those of virtual ones."""
        is_by_token = isinstance(found, Tensor) and found.ndim == 3 and context.asked is None
        is_by_token = is_by_token and found.shape[1] == context.num_states
        return found[:, prompt.length :] if is_by_token and not _goes_on(context.cache) else found

    model.context, model.stages = context, stages
    if hasattr(model, "new_cache"):
        new_cache = model.new_cache
        model.new_cache = lambda max_length: new_cache(max_length + prompt.length)


def _goes_on(cache: KVCache | None) -> bool:
    """Return whether a row's beginning is in the cache."""
    return cache is not None and cache.length > 0


def _lengthened(arguments: dict[str, Any], length: int, task: Any) -> dict[str, Any]:
    """Return a model's arguments for rows with `length` more tokens before them."""
    found = dict(arguments)
    for key in ("documents_BT", "segments_BT"):
        if (ids_BT := found.get(key)) is not None:
            found[key] = torch.cat([ids_BT[:, :1].expand(-1, length), ids_BT], dim=1)
    if (positions_BT := found.get("positions_BT")) is not None:
        first_P = torch.arange(length, device=positions_BT.device).expand(len(positions_BT), -1)
        found["positions_BT"] = torch.cat([first_P, positions_BT + length], dim=1)
    if (asked_BM := found.get("asked_BM")) is not None:
        found["asked_BM"] = asked_BM + length
    if (lengths_B := found.get("lengths_B")) is not None:
        found["lengths_B"] = lengths_B + length
    if (labels := found.get("labels_BT")) is not None:
        if task is None or task.labels_are == "tokens":
            found["labels_BT"] = F.pad(labels, (length, 0), value=IGNORE_INDEX)
        elif task.labels_are == "positions":
            found["labels_BT"] = torch.where(labels == IGNORE_INDEX, labels, labels + length)
    return found

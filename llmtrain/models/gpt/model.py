"""GPT: one decoder for GPT-2 (Radford et al. 2019), Llama (arXiv:2302.13971, 2407.21783) and related models;
`GPTConfig` says in what they differ.

Dim names: B batch, T sequence, S keys, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.documents import Documents
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead, count_correct
from llmtrain.nn.initialize import Constant, Initializer, Normal
from llmtrain.nn.norms import make_norm
from llmtrain.nn.rotary import rotary_tables
from llmtrain.nn.stages import Stage, StagedModel
from llmtrain.nn.task_head import TaskHead, make_task_head, tokens_read
from llmtrain.nn.transformer import (
    Block,
    Context,
    KVCache,
    asked_states,
)


class GPT(StagedModel):
    """Token ids → logits, or the summed loss. `config.vocab_size` must be resolved."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.positions = (
            nn.Embedding(config.position_offset + config.max_sequence_length, D)
            if config.positions == "learned"
            else None
        )
        self.dropout = Dropout(config.dropout, -1, HIDDEN)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        if config.task is not None:
            self.head: nn.Module = make_task_head(config.task, D)
        else:
            self.head = LanguageModelHead(D, config.vocab_size, softcap=config.logit_softcap)
        self._tie()

    def stages(self) -> list[Stage]:
        """Return the steps of a forward in order: embedding, each layer, head."""
        embeddings: dict[str, nn.Module] = {"embedding": self.embedding}
        if self.positions is not None:
            embeddings["positions"] = self.positions
        return [
            Stage(embeddings, self._embed),
            *(Stage({f"blocks.{i}": block}, block) for i, block in enumerate(self.blocks)),
            Stage({"norm": self.norm, "head": self.head}, self._finish),
        ]

    def context(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: KVCache | None = None,
        dropout_keys_B: Tensor | None = None,
        last_only: bool = False,
        lengths_B: Tensor | None = None,
        with_metrics: bool = False,
        asked_BM: Tensor | None = None,
    ) -> Context:
        """Return the arguments shared by all stages. Forward then returns logits (B, T, V); with labels, the
        SUM of cross-entropy in nats, 0-d fp32.

        positions_BT: position of each token in its document; None: counted from 0, or from the length of the
            cache.
        documents_BT: document id of each token, contiguous; a token sees only its own document. None: a row
            is one document.
        labels_BT: next token at each position (already shifted), -100 where no loss is borne; with a task
            head, its labels.
        cache: keys and values of earlier tokens; forward adds these tokens to it.
        dropout_keys_B: keys from which dropout masks are generated; None: torch's generator.
        last_only: return logits of the last token only, (B, 1, V).
        lengths_B: tokens of each row, which a task head needs; it returns its own logits or loss.
        with_metrics: with labels, return sums by name: "loss" and "correct" predictions.
        asked_BM: positions whose logits are returned, (B, M, V); None: all.

        Raise ValueError if both documents and a cache are given.
        """
        T = tokens_BT.shape[1]
        past = 0 if cache is None else cache.length
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T, device=tokens_BT.device)[None]
        if documents_BT is not None and cache is not None:
            raise ValueError("documents_BT and a cache cannot be given together")
        documents = None if documents_BT is None else Documents(documents_BT)
        rotary = local_rotary = None
        if self.config.positions == "rope":
            rotary = rotary_tables(self.config, positions_BT, documents)
        if (local_theta := self.config.local_rope_theta) is not None:
            local = replace(self.config, rope_theta=local_theta, rope_scaling=None)
            local_rotary = rotary_tables(local, positions_BT, documents)
        return Context(
            positions_BT,
            rotary,
            documents,
            labels_BT,
            cache,
            dropout_keys_B,
            last_only,
            local_rotary,
            lengths_B,
            with_metrics,
            asked_BM,
            tokens_read(self.head, lengths_B) if asked_BM is None and cache is None else None,
        )

    def new_cache(self, max_length: int) -> KVCache:
        """Return an empty cache for `max_length` tokens per row."""
        return KVCache(self.config.num_layers, max_length)

    def initializers(self) -> dict[str, Initializer]:
        """Return GPT-2's initialization (Radford et al. 2019, section 2.3), for Llama-like models too.

        | parameter                              | value                                   |
        |----------------------------------------|-----------------------------------------|
        | embedding, positions, head (if untied) | N(0, init_std)                          |
        | qkv, gate, up                          | N(0, init_std)                          |
        | attention output, mlp down             | N(0, init_std / sqrt(2 · num_layers))   |
        | norm weights                           | 1, or 0 where norms add one             |
        | all biases                             | 0                                       |
        """
        config = self.config
        normal = Normal(config.init_std)
        residual = Normal(config.init_std / (2 * config.num_layers) ** 0.5)
        table: dict[str, Initializer] = {
            "embedding.weight": normal,
            "blocks.*.attention.qkv.weight": normal,
            "blocks.*.attention.output.weight": residual,
            "blocks.*.mlp.up.weight": normal,
            "blocks.*.mlp.down.weight": residual,
            "*norm.weight": Constant(0.0 if config.norm_adds_one else 1.0),
        }
        if config.positions == "learned":
            table["positions.weight"] = normal
        if config.gated_mlp:
            table["blocks.*.mlp.gate.weight"] = normal
        if config.bias or config.has_qkv_bias or config.has_output_bias:
            table["*.bias"] = Constant(0.0)
        if isinstance(self.head, TaskHead):
            table |= self.head.initializers(config.init_std, biases="*.bias" not in table)
        elif not config.tie_embeddings:
            table["head.weight"] = normal
        return table

    def _embed(self, tokens_BT: Tensor, context: Context) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        if self.config.scale_embedding:
            # Round the factor to the embedding's dtype, including bf16.
            x_BTD = x_BTD * torch.tensor(self.config.hidden_size**0.5).to(x_BTD.dtype).item()
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(context.positions + self.config.position_offset)
        return self.dropout(x_BTD, context.dropout_keys)

    def _finish(self, x_BTD: Tensor, context: Context) -> Any:
        if context.last_only:
            x_BTD = x_BTD[:, -1:]
        x_BTD = self.norm(asked_states(x_BTD, context.asked))
        if isinstance(self.head, TaskHead):
            return self.head(x_BTD, context.lengths, context.labels, context.dropout_keys)
        logits_or_loss = self.head(x_BTD, context.labels)
        if context.labels is None or not context.with_metrics:
            return logits_or_loss
        return {"loss": logits_or_loss, "correct": count_correct(self.head, x_BTD, context.labels)}

"""An LSTM language model (Zaremba et al., arXiv:1409.2329).

Dim names: B batch, T sequence, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead, TiedHeadModel, count_correct
from llmtrain.nn.initialize import Initializer, Uniform
from llmtrain.nn.task_head import TaskHead, make_task_head
from llmtrain.nn.transformer import asked_states


class LSTM(nn.LSTM):
    """`nn.LSTM` over rows. Computes in fp32 if autocast requests a low precision that this CPU has no
    kernel for, where torch would fail."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, batch_first=True)

    def forward(  # type: ignore[override]
        self, x_BTD: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if x_BTD.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or has_low_precision_kernel():
            return super().forward(x_BTD, state)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x_BTD.float(), state)


def has_low_precision_kernel() -> bool:
    """Return whether this CPU can run an LSTM in bf16; plan/machine.py determines it without torch."""
    name = "_is_mkldnn_bf16_supported"
    return hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)()


class LSTMCache:
    """Hidden and cell states after the tokens seen so far, for generation."""

    def __init__(self) -> None:
        self.length = 0
        self.states: list[tuple[Tensor, Tensor]] = []
        """(h, c) of each layer, (1, B, D) each; empty before the first token."""

    def select(self, rows_R: Tensor) -> None:
        """Keep only these rows, in this order; a row may occur several times."""
        self.states = [(h[:, rows_R], c[:, rows_R]) for h, c in self.states]

    reorder = select


class LSTMLanguageModel(TiedHeadModel):
    """Token ids → logits, or the summed loss. `config.vocab_size` must be resolved."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.dropout = Dropout(config.dropout, -1, HIDDEN)
        self.layers = nn.ModuleList(LSTM(D, D) for _ in range(config.num_layers))
        self.layer_dropouts = nn.ModuleList(
            Dropout(config.dropout, layer, HIDDEN) for layer in range(config.num_layers)
        )
        if config.task is not None:
            self.head: nn.Module = make_task_head(config.task, D)
        else:
            self.head = LanguageModelHead(D, config.vocab_size)
        self._tie()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: LSTMCache | None = None,
        dropout_keys_B: Tensor | None = None,
        last_only: bool = False,
        lengths_B: Tensor | None = None,
        with_metrics: bool = False,
        asked_BM: Tensor | None = None,
    ) -> Any:
        """Return logits (B, T, V); with labels, the SUM of cross-entropy in nats, 0-d fp32. With a task head,
        which needs lengths_B, the tokens of each row: its logits or, with labels of its task, its loss.

        positions_BT and documents_BT are accepted as by decoders, but ignored: the state flows over document
        boundaries, which the end-of-text token marks. Dropout applies between layers, never between tokens;
        masks are generated from dropout_keys_B; None: by torch's generator.
        last_only: return logits of the last token only, (B, 1, V).
        with_metrics: with labels, return sums by name: "loss" and "correct" predictions.
        asked_BM: positions whose logits are returned, (B, M, V); None: all.
        """
        before = cache.states if cache is not None and cache.states else [None] * len(self.layers)
        after = []
        x_BTD = self.dropout(self.embedding(tokens_BT), dropout_keys_B)
        for layer, dropout, state in zip(self.layers, self.layer_dropouts, before, strict=True):
            x_BTD, state = layer(x_BTD, state)
            x_BTD = dropout(x_BTD, dropout_keys_B)
            after.append(state)
        if cache is not None:
            cache.states = after
            cache.length += tokens_BT.shape[1]
        if isinstance(self.head, TaskHead):
            assert lengths_B is not None
            return self.head(x_BTD, lengths_B, labels_BT, dropout_keys_B)
        x_BTD = asked_states(x_BTD, asked_BM)
        logits_or_loss: Tensor = self.head(x_BTD[:, -1:] if last_only else x_BTD, labels_BT)
        if labels_BT is None or not with_metrics:
            return logits_or_loss
        return {"loss": logits_or_loss, "correct": count_correct(self.head, x_BTD, labels_BT)}

    def levels(self) -> list[list[str]]:
        """Return the names of modules by depth: embedding, each layer, head; see HasLevels."""
        return [["embedding"], *([f"layers.{i}"] for i in range(len(self.layers))), ["head"]]

    def new_cache(self, max_length: int) -> LSTMCache:
        """Return an empty state, whose size does not depend on the length."""
        return LSTMCache()

    def initializers(self) -> dict[str, Initializer]:
        """Return the initialization.

        | parameter                         | value                  |
        |-----------------------------------|------------------------|
        | embedding, head (if untied), LSTM | uniform ±1/sqrt(D)     |
        """
        uniform = Uniform(self.config.hidden_size**-0.5)
        table: dict[str, Initializer] = {"embedding.weight": uniform, "layers.*": uniform}
        if isinstance(self.head, TaskHead):
            of_head = self.head.initializers(0.0)
            table |= {
                name: uniform if name.endswith((".weight", ".bias")) else of_head[name] for name in of_head
            }
        elif not self.config.tie_embeddings:
            table["head.weight"] = uniform
        return table

"""BERT (Devlin et al., arXiv:1810.04805), and RoBERTa (arXiv:1907.11692) by its config.

Dim names: B batch, T sequence, M predicted tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.bert.config import BertConfig
from llmtrain.nn.documents import Documents
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead
from llmtrain.nn.initialize import Constant, Initializer, Normal
from llmtrain.nn.linear import Linear
from llmtrain.nn.stages import Stage, StagedModel
from llmtrain.nn.task_head import SeveralHeads, TaskHead, make_task_head, tokens_read
from llmtrain.nn.transformer import ACTIVATIONS, Block, Context, asked_states


@dataclass(frozen=True)
class BertContext(Context):
    """Arguments shared by all stages of a forward."""

    segments: Tensor | None = None
    """0 for tokens of text A, 1 for tokens of text B, (B, T); None: all 0."""
    pair_labels: Tensor | None = None
    """Class of each row's pair, (B,), IGNORE_INDEX if it bears no loss."""
    pair_weight: float = 1.0
    """Factor of the loss of pairs."""
    with_metrics: bool = False


class Bert(StagedModel):
    """Token ids → logits, or the summed loss. `config.vocab_size` must be resolved."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.positions = nn.Embedding(config.position_offset + config.max_sequence_length, D)
        self.segments = nn.Embedding(config.num_segments, D) if config.num_segments else None
        self.embedding_norm = nn.LayerNorm(D, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout, -1, HIDDEN)
        self.blocks = nn.ModuleList(
            Block(config.blocks, layer, norm_first=False, causal=False) for layer in range(config.num_layers)
        )
        has_pairs = config.pair_head and config.predicts_tokens
        self.pooler = Linear(D, D) if has_pairs else None
        self.pair_head = Linear(D, 2) if has_pairs else None
        if config.predicts_tokens:
            self.transform = Linear(D, D)
            self.transform_norm = nn.LayerNorm(D, eps=config.norm_eps)
            head = LanguageModelHead(D, config.vocab_size, bias=True)
            if config.task is None:
                self.head: nn.Module = head
            else:
                self.token_head = head
        if config.task is not None:
            self.head = make_task_head(config.task, D)
        self._tie()

    def stages(self) -> list[Stage]:
        """Return the steps of a forward in order: embeddings, each layer, heads."""
        embeddings: dict[str, nn.Module] = {
            "embedding": self.embedding,
            "positions": self.positions,
            "embedding_norm": self.embedding_norm,
        }
        heads: dict[str, nn.Module] = {"head": self.head}
        if self.config.task is not None and self.config.predicts_tokens:
            heads["token_head"] = self.token_head
        if self.config.predicts_tokens:
            heads = {"transform": self.transform, "transform_norm": self.transform_norm, **heads}
        if self.segments is not None:
            embeddings["segments"] = self.segments
        if self.pooler is not None and self.pair_head is not None:
            heads |= {"pooler": self.pooler, "pair_head": self.pair_head}
        return [
            Stage(embeddings, self._embed),
            *(Stage({f"blocks.{i}": block}, block) for i, block in enumerate(self.blocks)),
            Stage(heads, self._finish),
        ]

    def context(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        pair_labels_B: Tensor | None = None,
        pair_weight: float = 1.0,
        dropout_keys_B: Tensor | None = None,
        with_metrics: bool = False,
        lengths_B: Tensor | None = None,
        asked_BM: Tensor | None = None,
    ) -> BertContext:
        """Return the arguments shared by all stages. Forward then returns logits (B, T, V); with labels, the
        SUM over predicted tokens of their cross-entropy and, with pair labels, that of their row's pair, in
        nats, 0-d fp32. With the heads of several tasks: what SeveralHeads returns.

        positions_BT: position of each token in its document; None: counted from 0.
        documents_BT: document id of each token, contiguous; a token sees only its own document. Padding is a
            document of its own. None: a row is one document.
        segments_BT: 0 for tokens of text A, 1 for tokens of text B; None: all 0.
        labels_BT: original token at each masked position, IGNORE_INDEX elsewhere; of a task head, its labels.
        pair_labels_B: class of each row's pair, IGNORE_INDEX if it bears no loss; needs a pair head. A row's
            first token is [CLS].
        pair_weight: factor of the loss of pairs.
        dropout_keys_B: keys from which dropout masks are generated; None: torch's generator.
        with_metrics: with labels, return sums by name: "loss", "token_loss" of tokens alone, "correct"
            tokens, "pair_loss" of pairs alone, "pair_correct" pairs, and "pairs", their number.
        lengths_B: tokens of each row, which a task head needs; it returns its own logits or loss.
        asked_BM: without labels, positions whose logits are returned, (B, M, V); None: all.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        return BertContext(
            positions=positions_BT,
            documents=None if documents_BT is None else Documents(documents_BT, causal=False),
            labels=labels_BT,
            dropout_keys=dropout_keys_B,
            segments=segments_BT,
            pair_labels=pair_labels_B,
            pair_weight=pair_weight,
            with_metrics=with_metrics,
            lengths=lengths_B,
            asked=asked_BM,
            read=tokens_read(self.head, lengths_B),
        )

    def initializers(self) -> dict[str, Initializer]:
        """Return BERT's initialization: all weights N(0, init_std), norms 1, biases 0."""
        normal = Normal(self.config.init_std)
        table: dict[str, Initializer] = {
            "embedding.weight": normal,
            "positions.weight": normal,
            "blocks.*.attention.*.weight": normal,
            "blocks.*.mlp.*.weight": normal,
            "*norm.weight": Constant(1.0),
            "*.bias": Constant(0.0),
        }
        if isinstance(self.head, TaskHead):
            table |= self.head.initializers(self.config.init_std, biases=False)
        if self.config.predicts_tokens:
            table["transform.weight"] = normal
            if not self.config.tie_embeddings:
                table["head.weight" if self.config.task is None else "token_head.weight"] = normal
        if self.segments is not None:
            table["segments.weight"] = normal
        if self.pooler is not None:
            table |= {"pooler.weight": normal, "pair_head.weight": normal}
        return table

    def _embed(self, tokens_BT: Tensor, context: BertContext) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.positions(context.positions + self.config.position_offset)
        if self.segments is not None:
            segments_BT = torch.zeros_like(tokens_BT) if context.segments is None else context.segments
            x_BTD = x_BTD + self.segments(segments_BT)
        return self.dropout(self.embedding_norm(x_BTD), context.dropout_keys)

    def _finish(self, x_BTD: Tensor, context: BertContext) -> Tensor | dict[str, Tensor]:
        if isinstance(self.head, SeveralHeads):

            def language_model(labels_BT: Tensor, with_metrics: bool) -> dict[str, Tensor]:
                return self._sums(x_BTD, labels_BT, context, self.token_head, with_metrics)

            arguments = x_BTD, context.lengths, context.labels, context.dropout_keys
            return self.head(*arguments, language_model)
        if isinstance(self.head, TaskHead):
            assert context.lengths is not None
            return self.head(x_BTD, context.lengths, context.labels, context.dropout_keys)
        if context.labels is None:
            return self.head(self._transformed(asked_states(x_BTD, context.asked)))
        sums = self._sums(x_BTD, context.labels, context, self.head, context.with_metrics)
        return sums if context.with_metrics else sums["loss"]

    def _sums(
        self, x_BTD: Tensor, labels_BT: Tensor, context: BertContext, head: nn.Module, with_metrics: bool
    ) -> dict[str, Tensor]:
        """Return the summed loss of masked tokens and pairs under "loss", and the metrics of `context`."""
        asked_BT = labels_BT != IGNORE_INDEX
        hidden_MD, labels_M = self._transformed(x_BTD[asked_BT]), labels_BT[asked_BT]
        token_loss = head(hidden_MD, labels_M)
        loss, zero = token_loss, torch.zeros_like(token_loss)
        pair_loss, pair_correct, num_pairs = zero, zero, zero
        if self.pooler is not None and self.pair_head is not None and context.pair_labels is not None:
            pair_logits_B2 = self.pair_head(self.pooler(x_BTD[:, 0]).tanh()).float()
            losses_B = F.cross_entropy(
                pair_logits_B2, context.pair_labels, ignore_index=IGNORE_INDEX, reduction="none"
            )
            loss = loss + context.pair_weight * (losses_B * asked_BT.sum(1)).sum()
            pair_loss = losses_B.sum()
            pair_correct = (pair_logits_B2.argmax(1) == context.pair_labels).sum()
            num_pairs = (context.pair_labels != IGNORE_INDEX).sum()
        if not with_metrics:
            return {"loss": loss}
        correct = (head(hidden_MD).argmax(-1) == labels_M).sum()
        return {
            "loss": loss,
            "token_loss": token_loss,
            "correct": correct,
            "pair_loss": pair_loss,
            "pair_correct": pair_correct,
            "pairs": num_pairs,
        }

    def _transformed(self, x: Tensor) -> Tensor:
        """Transform hidden states for the head: (…, D) → (…, D)."""
        activation = ACTIVATIONS[self.config.activation]
        transformed: Tensor = self.transform_norm(activation(self.transform(x)))
        return transformed

"""XLNet (Yang et al., arXiv:1906.08237): two-stream attention over a factorization order, with the relative
positions of Transformer-XL (arXiv:1901.02860) but without its memory of previous segments.

The content stream has a hidden state for each token, the query stream one for each predicted position, which
knows the position but not the token. They are concatenated in x_BQD and share all weights.

Dim names: B batch, T tokens of a row, M predicted positions, Q = T + M hidden states, D hidden width, N
heads, H head width, P = 2T − 1 distances of two tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.nn.dropout import HIDDEN, AttentionDropout, Dropout
from llmtrain.nn.head import LanguageModelHead
from llmtrain.nn.initialize import Constant, Initializer, Normal
from llmtrain.nn.linear import Linear, einsum
from llmtrain.nn.relative import PerHead
from llmtrain.nn.stages import Stage, StagedModel
from llmtrain.nn.task_head import TaskHead, make_task_head
from llmtrain.nn.transformer import MLP, Context


@dataclass(frozen=True, kw_only=True)
class XLNetContext(Context):
    """Arguments shared by all stages of a forward."""

    distances: Tensor
    """Sinusoids of the distances T − 1 down to 1 − T, (P, D) fp32."""
    distance_ids: Tensor
    """Row of `distances` for each query and key, (B or 1, 1, Q, T)."""
    targets: Tensor | None = None
    """Positions that the query stream predicts, (B, M); None: no query stream."""
    hidden: Tensor | None = None
    """(B, 1, Q, T), True where a query does not see a key; None: all are seen."""
    sees_nothing: Tensor | None = None
    """(B, Q, 1), True where a query sees no key; None: each sees some."""
    is_other_segment: Tensor | None = None
    """(B, 1, Q, T), True where query and key are of different segments; None: no segments."""
    with_metrics: bool = False

    @property
    def num_states(self) -> int:
        """Return Q."""
        return self.distance_ids.shape[2]


class RelativeAttention(nn.Module):
    """Attention of both streams to the content stream (arXiv:1906.08237, section 2.3 and appendix A.2).

    A score is (q + u)·k + (q + w)·r, where k is a token's key and r that of its distance
    (arXiv:1901.02860, section 3.3); segments add (q + b)·s, with one s for the same segment and one for
    others (arXiv:1906.08237, section 2.5).
    """

    def __init__(self, config: XLNetConfig, layer: int) -> None:
        super().__init__()
        D, N, H = config.hidden_size, config.num_heads, config.head_width
        self.layer = layer
        self.num_heads, self.head_dim = N, H
        self.dropout = config.dropout
        self.first_head = 0
        """Index in the whole layer of the first head held here."""
        self.query = Linear(D, N * H, bias=False)
        self.key_value = Linear(D, N * 2 * H, bias=False)
        """Rows are ordered by head: its key, then its value."""
        self.position = Linear(D, N * H, bias=False)
        self.output = Linear(N * H, D, bias=False)
        self.content_bias = PerHead(N, H)
        self.position_bias = PerHead(N, H)
        self.segment_bias = PerHead(N, H) if config.has_segments else None
        self.segments = PerHead(N, 2 * H) if config.has_segments else None
        """s of each head, for keys of the query's segment and for others."""

    def forward(self, x_BQD: Tensor, context: XLNetContext) -> Tensor:
        T = context.distance_ids.shape[-1]
        q_BQNH = self._by_head(self.query(x_BQD)) * self.head_dim**-0.5
        k_BTNH, v_BTNH = self._by_head(self.key_value(x_BQD[:, :T]), 2).chunk(2, dim=-1)
        r_PNH = self._by_head(self.position(context.distances.to(x_BQD.dtype)))

        of_distances_BNQP = einsum("bqnh,pnh->bnqp", self._with(self.position_bias, q_BQNH), r_PNH)
        scores_BNQT: Tensor = _AtDistances.apply(of_distances_BNQP, context.distance_ids)
        scores_BNQT = scores_BNQT + einsum("bqnh,btnh->bnqt", self._with(self.content_bias, q_BQNH), k_BTNH)
        if (
            self.segment_bias is not None
            and self.segments is not None
            and context.is_other_segment is not None
        ):
            s_N2H = self.segments().unflatten(1, (2, -1))
            of_segments_BNQ2 = einsum("bqnh,nsh->bnqs", self._with(self.segment_bias, q_BQNH), s_N2H)
            # Only the difference matters, since a softmax ignores terms common to all keys.
            more_BNQ1 = of_segments_BNQ2.diff(dim=-1)
            is_other_B1QT = context.is_other_segment.to(more_BNQ1.dtype)
            scores_BNQT = scores_BNQT + is_other_B1QT * more_BNQ1
        if context.hidden is not None:
            # Not −∞: the softmax of a query that sees nothing would be NaN.
            scores_BNQT = scores_BNQT.masked_fill(context.hidden, torch.finfo(scores_BNQT.dtype).min)
        probs_BNQT = scores_BNQT.softmax(-1).to(v_BTNH.dtype)
        if self.training and self.dropout > 0.0:
            probs_BNQT = self._dropped(probs_BNQT, context.dropout_keys)
        y_BQD = einsum("bnqt,btnh->bqnh", probs_BNQT, v_BTNH).flatten(2)
        if context.sees_nothing is not None:
            y_BQD = y_BQD.masked_fill(context.sees_nothing, 0.0)
        return self.output(y_BQD)

    def _by_head(self, x: Tensor, vectors: int = 1) -> Tensor:
        """Reshape (…, D) to (…, N, vectors · H), for the heads held here."""
        return x.unflatten(-1, (-1, vectors * self.head_dim))

    def _with(self, bias: PerHead, q_BQNH: Tensor) -> Tensor:
        """Return scaled queries plus the scaled bias, (B, Q, N, H)."""
        return q_BQNH + bias() * self.head_dim**-0.5

    def _dropped(self, probs_BNQT: Tensor, keys_B: Tensor | None) -> Tensor:
        if keys_B is None:
            return F.dropout(probs_BNQT, self.dropout)
        dropout = AttentionDropout(self.dropout, self.layer, keys_B, self.first_head)
        N, Q, T = probs_BNQT.shape[1:]
        return probs_BNQT * dropout.scaled_mask(N, Q, T, probs_BNQT.dtype)


class _AtDistances(torch.autograd.Function):
    """(B, N, Q, P), (B or 1, 1, Q, T) → (B, N, Q, T): a `gather` that does not keep its input; indices of
    a row must be distinct."""

    @staticmethod
    def forward(ctx: Any, of_distances_BNQP: Tensor, ids_B1QT: Tensor) -> Tensor:
        B, N, _, ctx.P = of_distances_BNQP.shape
        ctx.save_for_backward(ids_B1QT)
        return of_distances_BNQP.gather(3, ids_B1QT.expand(B, N, -1, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grad_BNQT,) = gradients
        B, N, Q, _ = grad_BNQT.shape
        (ids_B1QT,) = ctx.saved_tensors
        grad_BNQP = grad_BNQT.new_zeros(B, N, Q, ctx.P)
        return grad_BNQP.scatter_(3, ids_B1QT.expand(B, N, -1, -1), grad_BNQT), None


class XLNetBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)), for both streams: post-norm."""

    def __init__(self, config: XLNetConfig, layer: int) -> None:
        super().__init__()
        self.attention = RelativeAttention(config, layer)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.blocks)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention_dropout = Dropout(config.dropout, layer, HIDDEN)
        self.mlp_dropout = Dropout(config.dropout, layer, HIDDEN + 1)

    def forward(self, x_BQD: Tensor, context: XLNetContext) -> Tensor:
        y_BQD = self.attention(x_BQD, context)
        x_BQD = self.attention_norm(x_BQD + self.attention_dropout(y_BQD, context.dropout_keys))
        return self.mlp_norm(x_BQD + self.mlp_dropout(self.mlp(x_BQD), context.dropout_keys))


class XLNet(StagedModel):
    """Token ids and a factorization order → logits of the predicted positions, or the summed loss.
    `config.vocab_size` must be resolved."""

    def __init__(self, config: XLNetConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        self.target_embedding = nn.Embedding(1, D) if config.task is None else None
        """Initial hidden state of the query stream at each position; a task head needs no query stream."""
        self.dropout = Dropout(config.dropout, -1, HIDDEN)
        self.blocks = nn.ModuleList(XLNetBlock(config, layer) for layer in range(config.num_layers))
        self.head_dropout = Dropout(config.dropout, config.num_layers, HIDDEN)
        if config.task is not None:
            self.head: nn.Module = make_task_head(config.task, D)
        else:
            self.head = LanguageModelHead(D, config.vocab_size, bias=True)
        self._tie()

    def stages(self) -> list[Stage]:
        """Return the steps of a forward in order: embeddings, each layer, head."""
        embeddings: dict[str, nn.Module] = {"embedding": self.embedding}
        if self.target_embedding is not None:
            embeddings["target_embedding"] = self.target_embedding
        return [
            Stage(embeddings, self._embed),
            *(Stage({f"blocks.{i}": block}, block) for i, block in enumerate(self.blocks)),
            Stage({"head": self.head}, self._finish),
        ]

    def context(
        self,
        tokens_BT: Tensor,
        *,
        order_BT: Tensor | None = None,
        targets_BM: Tensor | None = None,
        documents_BT: Tensor | None = None,
        segments_BT: Tensor | None = None,
        labels_BM: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
        with_metrics: bool = False,
        lengths_B: Tensor | None = None,
    ) -> XLNetContext:
        """Return the arguments shared by all stages. Forward then returns logits (B, M, V) of the query
        stream, or (B, T, V) of the content stream if there are no targets; with labels, the SUM of
        cross-entropy over predicted positions in nats, 0-d fp32.

        order_BT: rank of each token in the factorization order, not negative; tokens may share one. A token
            of the content stream sees itself and all tokens of its rank or less, a position of the query
            stream those of less. None: targets come last, all at once; without targets each token sees all.
        targets_BM: positions that the query stream predicts; one that sees no token has no context.
        documents_BT: document id of each token; a query sees only its own document. Padding is a document of
            its own. None: a row is one document.
        segments_BT: text id of each token, for a config with segments; None: no segment scores.
        labels_BM: token at each target, IGNORE_INDEX where no loss is borne; with a task head, its labels.
        dropout_keys_B: keys from which dropout masks are generated; None: torch's generator.
        with_metrics: with labels, return the loss and the number of correct predictions by name.
        lengths_B: tokens of each row, which a task head needs; it returns its own logits or loss.

        Raise ValueError for labels without targets, or for segments if the config has none.
        """
        if labels_BM is not None and targets_BM is None and self.config.task is None:
            raise ValueError("labels_BM needs targets_BM")
        if segments_BT is not None and not self.config.has_segments:
            raise ValueError("this model has no segments")
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        places_BQ = places_T[None]
        if targets_BM is not None:
            places_BQ = torch.cat([places_T.expand_as(tokens_BT), targets_BM], dim=1)
            if order_BT is None:
                order_BT = torch.zeros_like(tokens_BT).scatter(1, targets_BM, 1)
        hidden, sees_nothing = _hidden(places_BQ, order_BT, documents_BT)
        return XLNetContext(
            positions=places_T[None],
            labels=labels_BM,
            dropout_keys=dropout_keys_B,
            targets=targets_BM,
            distances=_distances(self.config, places_T),
            distance_ids=(len(places_T) - 1 - places_BQ[:, :, None] + places_T)[:, None],
            hidden=hidden,
            sees_nothing=sees_nothing if targets_BM is not None else None,
            is_other_segment=None if segments_BT is None else _differs(segments_BT, places_BQ),
            with_metrics=with_metrics,
            lengths=lengths_B,
        )

    def initializers(self) -> dict[str, Initializer]:
        """Return the initialization: all weights N(0, init_std), including those of each head; norms 1,
        biases of linear layers 0."""
        normal = Normal(self.config.init_std)
        table: dict[str, Initializer] = {
            "embedding.weight": normal,
            "blocks.*.attention.*.weight": normal,
            "blocks.*.mlp.*.weight": normal,
            "blocks.*norm.weight": Constant(1.0),
            "*.bias": Constant(0.0),
        }
        if isinstance(self.head, TaskHead):
            return table | self.head.initializers(self.config.init_std, biases=False)
        table["target_embedding.weight"] = normal
        if not self.config.tie_embeddings:
            table["head.weight"] = normal
        return table

    def _embed(self, tokens_BT: Tensor, context: XLNetContext) -> Tensor:
        x_BQD = self.embedding(tokens_BT)
        if context.targets is not None and self.target_embedding is not None:
            g_BMD = self.target_embedding(torch.zeros_like(context.targets))
            x_BQD = torch.cat([x_BQD, g_BMD], dim=1)
        return self.dropout(x_BQD, context.dropout_keys)

    def _finish(self, x_BQD: Tensor, context: XLNetContext) -> Tensor | dict[str, Tensor]:
        if isinstance(self.head, TaskHead):
            assert context.lengths is not None
            x_BQD = self.head_dropout(x_BQD, context.dropout_keys)
            return self.head(x_BQD, context.lengths, context.labels, context.dropout_keys)
        if context.targets is not None:
            x_BQD = x_BQD[:, x_BQD.shape[1] - context.targets.shape[1] :]
        x_BQD = self.head_dropout(x_BQD, context.dropout_keys)
        loss = self.head(x_BQD, context.labels)
        if context.labels is None or not context.with_metrics:
            return loss
        asked_BM = context.labels != IGNORE_INDEX
        correct = (self.head(x_BQD[asked_BM]).argmax(-1) == context.labels[asked_BM]).sum()
        return {"loss": loss, "correct": correct}


def _distances(config: XLNetConfig, places_T: Tensor) -> Tensor:
    """Return sinusoids of the distances T − 1 down to 1 − T, (P, D) fp32."""
    exponents = torch.arange(0, config.hidden_size, 2, device=places_T.device).float() / config.hidden_size
    distances_P = torch.cat([places_T.flip(0), -places_T[1:]])
    angles = distances_P[:, None].float() / 10_000.0**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _hidden(
    places_BQ: Tensor, order_BT: Tensor | None, documents_BT: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return (B, 1, Q, T), True where a query does not see a key, and (B, Q, 1), True where it sees none;
    None, None if each sees all. Queries are T tokens, followed by predicted positions, which don't see
    themselves."""
    hidden_B1QT = None
    if order_BT is not None:
        T, Q = order_BT.shape[1], places_BQ.shape[1]
        is_target_Q = torch.arange(Q, device=order_BT.device) >= T
        last_BQ = order_BT.gather(1, places_BQ.expand(len(order_BT), -1)) - is_target_Q.to(order_BT.dtype)
        hidden_B1QT = (order_BT[:, None] > last_BQ[:, :, None])[:, None]
    if documents_BT is not None:
        others_B1QT = _differs(documents_BT, places_BQ)
        hidden_B1QT = others_B1QT if hidden_B1QT is None else hidden_B1QT | others_B1QT
    if hidden_B1QT is None:
        return None, None
    return hidden_B1QT, hidden_B1QT[:, 0].all(-1, keepdim=True)


def _differs(ids_BT: Tensor, places_BQ: Tensor) -> Tensor:
    """Return (B, 1, Q, T), True where the ids of query and key differ."""
    ids_BQ = ids_BT.gather(1, places_BQ.expand(len(ids_BT), -1))
    return (ids_BQ[:, :, None] != ids_BT[:, None])[:, None]

"""A recurrent encoder-decoder with attention (Bahdanau et al., arXiv:1409.0473).

Dim names: B rows, S source tokens, T target tokens, D hidden width, E embedding width, W = 2 D width of the
encoder's states, V vocabulary. Where a row holds several pairs, each of them is a row inside the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.recurrent.cells import Cells, Reversal, State, make_cells
from llmtrain.models.recurrent_seq2seq.config import RecurrentSeq2SeqConfig
from llmtrain.models.recurrent_seq2seq.pairs import Pairs
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead, TiedHeadModel
from llmtrain.nn.initialize import Initializer, Normal, Uniform
from llmtrain.nn.linear import Linear

CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


class Source(NamedTuple):
    """What the decoder reads of a source."""

    states: Tensor
    """(B, S, W): of the forward direction, and of the reversed."""
    keys: Tensor
    """(B, S, D): the part of the attention's scores that depends on the states alone."""
    is_token: Tensor
    """(B, S) bool: False at padding."""

    def select(self, rows_R: Tensor) -> Source:
        return Source(*(part[rows_R] for part in self))


class AdditiveAttention(nn.Module):
    """Score of an encoder's state h for a decoder's state s: v · tanh(W s + U h) (appendix A.1.2)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query = Linear(hidden_size, hidden_size, bias=False)
        self.key = Linear(2 * hidden_size, hidden_size)
        self.score = nn.Parameter(torch.empty(hidden_size))

    def forward(self, state_BD: Tensor, source: Source) -> Tensor:
        """Return the context: the mean of the encoder's states, weighed by attention, (B, W)."""
        hidden_BSD = torch.tanh(self.query(state_BD)[:, None] + source.keys)
        scores_BS = (hidden_BSD @ self.score).float()
        weights_BS = scores_BS.masked_fill(~source.is_token, torch.finfo(torch.float32).min).softmax(-1)
        return (weights_BS[:, None].to(source.states.dtype) @ source.states)[:, 0]


class SourceCache:
    """An encoded source and the decoder's states after the target's tokens so far."""

    def __init__(self, source: Source, states: list[State]) -> None:
        self.length = 0
        self.source, self.states = source, states

    def select(self, rows_R: Tensor) -> None:
        """Keep only these rows, in this order; a row may occur several times."""
        self.source = self.source.select(rows_R)
        self.reorder(rows_R)

    def reorder(self, rows_R: Tensor) -> None:
        """Make row r continue row rows_R[r], which has the same source."""
        self.states = [tuple(part[:, rows_R] for part in state) for state in self.states]


class RecurrentSeq2Seq(TiedHeadModel):
    """Source and target tokens → logits of each next target token, or the summed loss. `config.vocab_size`
    must be resolved."""

    config: RecurrentSeq2SeqConfig

    def __init__(self, config: RecurrentSeq2SeqConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D, L, M = config.hidden_size, config.num_layers, config.decoder_layers
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_width)
        # One for each side, so that the masks of targets do not depend on how far sources are padded.
        self.source_dropout = Dropout(config.dropout, -1, HIDDEN)
        self.target_dropout = Dropout(config.dropout, -1, HIDDEN + 1)
        self.encoder = nn.ModuleList(map(self._cells, config.encoder_widths))
        self.reversed_encoder = nn.ModuleList(map(self._cells, config.encoder_widths))
        self.encoder_dropouts = nn.ModuleList(Dropout(config.dropout, i, HIDDEN) for i in range(L))
        self.attention = AdditiveAttention(D)
        self.bridge = Linear(D, M * D)
        first, *upper = config.decoder_widths
        self.decoder_cell = CELLS[config.cell](first, D)
        self.decoder = nn.ModuleList(map(self._cells, upper))
        self.decoder_dropouts = nn.ModuleList(Dropout(config.dropout, L + i, HIDDEN) for i in range(M))
        self.readout = Linear(config.readout_width, 2 * config.embedding_width)
        self.head = LanguageModelHead(config.embedding_width, config.vocab_size)
        self._tie()

    def _cells(self, width: int) -> Cells:
        return make_cells(self.config.cell, width, self.config.hidden_size)

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        sources_BS: Tensor | None = None,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        source_positions_BS: Tensor | None = None,
        source_documents_BS: Tensor | None = None,
        labels_BT: Tensor | None = None,
        cache: SourceCache | None = None,
        dropout_keys_B: Tensor | None = None,
        with_metrics: bool = False,
    ) -> Any:
        """Return logits (B, T, V); with labels, the SUM of cross-entropy in nats, smoothed by
        config.label_smoothing, 0-d fp32.

        tokens_BT: the decoder's input: the target, preceded by the start token.
        positions_BT, source_positions_BS: accepted as by other encoder-decoders, but ignored.
        documents_BT, source_documents_BS: number within the row of each token's pair, −1 at padding; a pair
            is read as if it stood alone. None: a row is one pair.
        labels_BT: next token at each position (already shifted), IGNORE_INDEX where no loss is borne.
        cache: from `new_cache`, instead of sources; forward adds these tokens to it.
        dropout_keys_B: keys from which dropout masks are generated; None: torch's generator.
        with_metrics: with labels, return sums by name: "loss", "token_loss" without smoothing, and
            "correct" predictions.

        Raise ValueError unless exactly one of sources and cache is given.
        """
        if (sources_BS is None) == (cache is None):
            raise ValueError("give either sources or a cache made from them")
        if cache is not None:
            x_BTE, cache.states = self._decode(tokens_BT, cache.source, cache.states, None)
            cache.length += tokens_BT.shape[1]
        else:
            assert sources_BS is not None
            x_BTE = self._of_pairs(tokens_BT, sources_BS, documents_BT, source_documents_BS, dropout_keys_B)
        if labels_BT is None:
            return self.head(x_BTE)
        loss: Tensor = self.head(x_BTE, labels_BT, self.config.label_smoothing)
        if not with_metrics:
            return loss
        asked_BT = labels_BT != IGNORE_INDEX
        hidden_ME, labels_M = x_BTE[asked_BT], labels_BT[asked_BT]
        plain = self.head(hidden_ME, labels_M) if self.config.label_smoothing > 0 else loss
        correct = (self.head(hidden_ME).argmax(-1) == labels_M).sum()
        return {"loss": loss, "token_loss": plain, "correct": correct}

    def _of_pairs(
        self,
        tokens_BT: Tensor,
        sources_BS: Tensor,
        documents_BT: Tensor | None,
        source_documents_BS: Tensor | None,
        keys_B: Tensor | None,
    ) -> Tensor:
        """Return what the head reads of each target token, (B, T, E)."""
        if documents_BT is None or source_documents_BS is None:
            lengths_B = _lengths(sources_BS, source_documents_BS)
            return self._of_single_pairs(tokens_BT, sources_BS, lengths_B, keys_B)
        per_row = int(torch.maximum(documents_BT.max(), source_documents_BS.max())) + 1
        if per_row <= 1:
            lengths_B = _lengths(sources_BS, source_documents_BS)
            return self._of_single_pairs(tokens_BT, sources_BS, lengths_B, keys_B)
        pairs = Pairs(documents_BT, per_row)
        target, source = pairs.side(documents_BT), pairs.side(source_documents_BS)
        keys_P = None if keys_B is None else pairs.keys(keys_B)
        return target.together(
            self._of_single_pairs(target.apart(tokens_BT), source.apart(sources_BS), source.lengths_P, keys_P)
        )

    def _of_single_pairs(
        self, tokens_BT: Tensor, sources_BS: Tensor, lengths_B: Tensor, keys_B: Tensor | None
    ) -> Tensor:
        source, states = self._encode(sources_BS, lengths_B, keys_B)
        return self._decode(tokens_BT, source, states, keys_B)[0]

    def _encode(
        self, sources_BS: Tensor, lengths_B: Tensor, keys_B: Tensor | None
    ) -> tuple[Source, list[State]]:
        """Return what the decoder reads, and the states that its layers begin from: tanh(W h + b) of the
        reversed direction's last state h (appendix A.2.2), and of an LSTM cells of 0."""
        D, S = self.config.hidden_size, sources_BS.shape[1]
        reverse = Reversal(lengths_B, S)
        x_BSW = self.source_dropout(self.embedding(sources_BS), keys_B)
        sides = zip(self.encoder, self.reversed_encoder, self.encoder_dropouts, strict=True)
        for forwards, backwards, dropout in sides:
            from_end = reverse(backwards(reverse(x_BSW))[0])
            x_BSW = dropout(torch.cat((forwards(x_BSW)[0], from_end), dim=-1), keys_B)
        first_BMD = self.bridge(x_BSW[:, 0, D:]).tanh().unflatten(-1, (-1, D))
        states: list[State] = []
        for hidden_BD in first_BMD.unbind(1):
            hidden = hidden_BD[None].contiguous()
            states.append((hidden, torch.zeros_like(hidden)) if self.config.cell == "lstm" else (hidden,))
        is_token_BS = torch.arange(S, device=lengths_B.device) < lengths_B[:, None]
        return Source(x_BSW, self.attention.key(x_BSW), is_token_BS), states

    def _decode(
        self, tokens_BT: Tensor, source: Source, before: list[State], keys_B: Tensor | None
    ) -> tuple[Tensor, list[State]]:
        """Return what the head reads of each target token, (B, T, E), and the states after the last."""
        embedded_BTE = self.target_dropout(self.embedding(tokens_BT), keys_B)
        state = tuple(part[0] for part in before[0])
        states, contexts = [], []
        for embedded_BE in embedded_BTE.unbind(1):
            context_BW = self.attention(state[0], source)
            read = torch.cat((embedded_BE, context_BW.to(embedded_BE.dtype)), dim=-1)
            step: Any = self.decoder_cell(read, state if len(state) > 1 else state[0])
            state = step if isinstance(step, tuple) else (step,)
            states.append(state[0])
            contexts.append(context_BW)
        after: list[State] = [tuple(part[None] for part in state)]
        x_BTD = self.decoder_dropouts[0](torch.stack(states, dim=1), keys_B)
        upper = zip(self.decoder, self.decoder_dropouts[1:], before[1:], strict=True)
        for layer, dropout, first in upper:
            x_BTD, last = layer(x_BTD, first)
            x_BTD = dropout(x_BTD, keys_B)
            after.append(last)
        contexts_BTW = torch.stack(contexts, dim=1)
        read_BT = torch.cat((x_BTD, embedded_BTE, contexts_BTW.to(x_BTD.dtype)), dim=-1)
        # Maxout over pairs of units (appendix A.2.2).
        return self.readout(read_BT).unflatten(-1, (-1, 2)).amax(-1), after

    @torch.no_grad()
    def new_cache(
        self, max_length: int, *, sources_BS: Tensor, source_documents_BS: Tensor | None = None
    ) -> SourceCache:
        """Encode the sources and return a cache, whose size does not depend on the length of targets.

        source_documents_BS: 0 for tokens, −1 for the padding after them; None: no padding.
        """
        return SourceCache(*self._encode(sources_BS, _lengths(sources_BS, source_documents_BS), None))

    def levels(self) -> list[list[str]]:
        """Return the names of modules by depth: embedding, layers of the encoder, those of the decoder, head;
        see HasLevels."""
        encoder = [[f"encoder.{i}", f"reversed_encoder.{i}"] for i in range(self.config.num_layers)]
        decoder = [[f"decoder.{i}"] for i in range(len(self.decoder))]
        first = ["attention", "bridge", "decoder_cell"]
        return [["embedding"], *encoder, first, *decoder, ["readout", "head"]]

    def initializers(self) -> dict[str, Initializer]:
        """Return the initialization.

        | parameter                            | value                  |
        |--------------------------------------|------------------------|
        | embedding, head (if untied)          | N(0, 1/√E)             |
        | cells, attention, bridge, readout    | uniform ±1/√D          |
        """
        uniform = Uniform(self.config.hidden_size**-0.5)
        of_tokens = Normal(self.config.embedding_width**-0.5)
        patterns = (
            "encoder.*",
            "reversed_encoder.*",
            "attention.*",
            "bridge.*",
            "decoder_cell.*",
            "readout.*",
        )
        table: dict[str, Initializer] = {"embedding.weight": of_tokens, **dict.fromkeys(patterns, uniform)}
        if len(self.decoder):
            table["decoder.*"] = uniform
        if not self.config.tie_embeddings:
            table["head.weight"] = of_tokens
        return table


def _lengths(sources_BS: Tensor, documents_BS: Tensor | None) -> Tensor:
    """Return the tokens of each source that is a row of its own, (B)."""
    if documents_BS is None:
        return torch.full((len(sources_BS),), sources_BS.shape[1], device=sources_BS.device)
    return (documents_BS >= 0).sum(1)

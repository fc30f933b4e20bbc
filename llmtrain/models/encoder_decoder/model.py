"""The encoder-decoder: the Transformer (Vaswani et al., arXiv:1706.03762), T5 (arXiv:1910.10683) and BART
(arXiv:1910.13461) by config.

Dim names: B batch, S source tokens, T target tokens, U = S + T positions of both, M targets that bear a
loss, D hidden width, H head width, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.layers import DecoderBlock, EncoderBlock, PairContext, SourceCache, sides
from llmtrain.nn.documents import CrossDocuments, Documents
from llmtrain.nn.dropout import HIDDEN, Dropout
from llmtrain.nn.head import LanguageModelHead
from llmtrain.nn.initialize import Constant, Initializer, Normal, NormalByRow
from llmtrain.nn.norms import make_norm
from llmtrain.nn.relative import PerHead, RelativePositions
from llmtrain.nn.stages import Stage, StagedModel
from llmtrain.nn.task_head import TaskHead, make_task_head
from llmtrain.nn.transformer import Block, Context


class EncoderDecoder(StagedModel):
    """Source and target ids → logits of the targets, or the summed loss. `config.vocab_size` must be
    resolved."""

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D, M = config.hidden_size, config.decoder_layers
        relative = None
        if config.positions == "relative":
            relative = RelativePositions(config.relative_buckets, config.relative_max_distance)
        self.embedding = nn.Embedding(config.vocab_size, D)
        has_decoder = config.has_decoder
        self.source_positions = _learned_positions(config)
        self.target_positions = _learned_positions(config) if has_decoder else None
        self.source_norm = make_norm(config.blocks) if config.embedding_norm else None
        self.target_norm = make_norm(config.blocks) if config.embedding_norm and has_decoder else None
        # One for each side, so that the masks of targets do not depend on how far sources are padded.
        self.source_dropout = Dropout(config.dropout, -1, HIDDEN)
        self.target_dropout = Dropout(config.dropout, -1, HIDDEN + 1)
        self.encoder = nn.ModuleList(
            EncoderBlock(config, layer, relative) for layer in range(config.num_layers)
        )
        self.encoder_norm = make_norm(config.blocks) if config.norm_first else None
        self.decoder = nn.ModuleList(DecoderBlock(config, layer, relative) for layer in range(M))
        self.decoder_norm = make_norm(config.blocks) if config.norm_first and has_decoder else None
        if config.task is not None:
            self.head: nn.Module = make_task_head(config.task, D)
        else:
            self.head = LanguageModelHead(D, config.vocab_size, bias=config.head_bias)
        self._tie()

    @property
    def blocks(self) -> list[Block]:
        """Return all layers in order."""
        return cast(list[Block], [*self.encoder, *self.decoder])

    def stages(self) -> list[Stage]:
        """Return the steps of a forward in order: embeddings of both sides, each layer, head. The
        encoder's final norm is part of its last layer's step."""
        embeddings: dict[str, nn.Module] = {"embedding": self.embedding}
        for name in ("source_positions", "target_positions", "source_norm", "target_norm"):
            if (module := getattr(self, name)) is not None:
                embeddings[name] = module
        *encoder, last = [Stage({f"encoder.{i}": block}, block) for i, block in enumerate(self.encoder)]
        heads: dict[str, nn.Module] = {"head": self.head}
        if self.encoder_norm is not None:
            last = Stage({**last.modules, "encoder_norm": self.encoder_norm}, self._finish_encoder)
        if self.decoder_norm is not None:
            heads["decoder_norm"] = self.decoder_norm
        return [
            Stage(embeddings, self._embed),
            *encoder,
            last,
            *(Stage({f"decoder.{i}": block}, block) for i, block in enumerate(self.decoder)),
            Stage(heads, self._finish),
        ]

    def context(
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
        lengths_B: Tensor | None = None,
    ) -> PairContext:
        """Return the arguments shared by all stages. Forward then returns logits (B, T, V); with labels, the
        SUM of cross-entropy in nats, smoothed by config.label_smoothing, 0-d fp32.

        tokens_BT: the decoder's input: the target, preceded by the start token.
        positions_BT, source_positions_BS: position of each token in its text; None: counted from 0, or from
            the length of the cache.
        documents_BT, source_documents_BS: number within the row of each token's pair, −1 at padding; a token
            sees only its own pair. None: a row is one pair.
        labels_BT: next token at each position (already shifted), IGNORE_INDEX where no loss is borne.
        cache: from `new_cache`, instead of sources; forward adds these tokens to it.
        dropout_keys_B: keys from which dropout masks are generated; None: torch's generator.
        with_metrics: with labels, return sums by name: "loss", "token_loss" without smoothing, and
            "correct" predictions.
        lengths_B: tokens of each row, which a task head needs; it returns its own logits or loss. Tokens and
            documents are then those of a text: the encoder reads it, and the decoder reads it again, shifted
            to the right, so that its state at the end token has seen all of the text.

        Raise ValueError unless exactly one of sources and cache is given, which a task needs neither of.
        """
        if self.config.task is not None:
            return self._context_of_text(tokens_BT, documents_BT, labels_BT, dropout_keys_B, lengths_B)
        if (sources_BS is None) == (cache is None):
            raise ValueError("give either sources or a cache made from them")
        past = 0 if cache is None else cache.length
        if positions_BT is None:
            T = tokens_BT.shape[1]
            positions_BT = torch.arange(past, past + T, device=tokens_BT.device)[None]
        if cache is not None:
            source_documents_BS = cache.source_documents
        crossing = None
        if documents_BT is not None or source_documents_BS is not None:
            ids_BT = torch.zeros_like(tokens_BT) if documents_BT is None else documents_BT
            ids_BS = source_documents_BS
            if ids_BS is None:
                assert sources_BS is not None
                ids_BS = torch.zeros_like(sources_BS)
            crossing = CrossDocuments(ids_BT, ids_BS)
        encoder = None
        if sources_BS is not None:
            encoder = self._encoder_context(
                sources_BS, source_positions_BS, source_documents_BS, dropout_keys_B
            )
        return PairContext(
            positions=positions_BT,
            documents=None if documents_BT is None else Documents(documents_BT),
            labels=labels_BT,
            cache=cache,
            dropout_keys=dropout_keys_B,
            sources=sources_BS,
            encoder=encoder,
            crossing=crossing,
            with_metrics=with_metrics,
        )

    def _context_of_text(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        labels: Tensor | None,
        dropout_keys_B: Tensor | None,
        lengths_B: Tensor | None,
    ) -> PairContext:
        """Return the context of a text that both sides read, or, without a decoder, the encoder alone."""
        encoder = self._encoder_context(tokens_BT, None, documents_BT, dropout_keys_B)
        has_decoder = self.config.has_decoder
        documents_BT = documents_BT if has_decoder else None
        return PairContext(
            positions=encoder.positions if has_decoder else encoder.positions[:, :0],
            documents=None if documents_BT is None else Documents(documents_BT),
            labels=labels,
            dropout_keys=dropout_keys_B,
            sources=tokens_BT,
            encoder=encoder,
            crossing=None if documents_BT is None else CrossDocuments(documents_BT, documents_BT),
            lengths=lengths_B,
        )

    def _decoder_input(self, tokens_BT: Tensor) -> Tensor:
        """Return a text shifted to the right behind the start token; nothing without a decoder."""
        if not self.config.has_decoder:
            return tokens_BT[:, :0]
        assert self.config.start_id is not None
        start_B1 = torch.full_like(tokens_BT[:, :1], self.config.start_id)
        return torch.cat((start_B1, tokens_BT[:, :-1]), dim=1)

    @torch.no_grad()
    def new_cache(
        self,
        max_length: int,
        *,
        sources_BS: Tensor,
        source_documents_BS: Tensor | None = None,
    ) -> SourceCache:
        """Encode the sources and return a cache for `max_length` target tokens per row.

        source_documents_BS: 0 for tokens, −1 for the padding after them; None: no padding.
        """
        nothing_B0 = sources_BS[:, :0]
        context = PairContext(
            positions=nothing_B0,
            sources=sources_BS,
            encoder=self._encoder_context(sources_BS, None, source_documents_BS, None),
        )
        x_BSD = self._embed(nothing_B0, context)
        for stage in self.stages()[1 : 1 + self.config.num_layers]:
            x_BSD = stage.run(x_BSD, context)
        decoder = cast(list[DecoderBlock], list(self.decoder))
        keys_values = [block.cross_attention.keys_and_values(x_BSD) for block in decoder]
        return SourceCache(max_length, keys_values, source_documents_BS)

    def initializers(self) -> dict[str, Initializer]:
        """Return the initialization by `init_std`; if it is null, layers preserve the scale of their inputs
        (T5's initialization; for square matrices, the variance of the Transformer's Glorot initialization).

        | parameter                         | with init_std   | without                                   |
        |-----------------------------------|-----------------|-------------------------------------------|
        | embedding                         | N(0, std)       | N(0, 1), divided by its scale             |
        | positions                         | N(0, std)       | N(0, 1)                                   |
        | biases by distance                | N(0, std)       | N(0, 1/√D)                                |
        | other matrices                    | N(0, std)       | N(0, 1/√inputs)                           |
        | queries of unscaled attention     | N(0, std)       | N(0, 1/√(inputs · H))                     |
        | untied head                       | N(0, std)       | N(0, 1/√D)                                |
        | norms, biases                     | 1, 0            | 1, 0                                      |
        """
        config = self.config
        D, H = config.hidden_size, config.head_width

        def normal(std: float) -> Normal:
            return Normal(std if config.init_std is None else config.init_std)

        read = normal(D**-0.5)
        query, packed = read, cast(Initializer, read)
        if not config.scale_attention and config.init_std is None:
            query = Normal((D * H) ** -0.5)
            packed = NormalByRow((query.std, read.std, read.std), H)
        tied_as_is = config.tie_embeddings and not config.scale_logits
        table: dict[str, Initializer] = {
            "embedding.weight": normal(D**-0.5 if config.scale_embedding or tied_as_is else 1.0),
            "*.attention.qkv.weight": packed,
            "*attention.output.weight": normal((config.num_heads * H) ** -0.5),
            "*.mlp.up.weight": read,
            "*.mlp.down.weight": normal(config.mlp_width**-0.5),
            "*norm.weight": Constant(1.0),
        }
        if config.has_decoder:
            table["decoder.*.cross_attention.query.weight"] = query
            table["decoder.*.cross_attention.key_value.weight"] = read
        if config.positions == "learned":
            table["*_positions.weight"] = normal(1.0)
        if config.positions == "relative":
            table["*.attention.relative.weight"] = read
        if config.gated_mlp:
            table["*.mlp.gate.weight"] = read
        if config.bias or (config.head_bias and config.task is None):
            table["*.bias"] = Constant(0.0)
        if isinstance(self.head, TaskHead):
            table |= self.head.initializers(read.std, biases=not config.bias)
        elif not config.tie_embeddings:
            table["head.weight"] = read
        return table

    def _tie(self) -> None:
        super()._tie()
        for layers in (self.encoder, self.decoder):
            tables = [cast(Block, layer).attention.relative for layer in layers]
            for table in tables[1:]:
                if table is not None:
                    table.weight = cast(PerHead, tables[0]).weight

    def _encoder_context(
        self,
        sources_BS: Tensor,
        positions_BS: Tensor | None,
        documents_BS: Tensor | None,
        dropout_keys_B: Tensor | None,
    ) -> Context:
        if positions_BS is None:
            positions_BS = torch.arange(sources_BS.shape[1], device=sources_BS.device)[None]
        return Context(
            positions=positions_BS,
            documents=None if documents_BS is None else Documents(documents_BS, causal=False),
            dropout_keys=dropout_keys_B,
        )

    def _embed(self, tokens_BT: Tensor, context: PairContext) -> Tensor:
        if self.config.task is not None:
            tokens_BT = self._decoder_input(tokens_BT)
        ids_BU = tokens_BT if context.sources is None else torch.cat((context.sources, tokens_BT), dim=1)
        x_BUD = self.embedding(ids_BU)
        if self.config.scale_embedding:
            x_BUD = x_BUD * self.config.hidden_size**0.5
        source_BSD, target_BTD = sides(x_BUD, context)
        keys_B = context.dropout_keys
        target_BTD = self._placed(target_BTD, context.positions, self.target_positions, self.target_norm)
        target_BTD = self.target_dropout(target_BTD, keys_B)
        if context.encoder is not None:
            places_BS = context.encoder.positions
            source_BSD = self._placed(source_BSD, places_BS, self.source_positions, self.source_norm)
        return torch.cat((self.source_dropout(source_BSD, keys_B), target_BTD), dim=1)

    def _placed(
        self, x_BTD: Tensor, places_BT: Tensor, learned: nn.Module | None, norm: nn.Module | None
    ) -> Tensor:
        """Add positions to the embeddings of one side."""
        if learned is not None:
            x_BTD = x_BTD + learned(places_BT + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            x_BTD = x_BTD + sinusoids(places_BT, self.config.hidden_size).to(x_BTD.dtype)
        return x_BTD if norm is None else norm(x_BTD)

    def _finish_encoder(self, x_BUD: Tensor, context: PairContext) -> Tensor:
        x_BUD = self.encoder[-1](x_BUD, context)
        if context.encoder is None or self.encoder_norm is None:
            return x_BUD
        source_BSD, target_BTD = sides(x_BUD, context)
        return torch.cat((self.encoder_norm(source_BSD), target_BTD), dim=1)

    def _finish(self, x_BUD: Tensor, context: PairContext) -> Tensor | dict[str, Tensor]:
        x_BTD = sides(x_BUD, context)[1 if self.config.has_decoder else 0]
        if self.decoder_norm is not None:
            x_BTD = self.decoder_norm(x_BTD)
        if isinstance(self.head, TaskHead):
            assert context.lengths is not None
            return self.head(x_BTD, context.lengths, context.labels, context.dropout_keys)
        if self.config.scale_logits:
            x_BTD = x_BTD * self.config.hidden_size**-0.5
        if context.labels is None:
            return self.head(x_BTD)
        loss: Tensor = self.head(x_BTD, context.labels, self.config.label_smoothing)
        if not context.with_metrics:
            return loss
        asked_BT = context.labels != IGNORE_INDEX
        hidden_MD, labels_M = x_BTD[asked_BT], context.labels[asked_BT]
        plain = self.head(hidden_MD, labels_M) if self.config.label_smoothing > 0 else loss
        correct = (self.head(hidden_MD).argmax(-1) == labels_M).sum()
        return {"loss": loss, "token_loss": plain, "correct": correct}


def sinusoids(places_BT: Tensor, width: int) -> Tensor:
    """Return sin(position / 10000^(2i/D)) at dim 2i and its cosine at 2i + 1, (B, T, D) fp32
    (arXiv:1706.03762, section 3.5)."""
    exponents = torch.arange(0, width, 2, device=places_BT.device).float() / width
    angles = places_BT[..., None].float() * 10_000.0**-exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


def _learned_positions(config: Seq2SeqConfig) -> nn.Embedding | None:
    if config.positions != "learned":
        return None
    assert config.max_sequence_length is not None
    return nn.Embedding(config.position_offset + config.max_sequence_length, config.hidden_size)

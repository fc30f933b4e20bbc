"""An LSTM language model (Zaremba et al., arXiv:1409.2329).

Dim names: B batch, T sequence, D hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from llmtrain.models.config import LSTMConfig
from llmtrain.models.head import LanguageModelHead, TiedHeadModel
from llmtrain.models.initialize import Initializer, Uniform


class LSTMCache:
    """The hidden and cell state after the tokens seen so far, for generation."""

    def __init__(self) -> None:
        self.length = 0
        self.state: tuple[Tensor, Tensor] | None = None
        """h and c, (L, B, D) each; None before the first token."""


class LSTMLanguageModel(TiedHeadModel):
    """Token ids → logits, or → the summed loss. `config.vocab_size` must be resolved."""

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        self.config = config
        D = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, D)
        between_layers = config.dropout if config.num_layers > 1 else 0.0
        self.lstm = nn.LSTM(D, D, config.num_layers, batch_first=True, dropout=between_layers)
        self.dropout = nn.Dropout(config.dropout)
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
    ) -> Tensor:
        """Logits (B, T, V); with labels the SUM of cross-entropy in nats, 0-d fp32.

        positions_BT and documents_BT are taken for the decoders' sake and not used: the state flows
        over document boundaries, which the end-of-text token marks.
        """
        state = None if cache is None else cache.state
        x_BTD, state = self.lstm(self.dropout(self.embedding(tokens_BT)), state)
        if cache is not None:
            cache.state = state
            cache.length += tokens_BT.shape[1]
        return self.head(self.dropout(x_BTD), labels_BT)

    def new_cache(self, max_length: int) -> LSTMCache:
        """An empty state; it takes the same room at any length."""
        return LSTMCache()

    def initializers(self) -> dict[str, Initializer]:
        """| parameter                         | value                  |
        |-----------------------------------|------------------------|
        | embedding, head (if untied), LSTM | uniform ±1/sqrt(D)     |
        """
        uniform = Uniform(self.config.hidden_size**-0.5)
        table: dict[str, Initializer] = {"embedding.weight": uniform, "lstm.*": uniform}
        if not self.config.tie_embeddings:
            table["head.weight"] = uniform
        return table

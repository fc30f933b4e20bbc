"""Config of a GPT, with its parameter and FLOP counts. Free of torch.

Counts are exact: tests compare `parameter_count()` with the module on the meta device for each preset.

Dim names: V vocabulary, D hidden_size, N num_heads, H head_dim, T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.adapt.config import Adaptation
from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.nn.layer_config import LayerConfig, OfLayers
from llmtrain.nn.model_config import Row
from llmtrain.nn.task_config import TaskHeadConfig


@dataclass(frozen=True)
class GPTConfig(LayerConfig, OfLayers):
    """A causal decoder; covers GPT-2 (Radford et al. 2019), OPT (arXiv:2205.01068), Llama (arXiv:2302.13971,
    2407.21783), Mistral (arXiv:2310.06825), Qwen 2 and 3 (arXiv:2407.10671, 2505.09388), SmolLM, Gemma 1 to 3
    (arXiv:2403.08295, 2408.00118, 2503.19786) and OLMo 2 and 3 (arXiv:2501.00656, 2512.13961)."""

    family: Literal["gpt"] = "gpt"
    """Decoder."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the corpus' vocabulary."""
    max_sequence_length: int = 1024
    """Maximum sequence length, in tokens; the number of learned positions."""
    position_offset: int = 0
    """Learned positions begin at this index, and as many rows before it are not used: 2 in OPT."""
    scale_embedding: bool = False
    """Multiply embeddings by sqrt(hidden_size) (Gemma)."""
    logit_softcap: float | None = None
    """Soft cap of logits: cap · tanh(logits / cap) (Gemma 2); null: none."""
    tie_embeddings: bool = True
    """The head shares the token embedding's weight."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    task: TaskHeadConfig | None = field(default=None, metadata={INTERNAL: True})
    """Head of a fine-tuning task, in place of the language model's; set by the objective."""
    adaptation: Adaptation | None = field(default=None, metadata={INTERNAL: True})
    """What fine-tuning adds to the layers; set by the method."""

    @property
    def blocks(self) -> LayerConfig:
        """Return the config of its layers: itself."""
        return self

    def problems(self) -> Iterator[Problem]:
        length = self.max_sequence_length
        yield from require(length >= 1, "max_sequence_length", length, "1 or more")
        offset = self.position_offset
        yield from require(offset >= 0, "position_offset", offset, "0 or more")
        yield from LayerConfig.problems(self)
        yield from self.vocabulary_problems()
        cap = self.logit_softcap
        yield from require(cap is None or cap > 0, "logit_softcap", cap, "more than 0, or null")

    def _position_count(self) -> int:
        """Return the rows of the table of learned positions."""
        return self.max_sequence_length + self.position_offset if self.positions == "learned" else 0

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return the parameters of each step of a forward (embedding, each layer, norm with head) on one
        of `tensor` ranks, with the vocabulary padded to a multiple of it. A tied head is counted in the
        first and the last."""
        vocabulary = -(-self._vocab() // tensor) * self.hidden_size
        positions = self._position_count() * self.hidden_size
        return [
            vocabulary + positions,
            *[self.layer_parameter_count(tensor)] * self.num_layers,
            self._norm_parameter_count() + self.head_parameter_count(tensor),
        ]

    def largest_parameter_count(self, tensor: int = 1) -> int:
        """Return the elements of the largest single parameter on one of `tensor` ranks."""
        positions = self._position_count() * self.hidden_size
        return max(self.largest_layer_parameter_count(tensor), self.embedding_count(tensor), positions)

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per token: 6 per weight of a matrix, and attention's 12 · N ·
        H · S per layer for the S keys that a token sees on average, T/2 in the causal triangle (PaLM,
        arXiv:2204.02311, appendix B)."""
        sequence_length, attention_width = row.tokens, self.num_heads * self.head_width
        share = 1.0 if self.task is None else row.predicted / row.tokens
        matrices = self.num_layers * self.layer_matrix_count() + share * self.head_matrix_count()
        keys = 0.0
        for layer in range(self.num_layers):
            window = min(self.window_of(layer) or sequence_length, sequence_length)
            keys += window - window**2 / (2 * sequence_length)
        return 6.0 * matrices + 12.0 * attention_width * keys

"""Base of model configs, with the counts that plans and reports need. Free of torch.

Dim names: V vocabulary, D hidden_size, L num_layers, T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llmtrain.config import Kinds, require
from llmtrain.errors import Problem
from llmtrain.nn.task_config import TaskHeadConfig

if TYPE_CHECKING:
    from llmtrain.nn.layer_config import LayerConfig
    from llmtrain.nn.rope_config import RopeScaling


@dataclass(frozen=True)
class Row:
    """Token counts of one row of a batch as a model sees it."""

    tokens: int
    """Tokens that the model reads and that throughput counts; in an encoder-decoder, source tokens."""
    target: int = 0
    """Tokens that the decoder of an encoder-decoder reads."""
    predicted: float = 0.0
    """Mean number of tokens whose labels bear a loss."""
    whole_logits: bool = False
    """Whether the objective computes its loss from the logits of all tokens, held at once."""


class ModelConfig(Kinds):
    """Base of all model configs: frozen dataclasses with a `family`, and exact parameter counts.

    A forward pass consists of steps (embedding, each layer, head), which pipeline stages divide; a model
    that cannot be divided is a single step.
    """

    family: str
    dropout: float
    task: TaskHeadConfig | None = None
    """The head of a fine-tuning task, in place of the model's own; set by the objective."""
    max_sequence_length: int | None = None
    """Maximum sequence length, in tokens; None: no limit."""
    vocab_size: int | None = None
    """Number of tokens of its vocabulary; None: it has none, or its size is not known yet."""
    adaptation: Any = None
    """The Addition (adapt/config.py) that fine-tuning made to the model; None: none."""

    @property
    def can_be_adapted(self) -> bool:
        """Return whether `adaptation` is a key of the config."""
        return any(each.name == "adaptation" for each in fields(self))  # type: ignore[arg-type]

    @property
    def has_vocabulary(self) -> bool:
        """Return whether the model reads tokens of a vocabulary."""
        return False

    @property
    def lacks_vocab_size(self) -> bool:
        """Return whether the size of its vocabulary is not known yet."""
        return False

    @property
    def longest_row(self) -> int | None:
        """Return the maximum number of tokens of a row, without virtual ones before them; None: no limit."""
        if self.max_sequence_length is None or self.adaptation is None:
            return self.max_sequence_length
        return self.max_sequence_length - int(self.adaptation.virtual_tokens)

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each invalid value."""
        yield from ()

    @property
    def blocks(self) -> LayerConfig | None:
        """Return the config of its layers, where each step but the first and the last is attention and an
        MLP; None: plans know the model's FLOPs alone."""
        return None

    @property
    def rotary_scaling(self) -> RopeScaling | None:
        """Return how its layers scale rotary positions; None: they do not."""
        return None if self.blocks is None else self.blocks.rope_scaling

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Return role → id of the special tokens that the config names."""
        return {}

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Return size and channels of the images that it classifies; None: it classifies none."""
        return None

    @property
    def state_width(self) -> int:
        """Return the width of the hidden states; 1 where they are not vectors of one width."""
        return 1

    @property
    def output_width(self) -> int:
        """Return the width of the hidden states that a head reads."""
        return self.state_width

    @property
    def embedding_width(self) -> int | None:
        """Return the width of the token embedding; None: it has none."""
        return None

    @property
    def embedding_key(self) -> str:
        """Return the key that sets the width of the token embedding."""
        return "hidden_size"

    @property
    def carries_states(self) -> bool:
        """Return whether rows may begin from the state after earlier rows."""
        return False

    @property
    def steps_by_token(self) -> bool:
        """Return whether a forward pass calls a module once for each token of a row."""
        return False

    @property
    def weighs_tokens(self) -> bool:
        """Return whether a text's prediction is made with a weight for each token (`attention_weights`)."""
        return False

    def token_head_problems(self) -> Iterator[Problem]:
        """Yield a problem for each setting with which the model cannot have the head of a language model."""
        yield from ()

    def step_parameter_counts(self, tensor: int = 1) -> list[int]:
        """Return the parameters of each step on one of `tensor` ranks that divide matrices and vocabulary."""
        raise NotImplementedError

    def head_matrix_count(self, tensor: int = 1) -> int:
        """Return the weights of a head over tokens or texts on one of `tensor` ranks; 0: it has none."""
        return 0

    def repeated_count(self, steps: range, tensor: int = 1) -> int:
        """Return the parameters that several of `steps` share, counted once for each step but the first."""
        return 0

    def largest_parameter_count(self, tensor: int = 1) -> int:
        """Return the elements of the largest single parameter on one of `tensor` ranks."""
        raise NotImplementedError

    def step_multiplications(self, tensor: int, sequence_length: int) -> list[int]:
        """Return the multiplications of each step for one token, on one of `tensor` ranks."""
        return self.step_parameter_counts(tensor)

    def parameter_count(self) -> int:
        """Return the number of all parameters, with shared ones counted once. Needs the vocabulary size."""
        counts = self.step_parameter_counts()
        return sum(counts) - self.repeated_count(range(len(counts)))

    def statistics_count(self) -> int:
        """Return how many numbers forward passes change, such as the running averages of batch norm;
        checkpoints hold them beside the parameters."""
        return 0

    def flops_per_token(self, row: Row) -> float:
        """Return forward and backward FLOPs per counted token of `row`; for images, per image."""
        raise NotImplementedError


class OfVocabulary(ModelConfig):
    """Base of configs with a vocabulary, whose size may not be known yet."""

    hidden_size: int
    tie_embeddings: bool

    @property
    def has_vocabulary(self) -> bool:
        return True

    @property
    def lacks_vocab_size(self) -> bool:
        return self.vocab_size is None

    def _vocab(self) -> int:
        if self.vocab_size is None:
            raise ValueError("vocab_size is not resolved yet")
        return self.vocab_size

    @property
    def predicts_tokens(self) -> bool:
        """Return whether the model has the head of a language model, alone or beside those of tasks."""
        return self.task is None or self.task.has_tokens

    def vocabulary_problems(self) -> Iterator[Problem]:
        size = self.vocab_size
        yield from require(size is None or size >= 2, "vocab_size", size, "2 or more, or null")

    @property
    def state_width(self) -> int:
        return self.hidden_size

    @property
    def embedding_width(self) -> int:
        return self.hidden_size

    def head_matrix_count(self, tensor: int = 1) -> int:
        """Return the weights of the head's matrices on one of `tensor` ranks that divide the vocabulary."""
        if self.task is not None:
            return self.task.matrix_count(self.output_width)
        return self.embedding_count(tensor)

    def head_parameter_count(self, tensor: int = 1) -> int:
        """Return the parameters of the head on one of `tensor` ranks that divide the vocabulary."""
        if self.task is not None:
            return self.task.parameter_count(self.output_width)
        return self.head_matrix_count(tensor)

    def embedding_count(self, tensor: int = 1) -> int:
        """Return the weights of the token embedding on one of `tensor` ranks that divide the vocabulary."""
        return -(-self._vocab() // tensor) * self.hidden_size

    def repeated_count(self, steps: range, tensor: int = 1) -> int:
        """Return the tied head's weight if both the first and the last step are among `steps`."""
        last = len(self.step_parameter_counts()) - 1
        is_shared = self.tie_embeddings and self.predicts_tokens and last > 0 and 0 in steps and last in steps
        return self.embedding_count(tensor) if is_shared else 0

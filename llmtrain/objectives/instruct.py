"""Instructions and conversations: the answers of the assistant, given all that comes before each.

Dim names: B rows, T sequence length, W = T + 1 tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import INTERNAL
from llmtrain.objectives.base import (
    Batch,
    LossOfModel,
    Shown,
    Terms,
    count_targets,
    ratio,
)
from llmtrain.objectives.causal_lm import CausalLM
from llmtrain.objectives.chat_config import ChatConfig, columns_of
from llmtrain.objectives.conversations import conversation_of

if TYPE_CHECKING:
    from torch import nn

    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class InstructConfig(ChatConfig):
    """Answer as an assistant: only answers, and the token that ends each, bear a loss. It also reads the rows
    of its table (TaskReader)."""

    writes_answers: ClassVar = True

    kind: Literal["instruct"] = "instruct"
    """Conversations and instructions."""
    template: Path | None = None
    """A file with a chat template of jinja2, in place of the one that the tokenizer has; null: the
    tokenizer's, or a plain one if it has none."""
    prompts: Literal["chat", "text"] = "chat"
    """What a prompt and a completion that are texts are. chat: a message of the user and the answer;
    text: text as it stands, and the end token."""
    packing: bool = True
    """Several conversations in each row, which do not see each other; false: one in each."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that the template uses and the vocabulary lacks: they get ids after its last, and rows of
    embedding and head that are the mean of the others."""
    chat_template: str | None = field(default=None, metadata={INTERNAL: True})
    """The chat template that conversations were rendered by; null: not known yet."""
    end_ids: tuple[int, ...] = field(default=(), metadata={INTERNAL: True})
    """Ids that end an answer."""

    @property
    def packs_texts(self) -> bool:  # type: ignore[override]
        return self.packing

    @property
    def divides_sequences(self) -> bool:  # type: ignore[override]
        """Rows are as wide as the longest of a batch unless they are packed."""
        return self.packing

    def measures(self) -> tuple[str, ...]:
        return ("token_accuracy",)

    def build(self, model: Any, data: Any, corpora: Any = None) -> Instruct:
        return Instruct(packed=self.packing)

    def open(
        self, model: Any, data: Any, corpora: Any, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        from llmtrain.data.datasets.conversations import Conversations, PackedConversations

        of_split = corpora.split(split)
        if self.packing:
            return {"": PackedConversations(of_split, sequence_length)}
        return {"": Conversations(of_split, sequence_length, group=data.group)}

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        from llmtrain.tables.build import Example

        conversation = conversation_of(values, data, as_text=self.prompts == "text")
        return Example((conversation.text,), conversation, None)

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        return columns_of(self.encoded(contents, tokenizer))


class Instruct(CausalLM):
    """Loss of the tokens of answers, given the preceding tokens of their conversation."""

    def __init__(self, *, packed: bool = True) -> None:
        """packed: whether rows hold several conversations and have one width."""
        super().__init__(document_mask=True)
        self._pads_fully = packed

    def pad_fully(self) -> None:
        self._pads_fully = True

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return the batch of stacked rows as CausalLM does; unless they are packed, as wide as the
        longest."""
        if not self._pads_fully:
            from llmtrain.data.datasets.examples import padded_width

            longest = int((raw["documents"] >= 0).sum(1).max(initial=2))
            width = min(raw["tokens"].shape[1], padded_width(longest - 1) + 1)
            raw = {**raw, **{key: raw[key][:, :width] for key in ("tokens", "documents", "contexts")}}
        return super().collate(raw)

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add "token_accuracy"."""
        num_targets = count_targets(batch["labels"])
        sums = model(**self.arguments(batch), with_metrics=True)
        return Terms(sums["loss"], num_targets, {"token_accuracy": ratio(sums["correct"], num_targets)})

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return LossOfModel.figures(self, loss, num_targets, metrics, num_bytes)

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return each conversation with its special tokens, and marks around what is not trained."""
        tokens_W, contexts_W, documents_W = (raw[name][0] for name in ("tokens", "contexts", "documents"))
        lines = []
        for number, part in enumerate(parts()):
            here = documents_W == number
            lines.append(f"  conversation {part.document}, {part.tokens} tokens")
            lines += text.apart(tokens_W[here], ~contexts_W[here])
        padding = int((documents_W < 0).sum())
        if padding:
            lines.append(f"  padding, {padding} tokens without loss")
        trained = int((~contexts_W).sum())
        return Shown(f"{trained} of {int((documents_W >= 0).sum())} tokens are trained", lines)

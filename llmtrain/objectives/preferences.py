"""Preferences: raise the probability of chosen answers over that of rejected ones (DPO, arXiv:2305.18290).

Dim names: B pairs, R = 2·B rows, T tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import INTERNAL, require
from llmtrain.errors import Problem
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row
from llmtrain.objectives.base import DROPOUT_KEYS, Batch, Shown, Terms, ratio, tensors
from llmtrain.objectives.chat_config import ChatConfig, columns_of
from llmtrain.objectives.conversations import Conversation, preference_of
from llmtrain.scoring.preferences import PREFERENCE_FIGURES, preference_figures

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.scoring.figure import Figure
    from llmtrain.scoring.report import Report
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig
    from llmtrain.tables.ragged import Column
    from llmtrain.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class PreferenceConfig(ChatConfig):
    """Prefer chosen answers to rejected ones (DPO). It also reads the rows of its table (TaskReader)."""

    divides_sequences: ClassVar = False
    has_stages: ClassVar = False

    kind: Literal["dpo"] = "dpo"
    """Direct preference optimization."""
    beta: float = 0.1
    """How strongly the model is held to the one that training starts from: higher keeps it nearer."""
    template: Path | None = None
    """A file with a chat template of jinja2, in place of the one that the tokenizer has; null: the
    tokenizer's, or a plain one if it has none."""
    prompts: Literal["chat", "text"] = "chat"
    """What a prompt and its answers that are texts are. chat: a message of the user and the answer;
    text: text as it stands, and the end token."""
    new_tokens: tuple[str, ...] = ()
    """Tokens that the template uses and the vocabulary lacks: they get ids after its last, and rows of
    embedding and head that are the mean of the others."""
    chat_template: str | None = field(default=None, metadata={INTERNAL: True})
    """The chat template that conversations were rendered by; null: not known yet."""
    end_ids: tuple[int, ...] = field(default=(), metadata={INTERNAL: True})
    """Ids that end an answer."""

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from require(self.beta > 0, "beta", self.beta, "more than 0")

    def measures(self) -> tuple[str, ...]:
        return PREFERENCE_FIGURES

    def row(self, sequence_length: int) -> Row:
        """Count two rows of each pair. The reference's logits are computed before training, and not kept."""
        return Row(2 * sequence_length, predicted=2 * sequence_length, whole_logits=True)

    def build(self, model: Any, data: Any, corpora: Any = None) -> Preference:
        return Preference(self.beta)

    def open(
        self, model: Any, data: Any, corpora: Any, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        from llmtrain.data.datasets.preferences import Preferences

        return {"": Preferences(corpora.split(split), sequence_length, group=data.group)}

    def read(self, values: Mapping[str, Any], data: TableDataConfig) -> Example | None:
        from llmtrain.tables.build import Example

        pair = preference_of(values, data, as_text=self.prompts == "text")
        # All pairs of a prompt are in one split.
        return Example((pair[0].asked,), pair, None)

    def encode_texts(self, contents: Sequence[Any], tokenizer: Tokenizer) -> dict[str, Column]:
        """Return the columns of both answers, each with its prompt."""
        pairs: Sequence[tuple[Conversation, Conversation]] = contents
        chosen = self.encoded([pair[0] for pair in pairs], tokenizer)
        rejected = self.encoded([pair[1] for pair in pairs], tokenizer)
        return {**columns_of(chosen, "chosen_"), **columns_of(rejected, "rejected_")}


class Preference:
    """−log σ(β · (Δ_chosen − Δ_rejected)) of each pair, where Δ is by how much the log-probability of an
    answer exceeds that under the reference (arXiv:2305.18290, equation 7)."""

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self.references: dict[bool, np.ndarray] | None = None
        """Whether the rows are held out → log-probabilities of both answers of each pair under the reference,
        fp32 (pairs, 2). None: they are not known yet, and are computed by `evaluate`."""

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Return "tokens" int64 (R, T), both answers of a pair one after another; "labels" (R, T),
        IGNORE_INDEX where no answer is; and "rows" int64 (B)."""
        from llmtrain.data.datasets.examples import padded_width

        B, sides, W = raw["tokens"].shape
        tokens, documents, contexts = (
            raw[name].reshape(B * sides, W) for name in ("tokens", "documents", "contexts")
        )
        longest = int((documents >= 0).sum(1).max(initial=2))
        W = min(W, padded_width(longest - 1) + 1)
        labels = np.where(contexts[:, 1:W], IGNORE_INDEX, tokens[:, 1:W])
        return tensors({"tokens": tokens[:, : W - 1], "labels": labels, "rows": raw["rows"]})

    def target_count(self, batch: Batch) -> int:
        return int((batch["rows"] >= 0).sum())

    def log_probabilities(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log-probability of each answer, fp32 (B, 2)."""
        import torch

        arguments = {"tokens_BT": batch["tokens"]}
        if DROPOUT_KEYS in batch:
            # Both answers of a pair under the same masks.
            arguments["dropout_keys_B"] = batch[DROPOUT_KEYS].repeat_interleave(2)
        logits_RTV, labels_RT = model(**arguments), batch["labels"]
        is_answer_RT = labels_RT != IGNORE_INDEX
        of_tokens = torch.log_softmax(logits_RTV[is_answer_RT].float(), -1)
        of_tokens = of_tokens.gather(1, labels_RT[is_answer_RT][:, None])[:, 0]
        row = is_answer_RT.nonzero()[:, 0]
        zeros_R = torch.zeros(len(labels_RT), device=labels_RT.device)
        return zeros_R.index_add(0, row, of_tokens).view(-1, 2)

    def __call__(self, model: nn.Module, batch: Batch) -> Terms:
        _, loss_B, is_pair_B = self._margins(self.log_probabilities(model, batch), batch, held_out=False)
        return Terms((loss_B * is_pair_B).sum(), is_pair_B.sum())

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add "accuracy", how often the chosen answer gains on the rejected one, "margin", by how much, and
        the log-probabilities of both as rows."""
        found_B2 = self.log_probabilities(model, batch)
        rows = list(found_B2.float().cpu().numpy())
        margins_B, loss_B, is_pair_B = self._margins(found_B2, batch, held_out=True)
        count = is_pair_B.sum()
        metrics = {
            "accuracy": ratio(((margins_B > 0) & is_pair_B).sum(), count),
            "margin": ratio((margins_B * is_pair_B).sum(), count),
        }
        return Terms((loss_B * is_pair_B).sum(), count, metrics, rows=rows)

    def _margins(self, found_B2: Tensor, batch: Batch, *, held_out: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the margin and the loss of each pair, and whether it is one."""
        import torch
        import torch.nn.functional as F

        rows_B = batch["rows"]
        is_pair_B = rows_B >= 0
        if self.references is None:
            reference_B2 = found_B2.detach()
        else:
            of_rows = self.references[held_out][rows_B.clamp(min=0).cpu().numpy()]
            reference_B2 = torch.from_numpy(of_rows).to(found_B2.device)
        gains_B2 = found_B2 - reference_B2
        margins_B = self._beta * (gains_B2[:, 0] - gains_B2[:, 1])
        return margins_B, -F.logsigmoid(margins_B), is_pair_B

    def figures(
        self, loss: float, num_targets: int, metrics: Mapping[str, float], num_bytes: int
    ) -> dict[str, float]:
        return {}

    def scores(
        self, dataset: Any, rows: Mapping[int, np.ndarray], intervals: bool = True
    ) -> dict[str, Figure]:
        """Return "accuracy" and "margin" with their intervals."""
        if self.references is None:
            return {}
        gains_N2 = np.stack(list(rows.values())) - self.references[True][list(rows)]
        return preference_figures(self._beta * (gains_N2[:, 0] - gains_N2[:, 1]), intervals)

    def report(self, dataset: Any, rows: Mapping[int, np.ndarray]) -> Report | None:
        return None

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return both answers with their prompt and special tokens, and marks around what is no answer."""
        lines = []
        for place, side in enumerate(("chosen", "rejected")):
            here = raw["documents"][0, place] >= 0
            lines.append(f"  {side}")
            lines += text.apart(raw["tokens"][0, place][here], ~raw["contexts"][0, place][here])
        counts = (~raw["contexts"][0]).sum(1).tolist()
        return Shown(f"{counts[0]} tokens chosen, {counts[1]} rejected", lines)

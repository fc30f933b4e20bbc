"""Masked language modeling, alone or with sentence pairs (arXiv:1810.04805, 1907.11692, 1909.11942).

All choices are hashes of a sample's key: the same for any number of ranks, different in each epoch.

Dim names: B rows, T sequence length, W = T + 1 tokens of a window, L tokens of the longest passage, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.labels import IGNORE_INDEX
from llmtrain.nn.model_config import Row
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    SharesTrunk,
    Shown,
    SpecialIds,
    Terms,
    count_targets,
    positions_in_documents,
    ratio,
    tensors,
)
from llmtrain.objectives.draws import uniform, uniform_of_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.data.trace import Part
    from llmtrain.objectives.text import Spelling
    from llmtrain.tokenizers.base import Tokenizer

_PADDING = -1
"""Document number of padding."""
_CHOSEN, _REPLACED, _DRAWN, _IS_PAIR, _CUT = range(5)
"""Purposes of random draws."""


@dataclass(frozen=True)
class MaskedLMConfig(SharesTrunk):
    """Predict masked tokens, and optionally a relation of two texts (arXiv:1810.04805, section 3.1)."""

    teaches: ClassVar = ("encoder",)

    kind: Literal["mlm"] = "mlm"
    pairs: Literal["none", "next_sentence", "sentence_order"] = "none"
    """Task on pairs of texts. `next_sentence`: whether text B follows text A (arXiv:1810.04805);
    `sentence_order`: which of two neighbors comes first (ALBERT, arXiv:1909.11942); `none`: no pairs, full
    rows of tokens (RoBERTa, arXiv:1907.11692)."""
    share: float = 0.15
    """Share of tokens that are predicted."""
    masked: float = 0.8
    """Share of the predicted tokens that are replaced by [MASK]."""
    random: float = 0.1
    """Share of the predicted tokens that are replaced by a random token; the others stay unchanged."""
    whole_words: bool = False
    """Whether all tokens of a word are masked together."""
    pair_weight: float = 1.0
    """Factor of the loss of the relation of texts beside that of masked tokens."""

    def problems(self) -> Iterator[Problem]:
        yield from require(0 < self.share < 1, "share", self.share, "more than 0, less than 1")
        for name in ("masked", "random"):
            yield from require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        weight = self.pair_weight
        yield from require(0 < weight < float("inf"), "pair_weight", weight, "a positive number")
        both = self.masked + self.random
        yield from require(both <= 1 + 1e-9, "masked", f"{both:g} with random", "1 or less together")

    @property
    def has_pairs(self) -> bool:
        return self.pairs != "none"

    def measures(self) -> tuple[str, ...]:
        pairs = ("masked_loss", "pair_accuracy", "pair_loss") if self.has_pairs else ()
        return ("masked_accuracy", *pairs)

    def row(self, sequence_length: int) -> Row:
        return Row(sequence_length, predicted=self.share * sequence_length)

    def fitted(self, model: Any) -> Any:
        return replace(model, pair_head=self.has_pairs)

    def data_problems(self, data: Any) -> Iterator[Problem]:
        if self.has_pairs and data.packing != "concat":
            allowed = "concat with objective.pairs: a row holds one pair of texts"
            yield Problem("data.packing", data.packing, allowed, "give data.packing=concat")

    def special_ids(self, model: Any, corpora: TextSource) -> SpecialIds:
        return encoder_ids(model, corpora)

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        return encoder_names(model)

    def open(
        self, model: Any, data: Any, corpora: TextSource | None, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        if not self.has_pairs:
            return super().open(model, data, corpora, split, sequence_length)
        from llmtrain.data.datasets.pairs import Passages

        splits = self.splits(data, corpora, split)
        return {name: Passages(tokens, sequence_length) for name, tokens in splits.items()}

    def build(self, model: Any, data: Any, corpora: TextSource | None = None) -> MaskedLM:
        word_starts = text_ids = None
        if corpora is not None and self.whole_words:
            word_starts = corpora.load_tokenizer().word_starts()
        has_special_ids_inside = model.num_text_ids > min(model.special_ids)
        is_own_mask = corpora is not None and corpora.special_ids.get("mask") == model.mask_id
        if corpora is not None and has_special_ids_inside and is_own_mask:
            text_ids = corpora.load_tokenizer().ordinary_ids()
        return MaskedLM(
            model, self, document_mask=data.document_mask, word_starts_V=word_starts, text_ids=text_ids
        )


def encoder_ids(model: Any, corpora: TextSource) -> SpecialIds:
    """Resolve [MASK], [CLS] and [SEP]: the tokenizer's ids if it has all three, else the first ids after the
    corpus' vocabulary."""
    needed = corpora.vocab_size
    if model.mask_id is None:
        own = corpora.special_ids if {"mask", "cls", "sep"} <= corpora.special_ids.keys() else {}
        ids = [own.get(role, needed + n) for n, role in enumerate(("mask", "cls", "sep"))]
        model = replace(model, mask_id=ids[0], cls_id=ids[1], sep_id=ids[2])
    needed = max(needed, *(i + 1 for i in model.special_ids))
    return SpecialIds(model, needed, " with [MASK], [CLS] and [SEP]")


def encoder_names(model: Any) -> dict[int, str]:
    """Return id → name of the special tokens of an encoder."""
    return dict(zip(model.special_ids, ("[MASK]", "[CLS]", "[SEP]"), strict=True))


class MaskedLM(LossOfModel):
    """Loss of the masked tokens, plus that of the row's sentence pair.

    A row's pair loss counts as many times as the row has masked tokens, so that the mean over masked
    tokens is the mean token loss plus a mean of the pair losses.
    """

    perplexity_of: ClassVar = "masked_loss"
    names: ClassVar = {
        "tokens": "tokens_BT",
        "positions": "positions_BT",
        "documents": "documents_BT",
        "segments": "segments_BT",
        "labels": "labels_BT",
        "pair_labels": "pair_labels_B",
        DROPOUT_KEYS: "dropout_keys_B",
    }

    def __init__(
        self,
        model: Any,
        config: MaskedLMConfig,
        *,
        document_mask: bool = True,
        word_starts_V: np.ndarray | None = None,
        text_ids: np.ndarray | None = None,
    ) -> None:
        """document_mask: packed documents don't attend to each other, and positions restart in each.
        word_starts_V: True for ids that begin a word, for `whole_words`. text_ids: ids that random tokens
        are drawn from, int64; None: all below the model's num_text_ids."""
        self._document_mask = document_mask
        self._config = config
        self._mask_id, self._cls_id, self._sep_id = model.special_ids
        self._text_ids = np.arange(model.num_text_ids) if text_ids is None else text_ids
        if self._config.whole_words and word_starts_V is None:
            raise ValueError("whole_words needs word_starts_V")
        self._word_starts_V = word_starts_V if self._config.whole_words else None

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """Mask tokens of stacked samples and return the batch.

        raw holds "keys", int64 (B,), and either
        - "tokens" and "documents" (B, W), documents negative at padding, of which the first T are taken, and,
          if documents overlap, "contexts" (B, W) bool, True at tokens that are not predicted; or
        - for pairs "passages" and "others" (B, L), "passage_lengths" and "other_lengths" (B,).

        Returns "tokens" (B, T), with masked ones replaced, and "labels" (B, T), the original masked
        tokens, IGNORE_INDEX elsewhere, both int64; for pairs also "segments" (B, T) int64 and
        "pair_labels" (B,) int64: 0 if text B follows text A, 1 if not, IGNORE_INDEX for an empty row. If a
        row holds several documents or padding, also "positions" (B, T) int64 and "documents" (B, T) int32.
        """
        keys_B = raw["keys"]
        if self._config.pairs == "none":
            arrays, may_hide_BT = self._packed(raw)
        else:
            arrays, may_hide_BT = self._paired(raw, keys_B)
        arrays["tokens"], arrays["labels"] = self._hide(arrays["tokens"], may_hide_BT, keys_B)
        return tensors(arrays)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        weight = {} if self._config.pair_weight == 1.0 else {"pair_weight": self._config.pair_weight}
        return {**super().arguments(batch), **weight}

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Add "masked_accuracy"; with pairs also "masked_loss" of the tokens alone, "pair_accuracy" and
        "pair_loss"."""
        sums = model(**self.arguments(batch), with_metrics=True)
        return self.terms_of(sums, count_targets(batch["labels"]))

    def terms_of(self, sums: Mapping[str, Tensor], num_targets: Tensor) -> Terms:
        """Return loss and metrics from what the model sums up."""
        metrics = {"masked_accuracy": ratio(sums["correct"], num_targets)}
        if self._config.pairs != "none":
            metrics["masked_loss"] = ratio(sums["token_loss"], num_targets)
            metrics["pair_accuracy"] = ratio(sums["pair_correct"], sums["pairs"])
            metrics["pair_loss"] = ratio(sums["pair_loss"], sums["pairs"])
        return Terms(sums["loss"], num_targets, metrics)

    def show(
        self,
        row: Mapping[str, np.ndarray],
        raw: Mapping[str, np.ndarray],
        text: Spelling,
        parts: Callable[[], Iterable[Part]],
    ) -> Shown:
        """Return the row with the labels at masked positions; separate documents, and the texts of a pair."""
        tokens, labels = row["tokens"], row["labels"]
        documents = row.get("documents", np.zeros(len(tokens), np.int32))
        predicted = labels != IGNORE_INDEX
        marked = {
            position: f"⟦{text.name(tokens[position])}→{text.name(labels[position])}⟧"
            for position in np.flatnonzero(predicted).tolist()
        }
        facts = f"{int((documents >= 0).sum())} tokens, {int(predicted.sum())} of them predicted"
        if "pair_labels" in row:
            label = int(row["pair_labels"])
            meanings = {
                "next_sentence": ("the second follows the first", "the second is of another document"),
                "sentence_order": ("in their order", "the second came first"),
            }[self._config.pairs]
            facts += f", pair {label}: {meanings[label]}"
            documents = np.where(documents >= 0, row["segments"], documents)
        return Shown(facts, text.documents(tokens, documents, marked))

    def _hide(
        self, tokens_BT: np.ndarray, may_hide_BT: np.ndarray, keys_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens with some masked, and labels, both (B, T)."""
        config = self._config
        places_T = np.arange(tokens_BT.shape[1])
        deciding_BT = np.broadcast_to(places_T, tokens_BT.shape)
        if self._word_starts_V is not None:
            # All tokens of a word share the random number of its first token.
            starts_BT = self._word_starts_V[tokens_BT] | ~may_hide_BT
            starts_BT[:, 1:] |= ~may_hide_BT[:, :-1]
            deciding_BT = np.maximum.accumulate(np.where(starts_BT, places_T, 0), axis=1)
        hidden_BT = may_hide_BT & (uniform(keys_B, _CHOSEN, deciding_BT) < config.share)
        how_BT = uniform(keys_B, _REPLACED, places_T)
        drawn_BT = self._text_ids[(uniform(keys_B, _DRAWN, places_T) * len(self._text_ids)).astype(np.int64)]
        replaced_BT = np.where(how_BT < config.masked, self._mask_id, tokens_BT)
        is_random_BT = (how_BT >= config.masked) & (how_BT < config.masked + config.random)
        replaced_BT = np.where(is_random_BT, drawn_BT, replaced_BT)
        labels_BT = np.where(hidden_BT, tokens_BT, IGNORE_INDEX)
        return np.where(hidden_BT, replaced_BT, tokens_BT), labels_BT

    def _packed(self, raw: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Never mask a document's last token: the document mask already reveals where a document ends."""
        documents_BT, following_BT = raw["documents"][:, :-1], raw["documents"][:, 1:]
        may_hide_BT = (documents_BT >= 0) & (documents_BT == following_BT)
        if "contexts" in raw:
            may_hide_BT &= ~raw["contexts"][:, :-1]
        if not self._document_mask:
            documents_BT = np.minimum(documents_BT, 0)
        return {"tokens": raw["tokens"][:, :-1]} | _document_arrays(documents_BT), may_hide_BT

    def _paired(
        self, raw: dict[str, np.ndarray], keys_B: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Build rows [CLS] A [SEP] B [SEP].

        Cut a passage at a random position in its middle half, or later if the other passage is shorter
        than the rest would be. B is the rest, or, for half of the rows, an equally long end of the other
        passage; for sentence order, A and B are swapped instead. Lengths therefore reveal nothing.
        """
        n_B, others_B = raw["passage_lengths"], raw["other_lengths"]
        L = raw["passages"].shape[1]
        T = L + 3
        quarter_B = n_B // 4
        cut_B = np.floor(uniform_of_rows(keys_B, _CUT) * (n_B // 2 + 1)).astype(np.int64)
        cut_B = np.clip(quarter_B + cut_B, np.minimum(1, n_B), np.maximum(0, n_B - 1))
        if self._config.pairs == "next_sentence":
            cut_B = np.where(others_B > 0, np.maximum(cut_B, n_B - others_B), cut_B)
        changed_B = uniform_of_rows(keys_B, _IS_PAIR) < 0.5
        # Spans of the passage and of the other passage, concatenated.
        first_start_B, first_length_B = np.zeros_like(n_B), cut_B
        second_start_B, second_length_B = cut_B, n_B - cut_B
        if self._config.pairs == "sentence_order":
            first_start_B, second_start_B = np.where(changed_B, (cut_B, 0 * cut_B), (0 * cut_B, cut_B))
            first_length_B, second_length_B = np.where(
                changed_B, (second_length_B, first_length_B), (first_length_B, second_length_B)
            )
        else:
            changed_B &= others_B > 0
            second_start_B = np.where(changed_B, L + others_B - second_length_B, second_start_B)
        places_T = np.arange(T)
        begin_B1 = (first_length_B + 2)[:, None]
        end_B1 = begin_B1 + second_length_B[:, None]
        in_first_BT = (places_T >= 1) & (places_T < begin_B1 - 1)
        in_second_BT = (places_T >= begin_B1) & (places_T < end_B1)
        source_BT = np.where(
            in_first_BT, first_start_B[:, None] + places_T - 1, second_start_B[:, None] + places_T - begin_B1
        )
        both_BL = np.concatenate([raw["passages"], raw["others"]], axis=1)
        text_BT = np.take_along_axis(both_BL, np.clip(source_BT, 0, 2 * L - 1), axis=1)
        is_text_BT = in_first_BT | in_second_BT
        special_BT = np.where(places_T == 0, self._cls_id, self._sep_id)
        is_row_B1 = (n_B > 0)[:, None]
        is_token_BT = (places_T <= end_B1) & is_row_B1
        arrays = {
            "tokens": np.where(is_text_BT, text_BT, np.where(is_token_BT, special_BT, 0)),
            "segments": ((places_T >= begin_B1) & is_token_BT).astype(np.int64),
            "pair_labels": np.where(n_B > 0, changed_B.astype(np.int64), IGNORE_INDEX),
        }
        documents_BT = np.where(is_token_BT, 0, _PADDING).astype(np.int32)
        return arrays | _document_arrays(documents_BT), is_text_BT & is_row_B1


def _document_arrays(documents_BT: np.ndarray) -> dict[str, np.ndarray]:
    if (documents_BT == documents_BT[:, :1]).all():
        return {}
    return {"documents": documents_BT, "positions": positions_in_documents(documents_BT)}

"""Masked language modelling, alone or with pairs of texts (arXiv:1810.04805, 1907.11692, 1909.11942).

All choices are hashes of a sample's key: the same at any number of processes, others in each epoch.

Dim names: B rows, T sequence length, W = T + 1 tokens of a window, L tokens of the longest passage,
V vocabulary.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import nn

from llmtrain.models.bert.config import BertConfig
from llmtrain.nn.head import IGNORE_INDEX
from llmtrain.objectives.base import (
    DROPOUT_KEYS,
    Batch,
    LossOfModel,
    Terms,
    count_targets,
    positions_in_documents,
)
from llmtrain.objectives.draws import uniform, uniform_of_rows

_PADDING = -1
"""Document of a place without a token."""
_CHOSEN, _REPLACED, _DRAWN, _IS_PAIR, _CUT = range(5)
"""What a hash decides."""


class MaskedLM(LossOfModel):
    """Loss of the tokens that were hidden, and of their row's pair of texts.

    A row's pair counts as often as the row has hidden tokens, so that the mean over these is the mean of
    the tokens' loss and a mean of the pairs'.
    """

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
        config: BertConfig,
        *,
        document_mask: bool = True,
        word_starts_V: np.ndarray | None = None,
        text_ids: np.ndarray | None = None,
    ) -> None:
        """document_mask: packed documents don't attend to each other, and positions count from 0 in each.
        word_starts_V: whether each id begins a word, bool, for `whole_words`. text_ids: what a random token
        is drawn from, int64; None: all below the config's num_text_ids."""
        self._document_mask = document_mask
        self._config = config.objective
        self._mask_id, self._cls_id, self._sep_id = config.special_ids
        self._text_ids = np.arange(config.num_text_ids) if text_ids is None else text_ids
        if self._config.whole_words and word_starts_V is None:
            raise ValueError("whole_words needs word_starts_V")
        self._word_starts_V = word_starts_V if self._config.whole_words else None

    def collate(self, raw: dict[str, np.ndarray]) -> Batch:
        """{"keys": int64 (B,)} and either

        - {"tokens", "documents": (B, W), documents negative where no token is; and, where tokens are seen
          that are not predicted, "contexts": (B, W) bool}, of which the first T are taken, or
        - with pairs {"passages", "others": (B, L); "passage_lengths", "other_lengths": (B,)}

        → {"tokens": (B, T), with hidden ones replaced; "labels": (B, T), what was hidden, elsewhere
        IGNORE_INDEX}, int64; with pairs {"segments": (B, T) int64; "pair_labels": (B,) int64, 0 where
        text B follows text A, 1 where it doesn't, IGNORE_INDEX of an empty row}; and, where a row holds
        more than one document or padding, {"positions": (B, T) int64; "documents": (B, T) int32}."""
        keys_B = raw["keys"]
        if self._config.pairs == "none":
            arrays, may_hide_BT = self._packed(raw)
        else:
            arrays, may_hide_BT = self._paired(raw, keys_B)
        arrays["tokens"], arrays["labels"] = self._hide(arrays["tokens"], may_hide_BT, keys_B)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Terms:
        """Adds "masked_accuracy" of hidden tokens; with pairs also "masked_loss" of the tokens alone,
        "pair_accuracy" and "pair_loss"."""
        num_targets = count_targets(batch["labels"], IGNORE_INDEX)
        # A pipeline's stages before the last have a single 0.
        sums = model(**self.arguments(batch), with_metrics=True).expand(6)
        loss_sum, token_loss, correct, pair_loss, pair_correct, num_pairs = sums
        metrics = {"masked_accuracy": torch.stack([correct, num_targets])}
        if self._config.pairs != "none":
            metrics["masked_loss"] = torch.stack([token_loss, num_targets])
            metrics["pair_accuracy"] = torch.stack([pair_correct, num_pairs])
            metrics["pair_loss"] = torch.stack([pair_loss, num_pairs])
        return Terms(loss_sum, num_targets, metrics)

    def _hide(
        self, tokens_BT: np.ndarray, may_hide_BT: np.ndarray, keys_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """→ (tokens, labels), both (B, T)."""
        config = self._config
        places_T = np.arange(tokens_BT.shape[1])
        deciding_BT = np.broadcast_to(places_T, tokens_BT.shape)
        if self._word_starts_V is not None:
            # A word's tokens share the number that its first one draws.
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
        """A document's last token, its end, is not hidden: where a document ends is seen anyway."""
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
        """[CLS] A [SEP] B [SEP] a row. A passage is cut somewhere in its middle half, or further behind,
        where the other passage is shorter than what would follow; B is what is behind the cut, or for half
        the rows the end of the other passage, as long; or, for the order of sentences, both stand the other
        way round. Lengths so tell nothing."""
        n_B, others_B = raw["passage_lengths"], raw["other_lengths"]
        L = raw["passages"].shape[1]
        T = L + 3
        quarter_B = n_B // 4
        cut_B = np.floor(uniform_of_rows(keys_B, _CUT) * (n_B // 2 + 1)).astype(np.int64)
        cut_B = np.clip(quarter_B + cut_B, np.minimum(1, n_B), np.maximum(0, n_B - 1))
        if self._config.pairs == "next_sentence":
            cut_B = np.where(others_B > 0, np.maximum(cut_B, n_B - others_B), cut_B)
        changed_B = uniform_of_rows(keys_B, _IS_PAIR) < 0.5
        # Spans of the passage and the other, laid one behind the other.
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

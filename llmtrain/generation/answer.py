"""Texts to an encoder–decoder's sources and back from its targets.

A model of span corruption reads texts whose gaps are <extra_0>, <extra_1>, … and writes what stands in each
behind its mark (T5, arXiv:1910.10683, section 3.1.4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.engine.sharing import SharingConfig
from llmtrain.errors import ConfigError, Problem

if TYPE_CHECKING:
    from llmtrain.interchange.trained import TrainedModel
    from llmtrain.tokenizers.base import Tokenizer

MARK = re.compile(r"<extra_(?:id_)?(\d+)>")
"""As `llmtrain data show` writes it, or as T5's own tokenizer does."""


class Texts:
    """What a trained encoder–decoder reads and writes, as text."""

    def __init__(self, trained: TrainedModel) -> None:
        """Raises CheckpointError when there is no tokenizer with the weights."""
        config: Any = trained.config
        self.tokenizer: Tokenizer = trained.tokenizer()
        self.eos_id = self.tokenizer.eos_id if config.eos_id is None else config.eos_id
        self._num_sentinels = 0
        if config.sentinel_id is not None and trained.objective.fills_gaps:
            self._sentinel_id, self._num_sentinels = config.sentinel_id, config.num_sentinels or 0
        # BART saw <s> before every text; models trained here see texts with their ends alone, but those that
        # were trained on a table see what the tokenizer says.
        own_cls = self.tokenizer.special_ids.get("cls")
        self._first_ids = [] if own_cls is None or trained.sequence_length is not None else [own_cls]
        if (first_ids := trained.objective.first_ids) is not None:
            self._first_ids = list(first_ids)

    def source(self, text: str) -> list[int]:
        """Ids of a text with its end, a sentinel for each mark. A space before a mark belongs to the piece
        that it stands for."""
        pieces = MARK.split(text) if self._num_sentinels else [text]
        ids = list(self._first_ids)
        for number, piece in enumerate(pieces):
            if number % 2 and int(piece) < self._num_sentinels:
                ids.append(self._sentinel_id - int(piece))
            else:
                is_last = number == len(pieces) - 1
                text = f"<extra_{piece}>" if number % 2 else piece
                ids += self.tokenizer.encode(text if is_last else text.removesuffix(" "))
        return [*ids, self.eos_id]

    def target(self, ids: Sequence[int]) -> str:
        """The text that the model wrote; sentinels are marks, other ids that the tokenizer lacks nothing."""
        parts: list[str | list[int]] = [[]]
        for token in ids:
            number = self._sentinel_id - token if self._num_sentinels else -1
            if 0 <= number < self._num_sentinels:
                parts += [f"<extra_{number}>", []]
            elif token < self.tokenizer.vocab_size:
                run = parts[-1]
                assert isinstance(run, list)
                run.append(token)
        return "".join(part if isinstance(part, str) else self.tokenizer.decode(part) for part in parts)

    def answer(self, text: str, ids: Sequence[int]) -> str:
        """What the model wrote for `text`: its target, or the text itself with its gaps filled."""
        target = self.target(ids)
        if not self._num_sentinels or not MARK.search(text):
            return target
        _, *found = MARK.split(target)
        fills = dict(zip(found[::2], found[1::2], strict=True))
        # A gap of which the model wrote nothing stays.
        return MARK.sub(lambda mark: fills.get(mark[1], mark[0]).strip(), text)


def refuse_pipeline_of_answers(parallel: SharingConfig) -> None:
    """Raise ConfigError for an encoder–decoder that is to write text in a pipeline."""
    if parallel.pipeline > 1:
        allowed = "1 where an encoder–decoder writes text: sources go through its encoder once"
        remedy = f"give parallel.tensor={parallel.pipeline * parallel.tensor}"
        raise ConfigError(Problem("parallel.pipeline", str(parallel.pipeline), allowed, remedy))

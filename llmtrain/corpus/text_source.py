"""What a run asks of the texts that it reads, whether corpora or tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from llmtrain.tokenizers.base import Tokenizer


class TextSource(Protocol):
    """Opened texts with one tokenizer."""

    @property
    def by_name(self) -> Mapping[str, Any]:
        """Name → source; "" for a single one."""

    @property
    def where(self) -> str:
        """The names of the sources in messages."""

    @property
    def tokenizer_path(self) -> Path:
        """The argument of `load_tokenizer`."""

    def load_tokenizer(self) -> Tokenizer:
        """Return the tokenizer."""

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Role → id, as in the tokenizer."""

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids of <extra_id_0>, <extra_id_1>, …"""

    @property
    def eos_id(self) -> int:
        """The id that ends each document."""

    @property
    def paired(self) -> bool:
        """Whether documents alternate between sources and targets."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Hex; changes with any token and with the tokenizer."""

    def counters(self) -> dict[str, float]:
        """Return metrics of this process."""

    def close(self) -> None:
        """End work in the background."""

    def without(self, split: str) -> list[str]:
        """Return the sources that have no text in the split."""

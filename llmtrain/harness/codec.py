"""Texts to ids and back as the harness's own `hf` model does it with the tokenizer of an exported folder, so
that both score the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.tokenizers.base import Tokenizer


class Codec:
    """Encodes and decodes the texts of tasks."""

    def __init__(self, tokenizer: Tokenizer, add_bos: bool | None = None) -> None:
        """add_bos: begin each text with the token that begins texts; None: where the tokenizer does so
        itself."""
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        special = tokenizer.special_ids
        self.eos_id = special.get("eos", tokenizer.eos_id)
        self.prefix_id = special.get("bos", self.eos_id)
        """What a text without a context is conditioned on."""
        pieces = tokenizer.pieces()
        self._prefix = pieces[self.prefix_id]
        self._specials = {pieces[i]: i for i in special.values()}
        frame = tokenizer.frame
        first, last = ((), ()) if frame is None else (frame.one.first, frame.one.last)
        if add_bos and self.prefix_id not in first:
            first = (self.prefix_id, *first)
        self._first, self._last = list(first), list(last)

    @property
    def name(self) -> str:
        return self._tokenizer.sha256

    def encode(self, text: str, specials: bool | None = None) -> list[int]:
        """Return the ids of a text. specials: add the special tokens around a text; None: as the settings
        say, unless the text begins with the spelling of the first one."""
        ids = self._tokenizer.encode(text)
        if specials is None:
            specials = self._add_bos is not False and not text.startswith(self._prefix)
        return [*self._first, *ids, *self._last] if specials else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self._tokenizer.decode(ids)

    def special_id(self, text: str) -> int | None:
        """Return the id of the special token that is spelled like this; None: there is none."""
        return self._specials.get(text)

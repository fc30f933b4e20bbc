"""Sentencepiece tokenizers: load, encode, decode, train (Kudo and Richardson, arXiv:1808.06226).

A tokenizer trained here is lossless: decode(encode(x)) == x for every text without U+2581, by which
sentencepiece marks a space. Characters without a piece are encoded as bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np
import sentencepiece

from llmtrain.errors import DataError, Problem
from llmtrain.reading import parse_object
from llmtrain.tokenizers.base import SENTENCEPIECE_FILE, Tokenizer
from llmtrain.tokenizers.checks import check_charsmap
from llmtrain.tokenizers.config import SPECIAL_TOKENS, TokenizerConfig

SPACE = "▁"
# Floating-point sums depend on the number of threads: a constant gives the same model on every machine.
TRAINING_THREADS = 8
# Longer than any word, short enough to keep the lattices of sentencepiece small.
SENTENCE_BYTES = 4096
LONGEST_UNIGRAM_BYTES = 16 << 20
"""Longest text encoded at once by a unigram model, which needs 11 bytes of memory per byte."""
_FILES_TAG = b"\xa2\xaa\x0d"
"""Begins a model that holds files of its folder: field 27,300 of the message ModelProto, a text. Its fields
from 200 on are for others than sentencepiece, which passes over them."""
_KNOWN = {
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]"),
    "sep": ("<sep>", "[SEP]"),
    "pad": ("<pad>", "[PAD]"),
}
"""Usual names of special pieces for which the model has no field, as in XLNet and ALBERT."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, with the files of its folder that go on with it."""

    file_name = SENTENCEPIECE_FILE

    def __init__(self, model: bytes, where: str = "tokenizer") -> None:
        """model: contents of a model file, or what `with_files` returns.

        Raise DataError if it is not a valid sentencepiece model, or has no token to separate documents.
        """
        content = model
        self.files, model = _without_files(content, where)
        self.model = model
        """Contents of the model file alone."""
        try:
            # The library accepts empty input and returns an unusable processor.
            if not model:
                raise ValueError("an empty file")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.get_piece_size()
            self.pieces()
            scores = self._processor.get_score(list(range(self.vocab_size)))
            if not np.isfinite(scores).all():
                raise ValueError("scores that are not finite")
            for normalizer in (spec := _spec(model, where)).normalizer_spec, spec.denormalizer_spec:
                if charsmap := normalizer.precompiled_charsmap:
                    check_charsmap(charsmap)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                Problem(where, f"an invalid sentencepiece model ({reason})", "a .model file of sentencepiece")
            ) from error
        super().__init__(content, _roles(self._processor), where)

    @cached_property
    def longest_text_bytes(self) -> int:  # type: ignore[override]
        """Larger for unigram models: their scores are float32 sums from the first piece on, so encoding in
        parts may round differently and choose other pieces."""
        spec = _spec(self.model, "tokenizer")
        is_unigram = spec.trainer_spec.model_type == spec.trainer_spec.UNIGRAM
        return LONGEST_UNIGRAM_BYTES if is_unigram else super().longest_text_bytes

    def typed_specials(self) -> list[str]:
        pieces = self.pieces()
        special = {*self.special_ids.values(), *self.sentinel_ids}
        return [pieces[i] for i in sorted(special) if _is_user_defined(self._processor, i)]

    def added_tokens(self) -> list[str]:
        spec = _spec(self.model, "tokenizer")
        return [piece.piece for piece in spec.pieces if piece.type == spec.SentencePiece.USER_DEFINED]

    def with_tokens(self, tokens: Sequence[str]) -> SentencePieceTokenizer:
        if {*tokens} <= {*self.added_tokens()}:
            return self
        spec, known = _spec(self.model, "tokenizer"), {*self.pieces()}
        kind = spec.SentencePiece.USER_DEFINED
        for piece in spec.pieces:
            if piece.piece in tokens:
                piece.type = kind
        for token in tokens:
            if token not in known:
                spec.pieces.add(piece=token, score=0.0, type=kind)
        return SentencePieceTokenizer(with_files(spec.SerializeToString(), self.files))

    def encode_specials_as_text(self) -> None:
        spec, typed = _spec(self.model, "tokenizer"), {*self.typed_specials()}
        for piece in spec.pieces:
            if piece.piece in typed:
                piece.type = spec.SentencePiece.CONTROL
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())

    def pieces(self) -> list[str]:
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_arrays(self, texts: Sequence[str] | Sequence[bytes]) -> list[np.ndarray]:
        return self._processor.encode([*texts], out_type="numpy", num_threads=1)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._processor.encode(text, out_type="offset_mapping")
        return found["ids"], found["offsets"]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def word_starts(self) -> np.ndarray:
        is_control = self._processor.is_control
        return np.array([is_control(i) or piece.startswith(SPACE) for i, piece in enumerate(self.pieces())])

    def token_byte_lengths(self) -> np.ndarray:
        processor = self._processor
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for i, piece in enumerate(self.pieces()):
            if processor.is_control(i) or processor.is_unused(i) or processor.is_unknown(i):
                continue
            lengths[i] = 1 if processor.is_byte(i) else len(piece.replace(SPACE, " ").encode())
        return lengths


def _roles(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Return role → id, from the fields of the model and the usual names of special pieces."""
    named = {role: getattr(processor, f"{role}_id")() for role in ("unk", "bos", "eos", "pad")}
    roles = {role: i for role, i in named.items() if i >= 0}
    size = processor.get_piece_size()
    for role, names in _KNOWN.items():
        for i in map(processor.piece_to_id, names):
            # An ordinary piece may have the same name, and without an unknown piece the id is negative.
            is_special = 0 <= i < size and (processor.is_control(i) or _is_user_defined(processor, i))
            if role not in roles and is_special:
                roles[role] = i
    return roles


def _is_user_defined(processor: sentencepiece.SentencePieceProcessor, i: int) -> bool:
    """Return whether a piece is user-defined, which the library does not tell: such pieces match anywhere in
    a text."""
    piece = processor.id_to_piece(i)
    return not processor.is_unknown(i) and piece in processor.encode(f"a{piece}b", out_type=str)


def _spec(model: bytes, where: str) -> Any:
    """Parse a model file. Raise DataError if it is not a sentencepiece model."""
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2")
    try:
        return proto.ModelProto.FromString(model)
    except Exception as error:  # the class is defined in the C extension of protobuf
        raise DataError(
            Problem(where, f"an invalid sentencepiece model ({error})", "a .model file")
        ) from error


def extended(model: bytes, added: Sequence[str], where: str) -> bytes:
    """Return `model` with the tokens `added` after its pieces: T5's sentinels as user-defined pieces, which
    are recognized in texts, others as control tokens, which are not.

    Raise DataError if `model` is not a sentencepiece model.
    """
    spec = _spec(model, where)
    for token in added:
        kind = spec.SentencePiece.USER_DEFINED if "extra_id" in token else spec.SentencePiece.CONTROL
        spec.pieces.add(piece=token, score=0.0, type=kind)
    return spec.SerializeToString()


def with_files(model: bytes, files: Mapping[str, str]) -> bytes:
    """Return `model` with files of its folder, name → text. Programs of sentencepiece read it as before."""
    if not files:
        return model
    text = json.dumps(files, sort_keys=True, ensure_ascii=False).encode()
    return _FILES_TAG + _varint(len(text)) + text + model


def _without_files(content: bytes, where: str) -> tuple[dict[str, str], bytes]:
    """Return the files that a model holds, and the model without them. Raise DataError for damaged ones."""
    if not content.startswith(_FILES_TAG):
        return {}, content
    size, shift, at = 0, 0, len(_FILES_TAG)
    while at < len(content) and shift < 35:
        size |= (content[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if content[at - 1] < 0x80:
            break
    try:
        files = parse_object(content[at : at + size], utf8=True)
        if not all(isinstance(text, str) for text in files.values()):
            raise ValueError("files that are no text")
    except ValueError as error:
        got = f"an invalid sentencepiece model (the files that it holds: {error})"
        raise DataError(Problem(where, got, "a .model file of sentencepiece")) from None
    return files, content[at + size :]


def _varint(number: int) -> bytes:
    """Return a number as protobuf writes it: seven bits a byte, the lowest first."""
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def train(documents: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train a model and return its bytes, which depend only on the documents and the config.

    Raise DataError that names the nearest possible size if the documents do not allow the vocabulary size.
    """
    model = io.BytesIO()
    sentences = (sentence for document in documents for sentence in _sentences(document))
    # Documents of white space only have no sentence: give a space to learn.
    first = next(sentences, " ")
    unk, bos, eos, pad = range(len(SPECIAL_TOKENS))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], sentences),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            # Texts without spaces would otherwise give a vocabulary without a space.
            required_chars=SPACE,
            split_digits=config.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,
            unk_id=unk,
            bos_id=bos,
            eos_id=eos,
            pad_id=pad,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(str(error), config)) from error
    return model.getvalue()


def _sentences(document: str) -> Iterator[str]:
    """Yield lines, split before a space where they are long: pieces never span either."""
    for line in document.split("\n"):
        start = 0
        while len(line) - start > SENTENCE_BYTES:
            space = line.rfind(" ", start + 1, start + SENTENCE_BYTES)
            stop = space if space > 0 else start + SENTENCE_BYTES
            yield line[start:stop]
            start = stop
        if line[start:].strip():
            yield line[start:]


def _training_problem(message: str, config: TokenizerConfig) -> Problem:
    where = "tokenizer.vocab_size"
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return Problem(
            where,
            f"{config.vocab_size}, more than the training documents allow",
            f"at most {most[1]} with this text",
            f"set {where}={most[1]} or add text",
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return Problem(
            where,
            f"{config.vocab_size}, fewer than the characters of the training documents need",
            f"at least {least[1]} with this text (256 bytes, special tokens and its characters)",
            "raise it, or lower tokenizer.character_coverage",
        )
    return Problem(
        "tokenizer", f"a training failure of sentencepiece: {message}", "", "try tokenizer.kind=bpe"
    )

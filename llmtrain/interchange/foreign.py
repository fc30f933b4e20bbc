"""Models of others' making, whatever they come as: a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from llmtrain.interchange import huggingface
from llmtrain.interchange.gguf import GgufFile, import_gguf, is_gguf
from llmtrain.interchange.gguf_tokenizer import gguf_tokenizer
from llmtrain.interchange.huggingface import Imported
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import find_tokenizer, load_tokenizer


def read_foreign(path: Path, tokenizer: Path | None = None) -> tuple[Imported, Tokenizer | None]:
    """The model at `path`, its weights read when asked for, and its tokenizer, None where it has none.
    tokenizer: the file or folder of another one, which is taken instead.

    Raise CheckpointError and DataError, one line each, for what can't be taken.
    """
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if is_gguf(path):
        file = GgufFile(path)
        imported = import_gguf(file)
        return imported, gguf_tokenizer(file) if given is None else given
    imported = huggingface.import_folder(path)
    found = find_tokenizer(path) if given is None else None
    return imported, given if found is None else load_tokenizer(found)

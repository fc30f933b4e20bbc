"""Read foreign models: Hugging Face folders and GGUF files."""

from __future__ import annotations

from pathlib import Path

from llmtrain.interchange import huggingface
from llmtrain.interchange.gguf import GgufFile, import_gguf, is_gguf
from llmtrain.interchange.gguf_tokenizer import gguf_tokenizer
from llmtrain.interchange.huggingface import Imported
from llmtrain.tokenizers.base import Tokenizer
from llmtrain.tokenizers.folder import find_tokenizer, load_tokenizer


def read_foreign(path: Path, tokenizer: Path | None = None) -> tuple[Imported, Tokenizer | None]:
    """Return the model at `path`, whose weights are read on access, and its tokenizer, None if it has none.

    tokenizer: file or folder of a tokenizer to use instead.
    Raise CheckpointError or DataError if model or tokenizer are invalid or unsupported.
    """
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    if is_gguf(path):
        file = GgufFile(path)
        imported = import_gguf(file)
        return imported, gguf_tokenizer(file) if given is None else given
    imported = huggingface.import_folder(path)
    found = find_tokenizer(path) if given is None else None
    return imported, given if found is None else load_tokenizer(found)

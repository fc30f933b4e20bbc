"""The settings of the folder that a model was imported from, kept for exports.

Settings that our config cannot express (summaries, memories, dropout of single parts) are kept; those that
training changed are rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtrain.config import decode, encode
from llmtrain.models.huggingface.form import Form

_NEW = ("architectures", "dtype", "tie_word_embeddings")
"""Keys that are always rewritten, since they describe the tensors of the new folder."""
_TOKENIZERS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that are taken from the tokenizer if they are missing."""
_OUT = ("torch_dtype", "transformers_version", "auto_map", "_name_or_path")
"""Keys that would be wrong for the new folder."""


@dataclass(frozen=True)
class Origin:
    """The settings of a folder, and the model that was read from it."""

    settings: Mapping[str, Any]
    """config.json of the folder; empty if there was none."""
    model: Mapping[str, Any]
    """Our model config, encoded."""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json of the folder."""

    @staticmethod
    def of(settings: Mapping[str, Any], config: Any, generation: Mapping[str, Any]) -> Origin:
        return Origin(settings, encode(config), generation)

    def settings_of(self, form: Form, config: Any, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Return config.json for an export. write: our config → config.json without an origin."""
        now = write(config)
        if self.settings.get("model_type") != form.model_type or self.model.get("family") != config.family:
            return now
        before = write(decode(form.config, self.model))
        new = {*_NEW, *(key for key in _TOKENIZERS if self.settings.get(key) is None)}
        changed = {k: v for k, v in now.items() if k in new or k not in before or before[k] != v}
        gone = {*_OUT, *(before.keys() - now.keys())}
        return {key: value for key, value in self.settings.items() if key not in gone} | changed

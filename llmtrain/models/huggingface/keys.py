"""Keys of config.json that a form did not read: refused if they change what transformers computes,
reported to the user if their meaning is unknown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmtrain.models.bert.config import BertConfig
from llmtrain.models.huggingface.form import Form, Settings
from llmtrain.models.huggingface.generation_keys import HEEDED, OF_NO_EFFECT, PLAIN
from llmtrain.models.huggingface.windows import FULL

_OF_NO_EFFECT = frozenset(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "_sliding_window_pattern",
        "architectures",
        "attn_implementation",
        "boi_token_index",
        "chunk_size_feed_forward",
        "dense_act_fn",
        "dtype",
        "end_n_top",
        "eoi_token_index",
        "exported_by",
        "extra_pos_embeddings",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "image_token_index",
        "init_std",
        "initializer_factor",
        "initializer_range",
        "is_encoder_decoder",
        "is_gated_act",
        "label2id",
        "mem_len",
        "mm_tokens_per_image",
        "model_max_length",
        "model_type",
        "n_ctx",
        "n_positions",
        "name_or_path",
        "normalize_embedding",
        "num_hidden_layers",
        "num_labels",
        "original_max_position_embeddings",
        "out_features",
        "out_indices",
        "output_past",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "reorder_and_upcast_attn",
        "return_dict",
        "reuse_len",
        "rope_parameters",
        "same_length",
        "stage_names",
        "start_n_top",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "use_bfloat16",
        "use_mems_eval",
        "use_mems_train",
        "vision_config",
        "vocab_size",
        # Reported when text is generated.
        *HEEDED,
        *PLAIN,
        *OF_NO_EFFECT,
    )
)
"""Keys that do not affect this model: they are overridden by others, or concern only state carried across
rows, heads for question answering, or images."""
_ENDINGS = ("_token_id", "dropout", "pdrop", "_dropout_prob", "layerdrop", "dropout_rate")
_BEGINNINGS = ("summary_", "unsloth_", "transformers.js")
_CHANGING: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "sliding_window": (),
}
"""Key → values besides null that have no effect; in transformers these keys affect any model."""


class Asked(Mapping[str, Any]):
    """Content of config.json that records which keys were read."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self._asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return self._content[key]

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return key in self._content

    def unasked(self) -> dict[str, Any]:
        """Return the content that was not read."""
        return {key: value for key, value in self._content.items() if key not in self._asked}

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


def unknown_keys(form: Form, theirs: Settings) -> tuple[str, ...]:
    """Return the keys of `theirs`, whose content is an Asked, that were not read and may have an effect. Skip
    values that are null, false or empty. Call it after all keys were read.

    Raise CheckpointError for keys that are known to have an effect.
    """
    assert isinstance(theirs.content, Asked)
    unasked = theirs.content.unasked()
    for key, allowed in _CHANGING.items():
        if key in unasked:
            theirs.require(key, *allowed)
    if "is_causal" in unasked and form.config is not BertConfig:
        theirs.require("is_causal", True)
    kinds = unasked.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != FULL for kind in kinds)):
        raise theirs.refusal("layer_types", f"{FULL} alone: {form.model_type} has no other layers")
    return tuple(
        f"{theirs.prefix}{key}"
        for key, value in unasked.items()
        if value
        and key not in _OF_NO_EFFECT | _CHANGING.keys() | {"is_causal", "layer_types"}
        and not key.endswith(_ENDINGS)
        and not key.startswith(_BEGINNINGS)
    )

"""Keys of a config.json that a form did not ask for: refused where they change what transformers computes,
told to the user where nobody knows what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmtrain.checkpoint.forms.base import Form, Settings
from llmtrain.checkpoint.forms.windows import FULL
from llmtrain.models.bert_config import BertConfig

_OF_NO_EFFECT = (
    *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "exported_by"),
    *(
        "_name_or_path",
        "name_or_path",
        "tokenizer_class",
        "model_max_length",
        "vocab_size",
        "n_ctx",
        "prefix",
    ),
    *("use_cache", "return_dict", "return_dict_in_generate", "output_scores", "output_past", "torchscript"),
    *(
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "use_bfloat16",
        "prefix",
    ),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
    *("initializer_range", "initializer_factor", "init_std", "gradient_checkpointing", "pretraining_tp"),
    "prefix",
    *("is_encoder_decoder", "chunk_size_feed_forward", "reorder_and_upcast_attn", "num_hidden_layers"),
    # Where rope_scaling wins over it.
    "rope_parameters",
    # XLNet's, of texts that go on from row to row and of heads for answers.
    *("mem_len", "reuse_len", "same_length", "use_mems_eval", "use_mems_train", "start_n_top", "end_n_top"),
    # T5's and BART's, which follow from other keys or are what the model has anyway.
    *("dense_act_fn", "n_positions", "normalize_embedding", "extra_pos_embeddings", "output_past"),
    # Of generation, where releases before generation_config.json had them.
    *("max_length", "min_length", "num_beams", "length_penalty", "no_repeat_ngram_size", "early_stopping"),
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "diversity_penalty"),
    *("num_beam_groups", "num_return_sequences", "encoder_no_repeat_ngram_size"),
)
_ENDINGS = ("_token_id", "dropout", "pdrop", "_dropout_prob", "layerdrop", "dropout_rate")
_BEGINNINGS = ("summary_", "unsloth_", "transformers.js")
_CHANGING: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "sliding_window": (),
}
"""Key → the values besides null that change nothing; in transformers they say something in every model."""


class Asked(Mapping[str, Any]):
    """A config.json's content, and which of its keys somebody asked for."""

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
        """What nobody asked for."""
        return {key: value for key, value in self._content.items() if key not in self._asked}

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


def unknown_keys(form: Form, theirs: Settings, asked: Asked) -> tuple[str, ...]:
    """Those that nobody asked for and that are not known to be of no effect, but for null, false and what is
    empty. To be called when all was asked for.

    Raises CheckpointError for those that are known to have one.
    """
    unasked = asked.unasked()
    for key, allowed in _CHANGING.items():
        if key in unasked:
            theirs.require(key, *allowed)
    if "is_causal" in unasked and form.config is not BertConfig:
        theirs.require("is_causal", True)
    if set(unasked.get("layer_types") or ()) - {FULL}:
        raise theirs.refusal("layer_types", f"{FULL} alone: {form.model_type} has no other layers")
    return tuple(
        key
        for key, value in unasked.items()
        if value
        and key not in (*_OF_NO_EFFECT, *_CHANGING, "is_causal", "layer_types")
        and not key.endswith(_ENDINGS)
        and not key.startswith(_BEGINNINGS)
    )

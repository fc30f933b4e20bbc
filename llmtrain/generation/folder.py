"""What a folder's generation_config.json says, as `generate` takes it. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TOP_K = 50
"""Of transformers, where a model is to be sampled and top_k is not said."""
_HEEDED = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "max_length",
    "max_new_tokens",
    "min_new_tokens",
)
_OF_NO_EFFECT = (
    "use_cache",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "num_return_sequences",
    "cache_implementation",
    "trust_remote_code",
)
"""On what is written."""
_PLAIN: dict[str, Any] = {
    "min_length": 0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "diversity_penalty": 0.0,
    "num_beam_groups": 1,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "guidance_scale": 1.0,
}
"""Keys that `generate` has not → the value that changes nothing, where it is not null."""


def end_ids(said: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the tokens any of which ends a text; none where nothing is said."""
    ends = said.get("eos_token_id")
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list) else (int(ends),)


def unheeded(said: Mapping[str, Any]) -> list[str]:
    """key=value of what would change the text, and `generate` has not."""
    found = []
    for key, value in said.items():
        is_id = key.endswith("_token_id") and not key.startswith("forced_")
        if is_id or key in _HEEDED or key in _OF_NO_EFFECT or value in (None, [], {}, _PLAIN.get(key)):
            continue
        found.append(f"{key}={value}")
    if said.get("do_sample") and (said.get("num_beams") or 1) > 1:
        found.append("do_sample=True with num_beams")
    if said.get("early_stopping") == "never":
        found.append("early_stopping=never")
    return found

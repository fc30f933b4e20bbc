"""Configuration of text generation, by sampling or beam search. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.generation.folder import TOP_K

TEMPERATURE = 0.8
"""Default temperature of continuations."""
NEW_TOKENS = 128


@dataclass(frozen=True)
class GenerateConfig:
    """Length and decoding method of generated text.

    A key that is null takes the value of generation_config.json in the folder of the model, or else the
    default given here."""

    max_new_tokens: int | None = None
    """Maximum number of tokens after each prompt; an end token stops earlier. null: 128."""
    min_new_tokens: int | None = None
    """Minimum number of tokens before an end token is allowed. null: 0."""
    temperature: float | None = None
    """Sampling temperature. 0: always take the most likely token (greedy). 1: sample from the distribution of
    the model. null: 0.8; 0 with beams and for encoder–decoder models."""
    top_k: int | None = None
    """Sample from the k most likely tokens. null: from all tokens."""
    top_p: float | None = None
    """Nucleus sampling: sample from the smallest set of most likely tokens whose probabilities reach this sum
    (arXiv:1904.09751). null: from all tokens."""
    repetition_penalty: float | None = None
    """Divide positive logits of tokens that already occur in the text by this factor, multiply negative ones
    by it (arXiv:1909.05858). null: 1, no penalty."""
    num_beams: int | None = None
    """Number of beams of beam search. null: 1, no beam search."""
    length_penalty: float | None = None
    """Exponent of the length in the score of a beam, Σ log p / length^length_penalty, with the end token
    included in the length; larger values favor longer texts. null: 1."""
    early_stopping: bool | None = None
    """End of beam search. true: as soon as num_beams texts are finished. false or null: when the best open
    text, scored at its current length, is worse than all of them."""
    seed: int = 0
    """Seed of the random numbers for sampling."""
    batch_size: int = 16
    """Maximum number of prompts in a batch; prompts of equal length, or sources of similar length, run
    together."""

    def resolved(
        self, *, has_sources: bool, folder_settings: Mapping[str, Any] = MappingProxyType({})
    ) -> GenerateConfig:
        """Return the config with values instead of null, except for top_k and top_p.

        has_sources: whether prompts are sources of an encoder–decoder model.
        folder_settings: generation_config.json of the model's folder; its values replace null if they belong
        to the decoding method in use, sampling or beam search.
        """
        is_explicit = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        num_beams = _first(self.num_beams, None if is_explicit else folder_settings.get("num_beams"), 1)
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if has_sources or num_beams > 1 else TEMPERATURE
            if num_beams == 1 and folder_settings.get("do_sample"):
                temperature = _first(folder_settings.get("temperature"), 1.0)
            elif folder_settings.get("do_sample") is False and not is_explicit:
                temperature = 0.0
        top_k, top_p = self.top_k, self.top_p
        if temperature > 0 and folder_settings.get("do_sample"):
            top_k = top_k if top_k is not None else _first(folder_settings.get("top_k"), TOP_K) or None
            top_p = top_p if top_p is not None else folder_settings.get("top_p")
        of_beams = folder_settings if num_beams > 1 else {}
        early_stopping = _first(self.early_stopping, of_beams.get("early_stopping"), False)
        return replace(
            self,
            max_new_tokens=_first(self.max_new_tokens, folder_settings.get("max_new_tokens"), NEW_TOKENS),
            min_new_tokens=_first(self.min_new_tokens, folder_settings.get("min_new_tokens"), 0),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=_first(
                self.repetition_penalty, folder_settings.get("repetition_penalty"), 1.0
            ),
            num_beams=num_beams,
            length_penalty=_first(self.length_penalty, of_beams.get("length_penalty"), 1.0),
            early_stopping=early_stopping is True,
        )

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def problems(self) -> Iterator[Problem]:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            value = getattr(self, name)
            allowed = "1 or more" if name == "batch_size" else "1 or more, or null"
            yield from require(value is None or value >= 1, name, value, allowed)
        allowed = f"0 up to max_new_tokens={self.new_tokens}, or null"
        short_enough = self.min_new_tokens is None or 0 <= self.min_new_tokens <= self.new_tokens
        yield from require(short_enough, "min_new_tokens", self.min_new_tokens, allowed)
        yield from require(
            self.temperature is None or self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 or more, or null",
        )
        yield from require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "1 or more, or null")
        yield from require(
            self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1, or null"
        )
        penalty = self.repetition_penalty
        yield from require(
            penalty is None or penalty > 0, "repetition_penalty", penalty, "more than 0, or null"
        )
        num_beams = self.num_beams or 1
        if num_beams > 1:
            got, remedy = self.temperature, "beams are not sampled: leave it out, or give num_beams=1"
            yield from require(not got, "temperature", got, f"0 with num_beams={num_beams}", remedy)
        if num_beams > 1 or self.temperature == 0:
            reason = f"num_beams={num_beams}" if num_beams > 1 else "temperature=0"
            remedy = "give num_beams=1" if num_beams > 1 else "set a temperature, such as 0.8"
            for name in ("top_k", "top_p"):
                value = getattr(self, name)
                yield from require(value is None, name, value, f"null with {reason}", remedy)
        if self.num_beams == 1:
            for name, plain in (("length_penalty", 1.0), ("early_stopping", False)):
                value = getattr(self, name)
                allowed = f"{str(plain).lower()} with num_beams=1"
                yield from require(value in (None, plain), name, value, allowed, "give num_beams, such as 4")


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next(value for value in values if value is not None)

"""How a trained model writes: what a person asks for, and what the folder says that it came from."""

from __future__ import annotations

from dataclasses import replace

from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.folder import end_ids, unsupported_settings
from llmtrain.interchange.trained import TrainedModel, listed
from llmtrain.models.registry import family_of
from llmtrain.standard_streams import print_note


def text_ends(trained: TrainedModel, eos_id: int) -> tuple[int, ...]:
    """Return the ids any of which ends a text that it writes: those of the folder that it came from, and what
    ended the texts that it was trained on here. eos_id: of its tokenizer, where no folder says any."""
    said = () if trained.origin is None else end_ids(trained.origin.generation)
    if said and trained.own_end_id is None:
        return said
    return tuple(dict.fromkeys((*said, eos_id, *trained.objective.end_ids)))


def resolved_for(trained: TrainedModel, config: GenerateConfig, longest: int) -> GenerateConfig:
    """Return `config` with what the folder says where it says nothing. longest: tokens of a prompt."""
    said = {} if trained.origin is None else trained.origin.generation
    if ignored := unsupported_settings(said):
        print_note(f"note: ignored generation settings of the folder: {listed(ignored)}")
    has_sources = family_of(trained.config).reads_sources
    settings = config.resolved(has_sources=has_sources, folder_settings=said)
    if config.max_new_tokens is not None or not said:
        return settings
    # A target begins with a token that counts.
    used = 1 if has_sources else longest
    room = [trained.config.longest_row]
    if said.get("max_new_tokens") is None:
        room.append(said.get("max_length"))
    fitting = min([length - used for length in room if length is not None], default=settings.new_tokens)
    return replace(settings, max_new_tokens=max(1, min(settings.new_tokens, fitting)))

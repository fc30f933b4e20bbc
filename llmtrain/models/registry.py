"""Registry of model families: those of this package, and those of other packages, each named by an entry
point in the group `llmtrain.families`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llmtrain.config import show
from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.models import (
    adversarial,
    bert,
    convolutional,
    encoder_decoder,
    feedforward,
    gpt,
    recurrent,
    recurrent_seq2seq,
    xlnet,
)
from llmtrain.models.family import Family
from llmtrain.nn.model_config import ModelConfig

FAMILIES = (
    *gpt.FAMILIES,
    *bert.FAMILIES,
    *xlnet.FAMILIES,
    *encoder_decoder.FAMILIES,
    *recurrent.FAMILIES,
    *recurrent_seq2seq.FAMILIES,
    *convolutional.FAMILIES,
    *feedforward.FAMILIES,
    *adversarial.FAMILIES,
)


@cache
def families() -> dict[str, Family]:
    """Return name → family. Raise ConfigError for an installed family that cannot be loaded, whose name is
    taken, or whose folder of presets does not exist."""
    found = {family.name: family for family in FAMILIES}
    for entry in entry_points(group="llmtrain.families"):
        try:
            family = entry.load()
        except Exception as error:
            raise _refusal(entry.value, f"{type(error).__name__}: {error}", "an importable Family") from error
        if not isinstance(family, Family) or family.name in found:
            got = f"family {family.name}" if isinstance(family, Family) else type(family).__name__
            raise _refusal(entry.value, got, f"a Family with another name than {', '.join(found)}")
        if family.presets is not None and not family.presets.is_dir():
            allowed = "a folder with model/NAME.yaml"
            raise _refusal(entry.value, f"presets={family.presets}", allowed)
        found[family.name] = family
    return found


def preset_folders() -> list[Path]:
    """Return the folders of presets that installed families bring. Raise ConfigError as `families` does."""
    return [family.presets.absolute() for family in families().values() if family.presets is not None]


def _refusal(where: str, got: str, allowed: str) -> ConfigError:
    return ConfigError(Problem(f"entry point {where}", got, allowed, "fix or uninstall its package"))


def family_of(model: ModelConfig) -> Family:
    return families()[model.family]


def model_config_type(section: Mapping[str, Any]) -> type[ModelConfig]:
    """Return the config class for a `model` section, by its `family`. Raise ConfigError if it is unknown."""
    name = section.get("family", "gpt")
    if not isinstance(name, str) or name not in families():
        raise ConfigError(Problem("model.family", show(name), nearest(str(name), list(families()))))
    return families()[name].config

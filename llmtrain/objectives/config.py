"""What each objective is called and takes: frozen dataclasses, free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llmtrain.errors import ConfigError, Problem, nearest


@dataclass(frozen=True)
class CausalLMConfig:
    """Predict each token from those before it."""

    kind: Literal["causal_lm"] = "causal_lm"


@dataclass(frozen=True)
class ClassificationConfig:
    """Predict one label a sample."""

    kind: Literal["classification"] = "classification"


ObjectiveConfig = CausalLMConfig | ClassificationConfig

OBJECTIVE_CONFIGS: dict[str, type[CausalLMConfig] | type[ClassificationConfig]] = {
    "causal_lm": CausalLMConfig,
    "classification": ClassificationConfig,
}


def objective_config_type(section: Mapping[str, Any]) -> type[CausalLMConfig] | type[ClassificationConfig]:
    """The dataclass of an `objective` section, by its `kind`; raises ConfigError for an unknown one."""
    kind = section.get("kind", "causal_lm")
    if kind not in OBJECTIVE_CONFIGS:
        raise ConfigError(Problem("objective.kind", repr(kind), nearest(str(kind), list(OBJECTIVE_CONFIGS))))
    return OBJECTIVE_CONFIGS[kind]

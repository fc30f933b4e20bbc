"""Registry of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.config import show
from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.adversarial import AdversarialConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.causal_lm import CausalLMConfig
from llmtrain.objectives.classification import ClassificationConfig
from llmtrain.objectives.columns import ColumnsConfig
from llmtrain.objectives.denoising import DenoisingConfig
from llmtrain.objectives.image_classification import ImageClassificationConfig
from llmtrain.objectives.instruct import InstructConfig
from llmtrain.objectives.masked_lm import MaskedLMConfig
from llmtrain.objectives.multi_task import MultiTaskConfig
from llmtrain.objectives.paired_text import PairedTextConfig
from llmtrain.objectives.permuted_lm import PermutedLMConfig
from llmtrain.objectives.preferences import PreferenceConfig
from llmtrain.objectives.prompted import PromptedConfig
from llmtrain.objectives.question_answering import QuestionAnsweringConfig
from llmtrain.objectives.regression import RegressionConfig
from llmtrain.objectives.span_corruption import SpanCorruptionConfig
from llmtrain.objectives.tagging import TaggingConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "causal_lm": CausalLMConfig,
    "mlm": MaskedLMConfig,
    "permuted_lm": PermutedLMConfig,
    "seq2seq": PairedTextConfig,
    "span_corruption": SpanCorruptionConfig,
    "denoising": DenoisingConfig,
    "image_classification": ImageClassificationConfig,
    "columns": ColumnsConfig,
    "adversarial": AdversarialConfig,
    "classification": ClassificationConfig,
    "regression": RegressionConfig,
    "tagging": TaggingConfig,
    "question_answering": QuestionAnsweringConfig,
    "instruct": InstructConfig,
    "dpo": PreferenceConfig,
    "prompted": PromptedConfig,
    "multi_task": MultiTaskConfig,
}
"""`objective.kind` → config class."""


def objective_config_type(section: Mapping[str, Any]) -> type[ObjectiveConfig]:
    """Return the config class for an `objective` section, by its `kind`. Raise ConfigError if it is
    unknown."""
    kind = section.get("kind")
    if not isinstance(kind, str) or kind not in OBJECTIVES:
        allowed = nearest(str(kind), list(OBJECTIVES))
        raise ConfigError(Problem("objective.kind", show(kind), allowed, "give objective=…"))
    return OBJECTIVES[kind]


def objective_of_head(head: TaskHeadConfig) -> ObjectiveConfig:
    """Return the fine-tuning objective that trains such a head."""
    labels = head.labels
    if head.kind in ("classes", "labels"):
        return ClassificationConfig(multi_label=head.kind == "labels", labels=labels)
    if head.kind == "values":
        return RegressionConfig(labels=labels)
    return TaggingConfig(labels=labels) if head.kind == "tags" else QuestionAnsweringConfig()

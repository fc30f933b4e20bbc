"""Convert runs and manifests from before objectives had a section of their own, and their present names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain.corpus.config import PRESENT_KEYS


def with_objective(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of version 2 or 3 with the objective in a section of its own, under its present
    name."""
    found = dict(description)
    if isinstance(description.get("config"), Mapping):
        found["config"] = run_with_objective(description["config"])
    if isinstance(description.get("model"), Mapping):
        found["model"], _ = separated(description["model"])
    return found


def run_with_objective(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with an `objective` section, which used to be inside the `model`
    section."""
    if "objective" in config or not isinstance(config.get("model"), Mapping):
        return _with_present_names(config)
    model, objective = separated(config["model"])
    found = {**config, "model": model} | ({} if objective is None else {"objective": objective})
    return _with_present_names(found)


def _with_present_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration with the present names of keys of its data, and of the objective of
    images, which was `classification`."""
    if isinstance(data := config.get("data"), Mapping):
        config = {**config, "data": {PRESENT_KEYS.get(key, key): value for key, value in data.items()}}
    model, objective = config.get("model"), config.get("objective")
    if not isinstance(model, Mapping) or not isinstance(objective, Mapping):
        return dict(config)
    if (model.get("family"), objective.get("kind")) != ("simple_cnn", "classification"):
        return dict(config)
    return {**config, "objective": {**objective, "kind": "image_classification"}}


def separated(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return a `model` section without the objective, and the `objective` section, or None if there was
    none. The model's heads and number of sentinels used to follow from the objective."""
    rest = dict(model)
    given = rest.pop("objective", None)
    family = rest.get("family", "gpt")
    if not isinstance(given, Mapping):
        kinds = {"gpt": "causal_lm", "lstm": "causal_lm", "simple_cnn": "image_classification"}
        return rest, {"kind": kinds[family]} if isinstance(family, str) and family in kinds else None
    if family == "bert":
        rest["pair_head"] = given.get("pairs", "none") != "none"
        return rest, {**given, "kind": "mlm"}
    if family == "xlnet":
        return rest, {**given, "kind": "permuted_lm"}
    kind = given.get("kind", "pairs")
    kind = "seq2seq" if kind == "pairs" or not isinstance(kind, str) else kind
    keys = {
        "seq2seq": ("target_length",),
        "span_corruption": ("mean_span", "share", "num_sentinels"),
        "denoising": ("mean_span", "infilling", "masking", "deletion", "permutation", "rotation"),
    }
    if rest.get("sentinel_id") is not None:
        rest["num_sentinels"] = given.get("num_sentinels", 100)
    return rest, {key: given[key] for key in keys.get(kind, ()) if key in given} | {"kind": kind}

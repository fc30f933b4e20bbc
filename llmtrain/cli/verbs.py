"""The verbs of the command line: the module that runs each, its configuration, and its arguments.

Free of Hydra and of the modules named, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from llmtrain.errors import ConfigError, Problem, nearest

VERBS: dict[str, tuple[str, str]] = {
    "prepare": ("llmtrain.commands.prepare", "raw text → tokenizer and corpus"),
    "plan": ("llmtrain.commands.plan", "will it run, fit, and how fast; plan search: the best layout"),
    "train": ("llmtrain.commands.train", "corpus → trained model; resumes by itself"),
    "finetune": ("llmtrain.commands.finetune", "model and labelled texts → a model for a task"),
    "evaluate": ("llmtrain.commands.evaluate", "loss, perplexity and bits per byte of a trained model"),
    "predict": ("llmtrain.commands.predict", "what a fine-tuned model says of each row of a file"),
    "generate": ("llmtrain.commands.generate", "text from a trained language model"),
    "import": ("llmtrain.commands.import_", "Hugging Face folder or GGUF file → checkpoint"),
    "export": ("llmtrain.commands.export", "trained model → Hugging Face folder"),
    "checkpoint": ("llmtrain.commands.checkpoint", "verify, show, compare, export or prune checkpoints"),
    "preflight": ("llmtrain.commands.preflight", "before a run: is any host, GPU or link broken or slow"),
    "status": ("llmtrain.commands.status", "where a run is, in a second"),
    "report": ("llmtrain.commands.report", "runs → one HTML page: curves, events, differences"),
    "data": ("llmtrain.commands.data", "which documents made a step, what they say, one hash over a run's"),
    "vectors": ("llmtrain.commands.vectors", "word vectors: nearest words, figures, maps, files in and out"),
}
"""Verb → its module, which has a function `run(mapping)`, and what it does."""

SECOND_VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "plan": {
        "search": ("", "all legal layouts of a model on a cluster → the best, as overrides to paste"),
        "calibrate": ("", "measure this machine → a cluster file output=FILE.yaml"),
    },
    "checkpoint": {
        "verify": ("PATH", "files by size and checksum, tensors whole; exits with 2 when one is damaged"),
        "show": ("PATH", "step, model, layout it was saved under, files, tensors"),
        "diff": ("PATH OTHER", "how far two are apart, tensor by tensor; exits with 1 when they differ"),
        "export": ("PATH", "→ Hugging Face folder output=…"),
        "prune": ("PATH", "delete what keep_last, keep_best and keep_every do not keep"),
    },
    "data": {
        "trace": ("RUN", "the documents of step=…; exits with 1 when the data have changed since"),
        "show": ("[RUN]", "samples of step=…, or the first of data.path=…, as text"),
        "digest": ("RUN", "one hash over what the first steps=… consumed"),
    },
    "vectors": {
        "nearest": ("CHECKPOINT", "the words nearest to word=…"),
        "analogy": ("CHECKPOINT", "accuracy on the analogies of file=…, or the answer to words=[a,b,c]"),
        "similarity": (
            "CHECKPOINT",
            "Spearman's ρ on the judged pairs of file=…, or the cosine of words=[a,b]",
        ),
        "map": ("CHECKPOINT", "words in two dimensions → output=….png, and TensorBoard's projector=FOLDER"),
        "export": ("CHECKPOINT", "→ output=FILE in format=text, binary or gensim"),
        "import": ("INPUT", "file of vectors → checkpoint output=FOLDER"),
    },
}
"""Verb → second verb → the keys whose values may stand as plain words before the overrides (optional ones in
brackets), and what it does. Each has a function in the verb's module and a file conf/VERB_SECOND.yaml."""

STANDS_ALONE = {"plan"}
"""Verbs that have second verbs, and also do something without one."""

RENAMED = {"plan_search": {f"objective={each}": f"rank_by={each}" for each in ("time", "memory", "cost")}}
"""Name of a configuration → an argument → the override that it stands for."""

PLAIN_WORDS = {"status": "RUN", "report": "RUNS"}
"""Verb → the key whose value, or several values (…S), may stand as plain words before the overrides."""

CONFIGS: dict[str, tuple[str, ...]] = {
    "prepare": ("llmtrain.prepare.config:PrepareConfig",),
    "train": (
        "llmtrain.train.config:TrainConfig",
        "llmtrain.train.pretrained:PretrainedKeys",
        "llmtrain.train.vectors_config:VectorRunConfig",
    ),
    "finetune": ("llmtrain.train.config:TrainConfig", "llmtrain.train.pretrained:PretrainedKeys"),
    "plan": (
        "llmtrain.train.config:TrainConfig",
        "llmtrain.train.pretrained:PretrainedKeys",
        "llmtrain.plan.keys:PlanKeys",
    ),
    "plan_search": (
        "llmtrain.train.config:TrainConfig",
        "llmtrain.train.pretrained:PretrainedKeys",
        "llmtrain.plan.keys:SearchKeys",
    ),
    "plan_calibrate": ("llmtrain.preflight.config:CalibrateConfig",),
    "evaluate": ("llmtrain.commands.evaluate:EvaluateConfig",),
    "predict": ("llmtrain.commands.predict:PredictConfig",),
    "generate": ("llmtrain.commands.generate:GenerateCommandConfig",),
    "import": ("llmtrain.commands.import_:ImportConfig",),
    "export": ("llmtrain.commands.export:ExportConfig",),
    "preflight": ("llmtrain.preflight.config:PreflightConfig",),
    "status": ("llmtrain.commands.status:StatusConfig",),
    "report": ("llmtrain.commands.report:ReportConfig",),
    "checkpoint_verify": ("llmtrain.commands.checkpoint:VerifyConfig",),
    "checkpoint_show": ("llmtrain.commands.checkpoint:ShowConfig",),
    "checkpoint_diff": ("llmtrain.commands.checkpoint:DiffConfig",),
    "checkpoint_export": ("llmtrain.commands.export:ExportConfig", "llmtrain.commands.checkpoint:ExportKeys"),
    "checkpoint_prune": ("llmtrain.commands.checkpoint:PruneConfig",),
    "data_trace": ("llmtrain.commands.data:TraceConfig",),
    "data_show": ("llmtrain.commands.data_show:ShowConfig",),
    "data_digest": ("llmtrain.commands.data:DigestConfig",),
    "vectors_nearest": ("llmtrain.commands.vectors:NearestConfig",),
    "vectors_analogy": ("llmtrain.commands.vectors:AnalogyConfig",),
    "vectors_similarity": ("llmtrain.commands.vectors:SimilarityConfig",),
    "vectors_map": ("llmtrain.commands.vectors:MapConfig",),
    "vectors_export": ("llmtrain.commands.vectors:ExportConfig",),
    "vectors_import": ("llmtrain.commands.vectors:ImportConfig",),
}
"""Name of a configuration → the dataclasses that hold its keys."""

DOES_MORE_THAN_PRINT = {
    "prepare",
    "predict",
    "train",
    "finetune",
    "import",
    "export",
    "plan_calibrate",
    "preflight",
    "report",
    "checkpoint_export",
    "checkpoint_prune",
    "vectors_map",
    "vectors_export",
    "vectors_import",
}
"""Verbs that go on when their output can no longer be written."""

FOLDERS = {
    "path": "a run folder or a checkpoint folder",
    "other": "a run folder or a checkpoint folder",
    "run": "a run folder",
    "runs": "run folders",
    "checkpoint": "a run folder, a checkpoint folder or a file of vectors",
    "input": "a file of vectors",
}
"""Key of a plain word before the overrides → what it may be."""


def second_verb(verb: str, arguments: list[str]) -> tuple[str, list[str]]:
    """Return the name of the configuration of `VERB SECOND PATH …`, and the arguments with `path=PATH`.

    Raises ConfigError for an unknown second verb and for a missing path.
    """
    second, *rest = arguments
    if second not in SECOND_VERBS[verb]:
        known = nearest(second, list(SECOND_VERBS[verb]))
        raise ConfigError(Problem(f"llmtrain {verb}", repr(second), known, f"see llmtrain {verb} --help"))
    words = SECOND_VERBS[verb][second][0]
    for key, is_needed in word_keys(words).items():
        if rest and is_path(rest[0]):
            rest = [*rest[1:], f"{key}={rest[0]}"]
        elif is_needed and not any(word.startswith((f"{key}=", "-")) for word in rest):
            raise ConfigError(Problem(key, "nothing", FOLDERS[key], f"llmtrain {verb} {second} {words}"))
    renamed = RENAMED.get(f"{verb}_{second}", {})
    return f"{verb}_{second}", [renamed.get(word, word) for word in rest]


def has_second_verb(verb: str, arguments: list[str]) -> bool:
    """Return whether the first argument is, or should be, a second verb of `verb`."""
    if verb not in STANDS_ALONE:
        return verb in SECOND_VERBS
    return bool(arguments) and is_path(arguments[0])


def is_path(word: str) -> bool:
    """Return whether a word of the command line is a path. It may contain `=`; a key contains no `/`."""
    return not word.startswith("-") and ("/" in word.partition("=")[0] or "=" not in word)


def with_plain_words(verb: str, arguments: list[str]) -> list[str]:
    """Return the arguments with the plain words before the overrides as an override.

    Raise ConfigError for several where one is taken."""
    words = list(itertools.takewhile(is_path, arguments))
    rest = arguments[len(words) :]
    key = PLAIN_WORDS[verb].lower()
    if not words:
        return rest
    if key.endswith("s"):
        quoted = ",".join(json.dumps(word, ensure_ascii=False) for word in words)
        return [f"{key}=[{quoted}]", *rest]
    if len(words) > 1:
        raise ConfigError(Problem(f"llmtrain {verb}", repr(words[1]), f"{FOLDERS[key]}, one, then key=value"))
    return [f"{key}={words[0]}", *rest]


def word_keys(words: str) -> dict[str, bool]:
    """Return whether each key must be given: "PATH [OTHER]" → {"path": True, "other": False}."""
    return {word.strip("[]").lower(): not word.startswith("[") for word in words.split()}


def runner(name: str) -> Callable[[Mapping[str, Any]], int | None]:
    """Return the function that runs a composed configuration of this name; it may return an exit code."""
    verb, _, function = name.partition("_")
    module = importlib.import_module(VERBS[verb][0])
    # A second verb that is a word of Python has an underscore behind it.
    return getattr(module, f"{function}_" if hasattr(module, f"{function}_") else function or "run")


def has_model_group(name: str) -> bool:
    """Return whether the configuration of this name has presets of models."""
    return any(field.name == "model" for config in config_types(name) for field in fields(config))


def config_types(name: str) -> list[type]:
    """Return the dataclasses that hold the keys of the configuration of this name."""
    found = []
    for path in CONFIGS[name]:
        module, _, cls = path.partition(":")
        found.append(getattr(importlib.import_module(module), cls))
    return found

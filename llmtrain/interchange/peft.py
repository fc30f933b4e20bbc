"""PEFT folders, in and out: what LoRA added to a Hugging Face model, without that model.

adapter_config.json         the settings; names of the matrices
adapter_model.safetensors   `base_model.model.NAME.lora_A.weight` (R, I) and `lora_B` (O, R), and heads
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtrain import files
from llmtrain.adapt.config import Addition
from llmtrain.errors import CheckpointError, ConfigError, Problem
from llmtrain.interchange import virtual_tokens
from llmtrain.interchange.forms import form_of
from llmtrain.interchange.huggingface import tokenizer_of, write_contents
from llmtrain.interchange.products import Product, is_by_inputs, products_in, theirs_of
from llmtrain.interchange.trained import TrainedModel
from llmtrain.models.skeleton import of_vocabulary, skeleton_of
from llmtrain.nn.initialize import added_to
from llmtrain.nn.linear import Linear
from llmtrain.optim.groups import HEAD
from llmtrain.standard_streams import print_note

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {"classes": "SEQ_CLS", "labels": "SEQ_CLS", "values": "SEQ_CLS", "tags": "TOKEN_CLS"}


def export_peft(trained: TrainedModel, output: Path, *, overwrite: bool = False) -> None:
    """Write the folder that PeftModel.from_pretrained loads over the base, complete or not at all.

    Raise ConfigError for an addition that PEFT has no form for, and for matrices that transformers has in
    another; CheckpointError for an output that holds something else or is not writable.
    """
    adaptation: Addition | None = trained.config.adaptation
    _refuse_what_peft_lacks(trained)
    if adaptation is not None and adaptation.virtual_tokens and trained.config.task is None:
        _export_virtual(trained, adaptation, output.absolute(), overwrite)
        return
    if adaptation is None or not adaptation.fits_into_matrices:
        method = "another method" if adaptation is None else f"method={adaptation.method}"
        got = f"peft, with {trained.source}, trained by {method}"
        allowed = "PEFT has a form for LoRA, and for prefixes and prompts of language models"
        raise ConfigError(Problem("form", got, "merged" if adaptation is None else "", allowed))
    model = skeleton_of(trained.config)
    came_from = None if trained.origin is None else trained.origin.settings.get("model_type")
    entries = form_of(trained.config, came_from).entries(trained.config)
    products, weights = products_in(model), trained.weights
    matrices = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    added: dict[str, Product] = {}
    names: list[str] = []
    by_inputs = False
    heads: dict[str, Tensor] = {}
    vocabulary: dict[str, Tensor] = {}
    of_tokens = set(of_vocabulary(trained.config, model)) - trained.left_out
    for entry in entries:
        if entry.ours in of_tokens and trained.base is not None:
            parts = entry.split_all([weights[name] for name in entry.all_ours])
            vocabulary |= dict(zip(entry.theirs, parts, strict=True))
        if entry.ours.startswith(f"{HEAD}.") and trained.config.task is not None:
            parts = entry.split_all([weights[name] for name in entry.all_ours])
            heads |= dict(zip(entry.theirs, parts, strict=True))
        if entry.ours.removesuffix(".weight") not in matrices:
            continue
        names += [name.removesuffix(".weight") for name in entry.theirs]
        found = theirs_of(entry, products, weights, model)
        if any(not name.endswith(".weight") for name in found):
            got = f"LoRA of {entry.ours}, which transformers holds as {entry.theirs[0]}"
            raise ConfigError(Problem("form", f"peft, with {got}", "merged", "PEFT adds to matrices alone"))
        added |= {name.removesuffix(".weight"): product for name, product in found.items()}
        by_inputs |= bool(found) and is_by_inputs(entry, model)
    settings = _settings(trained, adaptation, added, names, list(heads), by_inputs)
    scale = {name: _scale(settings, name) for name in added}
    tensors = {f"{PREFIX}{name}": weight for name, weight in (heads | vocabulary).items()}
    for name, product in added.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = product.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = product.b / scale[name]
    contents: dict[str, Any] = {}
    if vocabulary and trained.tokenizer_path is not None:
        template = trained.objective.chat_template
        _, contents = tokenizer_of(trained.config, trained.tokenizer_path, template)
    _write(output.absolute(), settings, tensors, overwrite, contents)
    if vocabulary:
        size = len(next(iter(vocabulary.values())))
        print_note(f"its vocabulary has grown: PEFT loads it over base.resize_token_embeddings({size})")


def _refuse_what_peft_lacks(trained: TrainedModel) -> None:
    """Raise ConfigError where other weights than additions and the head of a task were trained."""
    own = HEAD if trained.config.task is not None else None
    skeleton = skeleton_of(trained.config)
    added = added_to(skeleton).keys() | set(of_vocabulary(trained.config, skeleton))
    others = [
        name
        for name in trained.weights
        if name not in added and name not in trained.left_out and name.partition(".")[0] != own
    ]
    if trained.base is not None and others:
        got = f"peft, with {trained.source}, which trained {others[0]} too"
        raise ConfigError(Problem("form", got, "merged"))


def _export_virtual(trained: TrainedModel, config: Addition, output: Path, overwrite: bool) -> None:
    model = skeleton_of(trained.config)
    settings = {
        **virtual_tokens.settings(config, model),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "" if trained.base is None else trained.base.path,
        "inference_mode": True,
    }
    matrix = virtual_tokens.to_peft(trained.weights, model, config)
    _write(output, settings, {virtual_tokens.KEY: matrix}, overwrite)


def _settings(
    trained: TrainedModel,
    lora: Any,
    added: Mapping[str, Product],
    names: list[str],
    heads: list[str],
    by_inputs: bool,
) -> dict[str, Any]:
    """Return adapter_config.json. names: of all matrices of linear layers."""
    ranks = Counter(product.rank for product in added.values())
    rank = ranks.most_common(1)[0][0]
    others = {name: product.rank for name, product in added.items() if product.rank != rank}
    head = trained.config.task
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else TASKS.get(head.kind, "QUESTION_ANS"),
        "base_model_name_or_path": "" if trained.base is None else trained.base.path,
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": lora.dropout,
        "use_rslora": False,
        "rank_pattern": others,
        "alpha_pattern": {name: lora.scale * count for name, count in others.items()},
        "target_modules": _shortest(list(added), names),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in heads}) or None,
        "fan_in_fan_out": by_inputs,
        "bias": "none",
        "inference_mode": True,
    }


def _shortest(chosen: list[str], names: list[str]) -> list[str]:
    """Return the last words of the names of the chosen matrices, where no other has the same, or else the
    names."""
    ends = {name.rpartition(".")[2] for name in chosen}
    same = {name for name in names if name.rpartition(".")[2] in ends}
    return sorted(ends) if same == set(chosen) else sorted(chosen)


def _scale(settings: Mapping[str, Any], name: str) -> float:
    """Return the factor of a product in PEFT."""
    alpha = settings["alpha_pattern"].get(name, settings["lora_alpha"])
    return float(alpha / settings["rank_pattern"].get(name, settings["r"]))


def _write(
    output: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    overwrite: bool,
    contents: Mapping[str, Any] = {},
) -> None:
    """contents: name → content of further files."""
    if output.exists() and any(output.iterdir()) and not (overwrite and (output / CONFIG).exists()):
        remedy = "choose another output" + (", or set overwrite=true" if (output / CONFIG).exists() else "")
        raise CheckpointError(Problem(str(output), "a folder with files", "a new or empty folder", remedy))
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        contiguous = {
            name: weight.detach().to(torch.float32).contiguous() for name, weight in tensors.items()
        }
        save_file(contiguous, partial / WEIGHTS, metadata={"format": "pt"})
        files.sync(partial / WEIGHTS)
        write_contents(partial, {**contents, CONFIG: settings})
        files.replace_folder(partial, output)
    except OSError as error:
        raise CheckpointError(
            files.disk_problem(error, output, if_full="make room, then export again")
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

"""Read a PEFT folder: what was added to the model of a Hugging Face folder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.adapt.config import LoraConfig, PrefixConfig, PromptConfig
from llmtrain.config import decode, require, short, show
from llmtrain.errors import CheckpointError, ConfigError, Problem
from llmtrain.interchange import huggingface, virtual_tokens
from llmtrain.interchange.forms import forms
from llmtrain.interchange.huggingface_weights import read_json
from llmtrain.interchange.peft import CONFIG, PREFIX, WEIGHTS
from llmtrain.interchange.products import Product, ours_of, products_in, shapes_of, values_of
from llmtrain.models.huggingface.form import Entry, Form, Settings
from llmtrain.models.skeleton import of_vocabulary, skeleton_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.reading import decode_file
from llmtrain.safetensors_files import open_safetensors

_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<which>[AB])(\.default)?\.weight")
_PLAIN = re.compile(r"\^?[\w.]+")
_SUFFIXES = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
_SUFFIXES["QUESTION_ANS"] = "ForQuestionAnswering"


@dataclass(frozen=True)
class _Settings:
    """The keys of adapter_config.json that change what is computed."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    num_virtual_tokens: int = 0
    prefix_projection: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        known = ("LORA", *virtual_tokens.KINDS.values())
        yield from require(self.peft_type in known, "peft_type", self.peft_type, ", ".join(known))
        if self.prefix_projection:
            yield Problem("prefix_projection", "true", "false, since projections are not read")
        if self.use_dora:
            yield Problem("use_dora", "true", "false, since magnitudes are not read")
        expressions = [key for key in self.alpha_pattern if not _PLAIN.fullmatch(key)]
        if expressions:
            yield Problem("alpha_pattern", show(expressions[0]), "names, not regular expressions")
        if self.bias != "none":
            yield Problem("bias", show(self.bias), "none")

    def scale(self, name: str, rank: int) -> float:
        """Return the factor of the product of a matrix."""
        alpha = _of_pattern(self.alpha_pattern, name, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True)
class ImportedPeft:
    """What a PEFT folder adds to its base."""

    config: ModelConfig
    """Of the model with the additions."""
    weights: Mapping[str, Tensor]
    """Canonical name → tensor of what is added, and of a head that replaces the base's."""
    left_out: frozenset[str]
    """Names of the weights of the base."""
    base: Path
    origin: Any


def is_peft(path: Path) -> bool:
    return (path / CONFIG).exists()


def import_peft(source: Path, base: Path | None) -> ImportedPeft:
    """Read a PEFT folder over the Hugging Face folder `base`; None: the one that it names.

    Raise CheckpointError for a kind of PEFT that is not read, for a base that is missing or whose matrices
    have other names or shapes, and for damaged tensors.
    """
    where = source / CONFIG
    settings = decode_file(_Settings, read_json(where), str(where), CheckpointError)
    folder = _base_of(source, settings, base)
    tensors = _tensors_of(source)
    if settings.peft_type != "LORA":
        return _import_virtual(source, settings, folder, tensors)
    factors, heads = _divided(source, tensors)
    imported = huggingface.import_folder(folder)
    form, config = _with_head(folder, settings, imported.config, heads)
    config = _with_vocabulary(form, config, heads)
    entries = form.entries(config)
    plain = skeleton_of(config)
    shapes = {name: shape for entry in entries for name, shape in shapes_of(entry, plain).items()}
    given = _products(source, settings, factors, shapes)
    lora = _lora_of(settings, config, entries, given)
    adapted: ModelConfig = replace(config, adaptation=lora)  # type: ignore[type-var]
    model = skeleton_of(adapted)
    products = products_in(model)
    weights: dict[str, Tensor] = {}
    for entry in entries:
        for matrix, held in ours_of(entry, given, model).items():
            product = products[matrix]
            a, b = values_of(product, held)
            weights |= {f"{matrix}.lora.a": a, f"{matrix}.lora.b": b}
        if all(name in heads for name in entry.theirs):
            weights[entry.ours] = entry.join([heads[name] for name in entry.theirs])
    names = {name for name, _ in model.named_parameters()}
    return ImportedPeft(adapted, weights, frozenset(names - weights.keys()), folder, imported.origin)


def _import_virtual(
    source: Path, settings: _Settings, folder: Path, tensors: Mapping[str, Tensor]
) -> ImportedPeft:
    imported = huggingface.import_folder(folder)
    kinds: dict[str, type[PrefixConfig | PromptConfig]] = {
        "PREFIX_TUNING": PrefixConfig,
        "PROMPT_TUNING": PromptConfig,
    }
    if set(tensors) != {virtual_tokens.KEY}:
        got, allowed = ", ".join(map(short, list(tensors)[:4])) or "nothing", f"{virtual_tokens.KEY} alone"
        raise CheckpointError(Problem(str(source / WEIGHTS), got, allowed))
    try:
        addition = decode(kinds[settings.peft_type], {"length": settings.num_virtual_tokens})
    except ConfigError as error:
        found = (p.of_file(str(source / CONFIG), "num_virtual_tokens") for p in error.problems)
        raise CheckpointError(found) from error
    adapted: ModelConfig = replace(imported.config, adaptation=addition)
    model = skeleton_of(adapted)
    weights = virtual_tokens.from_peft(tensors[virtual_tokens.KEY].float(), model, addition)
    names = {name for name, _ in model.named_parameters()}
    return ImportedPeft(adapted, weights, frozenset(names - weights.keys()), folder, imported.origin)


def _base_of(source: Path, settings: _Settings, given: Path | None) -> Path:
    named = settings.base_model_name_or_path or ""
    folder = Path(named) if given is None else given
    if (folder / huggingface.CONFIG).exists():
        return folder
    got = f"{folder}, no Hugging Face folder" if given is not None else f"nothing, over {named or 'no base'}"
    allowed = "the Hugging Face folder of the model that it was trained over"
    raise CheckpointError(Problem("base", got, allowed, f"give base=… for {source}"))


def _tensors_of(source: Path) -> dict[str, Tensor]:
    path = source / WEIGHTS
    if not path.exists():
        held = ", ".join(sorted(found.name for found in source.glob("adapter_model.*"))) or "no weights"
        remedy = "save it again with safe_serialization=True: pickle is not read"
        raise CheckpointError(Problem(str(source), held, WEIGHTS, remedy))
    stored = open_safetensors(path)
    return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def _divided(
    source: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return matrix of theirs → A and B, and the tensors of heads by name."""
    factors: dict[str, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := _FACTOR.fullmatch(name):
            factors.setdefault(found["name"], {})[found["which"]] = tensor
        elif ".lora_" in name:
            raise CheckpointError(
                Problem(
                    str(source / WEIGHTS), short(key), "lora_A and lora_B of matrices", "nothing else is read"
                )
            )
        else:
            heads[name.replace(".modules_to_save", "").replace(".default", "")] = tensor
    if not factors:
        raise CheckpointError(Problem(str(source / WEIGHTS), "no lora_A and lora_B", "those of a LoRA"))
    return factors, heads


def _products(
    source: Path,
    settings: _Settings,
    factors: Mapping[str, Mapping[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Product]:
    """Return weight of theirs → its product, all padded to one rank.

    shapes: (outputs, inputs) of the base's matrices."""
    found: dict[str, Product] = {}
    for name, pair in factors.items():
        where = f"{source / WEIGHTS}: {short(name)}"
        if set(pair) != {"A", "B"}:
            raise CheckpointError(
                Problem(where, f"lora_{' and lora_'.join(pair)} alone", "lora_A and lora_B")
            )
        a, b = pair["A"].float(), pair["B"].float()
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            got = f"lora_A of shape {tuple(a.shape)}, lora_B of {tuple(b.shape)}"
            raise CheckpointError(Problem(where, got, "(rank, inputs) and (outputs, rank)"))
        remedy = "give the base that it was trained over: base=…"
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            raise CheckpointError(Problem(where, "a matrix that the base does not have", "", remedy))
        if (len(b), a.shape[1]) != shape:
            got = f"a product of shape {(len(b), a.shape[1])}"
            raise CheckpointError(Problem(where, got, f"{shape}, as the base has", remedy))
        found[f"{name}.weight"] = Product(a, b * settings.scale(name, len(a)))
    rank = max(product.rank for product in found.values())
    return {name: _padded(product, rank) for name, product in found.items()}


def _padded(product: Product, rank: int) -> Product:
    more = rank - product.rank
    if not more:
        return product
    a = torch.cat([product.a, product.a.new_zeros(more, product.a.shape[1])])
    return Product(a, torch.cat([product.b, product.b.new_zeros(len(product.b), more)], dim=1))


def _lora_of(
    settings: _Settings, config: ModelConfig, entries: list[Entry], given: Mapping[str, Product]
) -> LoraConfig:
    """Return the settings that make the same products as `given`."""
    rank = next(iter(given.values())).rank
    scales = Counter(settings.scale(name.removesuffix(".weight"), rank) for name in given)
    targets: list[str] = []
    for entry in entries:
        present = [number for number, name in enumerate(entry.theirs) if name in given]
        for name in entry.all_ours if present else ():
            matrix = name.removesuffix(".weight")
            parts = ("query", "key", "value") if matrix.endswith(".qkv") else ("key", "value")
            targets += (
                [f"{matrix}.{parts[number]}" for number in present] if len(entry.theirs) > 1 else [matrix]
            )
    alpha = scales.most_common(1)[0][0] * rank
    return LoraConfig(rank=rank, alpha=alpha, dropout=settings.lora_dropout, targets=tuple(targets))


def _with_head(
    folder: Path, settings: _Settings, config: ModelConfig, heads: Mapping[str, Tensor]
) -> tuple[Form, ModelConfig]:
    """Return the form and the config of the base with the head that came with the additions, if one did."""
    content = read_json(folder / huggingface.CONFIG)
    form = forms()[content["model_type"]]
    suffix = _SUFFIXES.get(settings.task_type or "")
    if suffix is None or not heads:
        return form, config
    named = (content.get("architectures") or [""])[0]
    stem = re.sub(r"(For\w+|LMHeadModel|Model)$", "", named)
    outputs = min(len(tensor) for tensor in heads.values())
    labels = content.get("id2label") if len(content.get("id2label") or ()) == outputs else None
    labels = labels or {str(number): f"LABEL_{number}" for number in range(outputs)}
    keys = {"architectures": [f"{stem}{suffix}"], "id2label": labels}
    theirs = Settings(folder / huggingface.CONFIG, content).with_keys(**keys)
    return form, decode(form.config, form.read_config(theirs))


def _with_vocabulary(form: Form, config: ModelConfig, held: Mapping[str, Tensor]) -> ModelConfig:
    """Return the config with the vocabulary of the embedding that came with the additions, if one did."""
    of_tokens = set(of_vocabulary(config, skeleton_of(config)))
    sizes = [
        len(held[name])
        for entry in form.entries(config)
        if entry.ours in of_tokens
        for name in entry.theirs
        if name in held
    ]
    return replace(config, vocab_size=max(sizes)) if sizes else config  # type: ignore[type-var]


def _of_pattern(patterns: Mapping[str, Any], name: str, default: float) -> float:
    """Return the value whose key a name ends with, as PEFT looks it up for keys that are no expressions."""
    for pattern, value in patterns.items():
        if f".{name}".endswith(f".{pattern.lstrip('^')}"):
            return float(value)
    return default

"""Folders that transformers loads, out and back: GPT-2's form as `gpt2`, Llama's as `llama`.

huggingface_forms.py says which of their tensors make up each of ours, huggingface_tokenizer.py writes
the tokenizer. Weights are safetensors alone: nothing is unpickled, nor written to be.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain import files
from llmtrain.checkpoint.huggingface_forms import (
    CONFIG_READERS,
    CONFIG_WRITERS,
    ENTRIES,
    MARK,
    Entry,
    architecture_of,
    common_config,
)
from llmtrain.checkpoint.huggingface_tokenizer import read_model, special_ids, tokenizer_files
from llmtrain.checkpoint.store import TOKENIZER
from llmtrain.config import decode
from llmtrain.errors import CheckpointError, ConfigError, Problem, nearest
from llmtrain.models.config import GPTConfig
from llmtrain.models.gpt import GPT

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest file of weights, transformers' own default."""


def export_folder(
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    tokenizer_model: Path | None,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    tensors: canonical name → tensor of the full shape, any dtype and device; may load them lazily.
    tokenizer_model: the sentencepiece file; None writes no tokenizer.
    shard_bytes: above it the weights stand in several files with an index.
    overwrite: replace another model's folder; an earlier export is always replaced.

    The folder appears whole or not at all. Raises ConfigError for a form that transformers has not,
    CheckpointError for tensors that don't fit the config or an output that can't be written, DataError
    for a tokenizer that doesn't fit.
    """
    architecture = architecture_of(config)
    entries = ENTRIES[architecture](config)
    _check_tensors(config, tensors)
    contents: dict[str, Any] = {CONFIG: CONFIG_WRITERS[architecture](config) | common_config(config, dtype)}
    model_bytes: bytes | None = None
    if tokenizer_model is not None:
        model_bytes = read_model(tokenizer_model, config.vocab_size or 0)
        ids = special_ids(model_bytes)
        contents[CONFIG] |= ids
        contents["generation_config.json"] = ids
        contents |= tokenizer_files(model_bytes, config.max_sequence_length, str(tokenizer_model))
    else:
        contents["generation_config.json"] = {}
    output = Path(output).absolute()
    _refuse_foreign(output, overwrite)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_weights(partial, config, entries, tensors, dtype, shard_bytes)
        for name, content in contents.items():
            files.write_json_atomically(partial / name, content)
        if model_bytes is not None:
            files.write_atomically(partial / TOKENIZER, model_bytes)
        _put_in_place(partial, output)
    except (OSError, SafetensorError) as error:
        remedy = "make room, then export again"
        raise CheckpointError(files.disk_problem(error, output, if_full=remedy)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_folder(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read a `gpt2` or `llama` folder: the config, and canonical name → tensor as stored, on the CPU.

    Raises CheckpointError for a folder, architecture, setting or tensor that can't be taken.
    """
    path = Path(path)
    theirs = _read_json(path / CONFIG)
    architecture = theirs.get("model_type")
    if architecture not in list(CONFIG_READERS):
        raise CheckpointError(
            Problem(f"{path / CONFIG}: model_type", repr(architecture), ", ".join(CONFIG_READERS))
        )
    try:
        config = decode(GPTConfig, CONFIG_READERS[architecture](theirs, path / CONFIG))
    except KeyError as error:
        raise CheckpointError(Problem(str(path / CONFIG), f"no key {error}", "a whole config")) from error
    except ConfigError as error:
        raise CheckpointError(problem.within(str(path / CONFIG)) for problem in error.problems) from error
    stored = _canonical_storage(_read_weights(path), architecture, config)
    entries = ENTRIES[architecture](config)
    shapes = _expected_shapes(config, entries)
    _raise_if_any(_name_and_shape_problems(str(path), {n: tuple(t.shape) for n, t in stored.items()}, shapes))
    return config, {entry.ours: entry.join([stored[name] for name in entry.theirs]) for entry in entries}


# Checks.


def _own_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}


def _expected_shapes(config: GPTConfig, entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    """Their name → shape."""
    own = _own_shapes(config)
    return {
        name: tuple(part.shape)
        for entry in entries
        for name, part in zip(
            entry.theirs, entry.split(torch.empty(own[entry.ours], device="meta")), strict=True
        )
    }


def _check_tensors(config: GPTConfig, tensors: Mapping[str, Tensor]) -> None:
    names = set(tensors)
    if config.tie_embeddings:
        names.discard("head.weight")
    expected = _own_shapes(config)
    # Shapes are checked as tensors are read, so that a lazy mapping reads each once.
    given = {name: expected.get(name, ()) for name in names}
    _raise_if_any(_name_and_shape_problems("tensors to export", given, expected))


def _name_and_shape_problems(
    where: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    for kind, names in (
        ("no tensor", expected.keys() - given),
        ("an unknown tensor", given.keys() - expected),
    ):
        if names:
            first, more = min(names), f" and {len(names) - 1} more" if len(names) > 1 else ""
            alike = nearest(first, sorted(expected)) if kind == "an unknown tensor" else ""
            yield Problem(
                where, f"{kind} {first}{more}", alike, "the weights are of another model or damaged"
            )
    for name in sorted(given.keys() & expected):
        if given[name] != expected[name]:
            yield Problem(
                f"{where}: {name}",
                f"shape {given[name]}",
                f"{expected[name]}",
                "the config is of another model",
            )


def _raise_if_any(problems: Iterator[Problem]) -> None:
    if found := list(problems):
        raise CheckpointError(found[:8])


# Files.


def _write_weights(
    folder: Path,
    config: GPTConfig,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Weights in one file, or in shards with an index; one shard is in memory at a time."""
    shapes = _expected_shapes(config, entries)
    own = _own_shapes(config)

    def size(entry: Entry) -> int:
        return sum(torch.Size(shapes[name]).numel() for name in entry.theirs) * dtype.itemsize

    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(map(size, shards[-1])) + size(entry) > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content: dict[str, Tensor] = {}
        for entry in shard:
            tensor = tensors[entry.ours].detach()
            if tuple(tensor.shape) != own[entry.ours]:
                raise CheckpointError(
                    Problem(entry.ours, f"shape {tuple(tensor.shape)}", f"{own[entry.ours]} by the config")
                )
            for theirs, part in zip(entry.theirs, entry.split(tensor), strict=True):
                content[theirs] = part.to("cpu", dtype).contiguous()
                weight_map[theirs] = name
        # transformers asks for the format's name.
        save_file(content, folder / name, metadata={"format": "pt"})
        files.sync(folder / name)
    if len(shards) > 1:
        total = sum(size(entry) for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json_atomically(folder / INDEX, index)


def _refuse_foreign(output: Path, overwrite: bool) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        content = json.loads((output / CONFIG).read_text())
        if overwrite or MARK in content:
            return
        got, remedy = "another model's folder", "choose another output, or set overwrite=true"
    except (OSError, ValueError):
        got, remedy = "something that is no model's folder", "choose another output"
    raise CheckpointError(Problem(str(output), got, "a new or empty folder, or an earlier export", remedy))


def _put_in_place(partial: Path, output: Path) -> None:
    files.sync_folder(partial)
    replaced = output.with_name(f".{output.name}.{os.getpid()}.replaced")
    if output.exists():
        os.rename(output, replaced)
    os.rename(partial, output)
    files.sync_folder(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            Problem(str(path), str(error.strerror), "a Hugging Face model folder holds this file")
        ) from error
    except ValueError as error:
        raise CheckpointError(Problem(str(path), f"no JSON ({error})")) from error
    if not isinstance(content, dict):
        raise CheckpointError(Problem(str(path), f"JSON {type(content).__name__}", "an object"))
    return content


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of the folder as stored."""
    if (path / INDEX).exists():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(Problem(str(path / INDEX), "no weight_map", "tensor name → file name"))
        names = sorted(set(weight_map.values()))
        # A file name with a path in it would lead out of the folder.
        if odd := [name for name in names if Path(name).name != name]:
            raise CheckpointError(Problem(str(path / INDEX), f"the file name {odd[0]!r}", "a bare file name"))
    else:
        names = [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = path / name
        if not file.exists():
            pickled = any(path.glob("pytorch_model*.bin"))
            got = "pickled weights only" if pickled else "no such file"
            remedy = "convert them with transformers' save_pretrained" if pickled else "download it again"
            raise CheckpointError(Problem(str(file), got, "safetensors", remedy))
        try:
            with safe_open(file, framework="pt") as stored:
                tensors |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                Problem(str(file), f"a damaged file ({error})", "safetensors", "copy it again")
            ) from error
    return tensors


def _canonical_storage(stored: dict[str, Tensor], architecture: str, config: GPTConfig) -> dict[str, Tensor]:
    """Their tensors under one spelling: the bare model's names get its prefix, buffers and the copy of
    a tied head go."""
    if architecture == "gpt2" and "wte.weight" in stored:
        stored = {n if n.startswith("lm_head") else f"transformer.{n}": t for n, t in stored.items()}
    buffers = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
    tied_copy = "lm_head.weight" if config.tie_embeddings else None
    return {n: t for n, t in stored.items() if not n.endswith(buffers) and n != tied_copy}

"""Export and import Hugging Face folders.

The forms (forms.py) define how tensors and configs correspond; huggingface_weights.py reads weights, and
huggingface_tokenizer.py writes tokenizers. Weights are safetensors only: pickle is neither read nor written,
and code in a folder is not run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from llmtrain import files
from llmtrain.config import decode, short, show
from llmtrain.errors import CheckpointError, ConfigError, Problem, nearest
from llmtrain.interchange.forms import form_of, forms
from llmtrain.interchange.generation_settings import FILE as GENERATION
from llmtrain.interchange.generation_settings import read_generation, write_generation
from llmtrain.interchange.huggingface_tokenizer import (
    chat_files,
    read_tokenizer,
    special_ids,
    tokenizer_files,
)
from llmtrain.interchange.huggingface_weights import INDEX, WEIGHTS, Stored, StoredTensors, read_json
from llmtrain.models.huggingface.form import Entry, Form, Settings
from llmtrain.models.huggingface.keys import Asked, unknown_keys
from llmtrain.models.huggingface.origin import Origin
from llmtrain.nn.initialize import fill_box, match_initializers, on_meta
from llmtrain.nn.state import named_state
from llmtrain.objectives.task import frame_of
from llmtrain.reading import SETTINGS_BYTES, parse_object, read_bytes
from llmtrain.tensor_boxes import whole
from llmtrain.tokenizers.folder import EXPORT_MARK, find_tokenizer, load_tokenizer

CONFIG = "config.json"
EXPORTED_BY = f"llmtrain {version('llmtrain')}"
SHARD_BYTES = 5 * 10**9
"""Default maximum size of a weights file, as in transformers."""


def export_folder(
    config: Any,
    tensors: Mapping[str, Tensor],
    tokenizer_path: Path | None,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    file_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    origin: Origin | None = None,
    end_id: int | None = None,
    chat_template: str | None = None,
) -> None:
    """Write a folder that `from_pretrained` of transformers loads. It appears complete or not at all.

    tensors: canonical name → tensor of the full shape, any dtype and device; may load lazily.
    tokenizer_path: file or folder for `load_tokenizer`; None: write no tokenizer.
    file_bytes: maximum size of a weights file; larger weights are split into several files with an index.
    overwrite: replace the folder of another model; an earlier export is always replaced.
    origin: the folder that the model was imported from; its settings are kept as far as they still apply.
    end_id: id of the end token in the training data; None: the model was not trained here.
    chat_template: of the conversations that it was trained on; None: that of the tokenizer, if it has one.
    Raise ConfigError for a model without an equivalent in transformers, CheckpointError for tensors that do
    not fit the config or an output that is not writable, DataError for a tokenizer that does not fit.
    """
    form = form_of(config, None if origin is None else origin.settings.get("model_type"))
    model = _on_meta(form, config)
    _check_tensors(model, tensors)
    ids: dict[str, int] = {}
    contents: dict[str, Any] = {}
    if tokenizer_path is not None:
        ids, contents = tokenizer_of(config, tokenizer_path, chat_template)
    described = _config_of(form, config, dtype, ids)
    if origin is not None:
        described = origin.settings_of(form, config, lambda config: _config_of(form, config, dtype, ids))
        described[EXPORT_MARK] = EXPORTED_BY
    said = {} if origin is None else origin.generation
    contents |= {CONFIG: described, GENERATION: write_generation(said, described, end_id)}
    output = Path(output).absolute()
    _refuse_foreign(output, overwrite)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_weights(partial, model, form.entries(config), tensors, dtype, file_bytes)
        write_contents(partial, contents)
        files.replace_folder(partial, output)
    except (OSError, SafetensorError) as error:
        remedy = "make room, then export again"
        raise CheckpointError(files.disk_problem(error, output, if_full=remedy)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def tokenizer_of(config: Any, path: Path, chat_template: str | None) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the special ids of a model's tokenizer, and name → content of its files in a folder.

    Raise DataError for a tokenizer that does not fit the model."""
    tokenizer = read_tokenizer(path, config.vocab_size or 0)
    frame = None if config.task is None else frame_of(config, tokenizer)
    contents = tokenizer_files(
        tokenizer, config.max_sequence_length, str(path), config.special_token_ids, frame
    )
    return special_ids(tokenizer), contents | chat_files(contents, tokenizer, chat_template)


def write_contents(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write files by name: text and bytes as they are, all else as JSON."""
    for name, content in contents.items():
        if isinstance(content, bytes | str):
            files.write_atomically(folder / name, content)
        else:
            files.write_json_atomically(folder / name, content)


@dataclass(frozen=True)
class Imported:
    """A model imported from a foreign folder or file."""

    config: Any
    """Config of the model, of any family."""
    weights: Mapping[str, Tensor]
    """Canonical name → tensor as stored, on the CPU, read on access."""
    fresh: tuple[str, ...] = ()
    """Names of weights that the folder lacks and that are initialized: heads."""
    left_out: tuple[str, ...] = ()
    """Names of stored tensors that the model does not use."""
    dtype: torch.dtype = torch.float32
    """Common dtype of the stored tensors if it is bf16 or fp16, else fp32."""
    origin: Origin | None = None
    """Settings of the folder."""
    unknown: tuple[str, ...] = ()
    """Keys of config.json that are unknown here."""


def import_folder(path: Path) -> Imported:
    """Read a folder with an architecture of `forms()`.

    Raise CheckpointError if the folder is invalid, or its architecture, settings or tensors are unsupported.
    """
    path = Path(path)
    content = read_json(path / CONFIG)
    architecture = content.get("model_type")
    if not isinstance(architecture, str) or architecture not in forms():
        raise CheckpointError(Problem(f"{path / CONFIG}: model_type", show(architecture), ", ".join(forms())))
    stored = StoredTensors(path)
    form = forms()[architecture]
    whole = Settings(path / CONFIG, Asked(content), stored, lambda: _special_ids(path))
    whole.require("quantization_config")
    parts = [whole] if form.part is None else [whole, form.part(whole)]
    theirs = parts[-1]
    imported = import_stored(path, form, theirs, stored)
    unknown = tuple(key for part in parts for key in unknown_keys(form, part))
    told = (item for part in reversed(parts) for item in part.content.items())
    said = {key: value for key, value in told if value is not None}
    origin = Origin.of(dict(theirs.content), imported.config, read_generation(path, said))
    return replace(imported, unknown=unknown, origin=origin)


def import_stored(path: Path, form: Form, theirs: Settings, stored: Stored) -> Imported:
    """Import a model from settings and stored tensors in the naming and layout of `form`.

    path: their origin, for messages; theirs: settings in the form of config.json.
    Raise CheckpointError for unsupported settings or tensors.
    """
    try:
        config: Any = decode(form.config, form.read_config(theirs))
    except ConfigError as error:
        raise CheckpointError(problem.within(str(theirs.where)) for problem in error.problems) from error
    _refuse_larger(theirs.where, config, stored)
    names = form.names(stored.shapes.keys(), config)
    _raise_if_any(problem.within(str(path)) for problem in stored.problems(names.used))
    given = {canonical: stored.shapes[name] for name, canonical in names.used.items()}
    model = _on_meta(form, config)
    entries = form.entries(config)
    lacking = {entry.ours for entry in entries if not given.keys() & set(entry.theirs)}
    heads = {e.ours for e in entries if any(fnmatchcase(e.ours, pattern) for pattern in form.fresh)}
    fresh = tuple(sorted(heads)) if heads and heads <= lacking else ()
    entries = [entry for entry in entries if entry.ours not in fresh]
    _raise_if_any(_name_and_shape_problems(str(path), given, _their_shapes(model, entries)))
    where = {canonical: name for name, canonical in names.used.items()}
    dtypes = stored.dtypes(names.used)
    return Imported(
        config,
        _Joined(stored, where, entries, model, fresh),
        fresh,
        tuple(sorted(names.left_out)),
        dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32,
    )


def _refuse_larger(where: Path, config: Any, stored: Stored) -> None:
    """Raise CheckpointError if the config describes far more parameters than are stored, before anything is
    allocated. Only heads, which are smaller than the rest, may be missing from a folder."""
    needed, held = config.parameter_count(), stored.count()
    if needed > 2 * held:
        got, allowed = f"sizes of {needed:,} parameters", f"those of its tensors, which hold {held:,} numbers"
        raise CheckpointError(Problem(str(where), got, allowed, "the config is of another model"))


def _special_ids(path: Path) -> Mapping[str, int]:
    """Return role → id of the special tokens of a folder's tokenizer; empty without a tokenizer."""
    found = find_tokenizer(path)
    return {} if found is None else load_tokenizer(found).special_ids


class _Joined(Mapping[str, Tensor]):
    """Canonical name → tensor, assembled on access from the stored tensors."""

    def __init__(
        self,
        stored: Stored,
        where: Mapping[str, str],
        entries: list[Entry],
        model: nn.Module,
        fresh: tuple[str, ...],
    ) -> None:
        self._stored, self._where, self._model = stored, where, model
        self._entries = {name: entry for entry in entries for name in entry.all_ours}
        self._fresh = fresh
        self._names = list(named_state(model))

    def __getitem__(self, name: str) -> Tensor:
        if name in self._fresh:
            return _fresh_weight(self._model, name)
        entry = self._entries[name]
        joined = entry.join([self._stored[self._where[theirs]] for theirs in entry.theirs])
        return joined.chunk(len(entry.all_ours))[entry.all_ours.index(name)] if entry.also else joined

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _fresh_weight(model: nn.Module, name: str) -> Tensor:
    """Return the initial value of a weight, as for training with seed 0."""
    parameters = named_state(model)
    table = match_initializers(model.initializers(), parameters)  # type: ignore[operator]
    shape = tuple(parameters[name].shape)
    return fill_box(name, table[name], 0, shape, whole(shape)).view(shape)


# Checks of tensors.


def _on_meta(form: Form, config: Any) -> nn.Module:
    with on_meta():
        return form.build(config)


def _own_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape) for name, values in named_state(model).items()}


def _their_shapes(model: nn.Module, entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in the Hugging Face form."""
    own = _own_shapes(model)
    return {
        name: tuple(part.shape)
        for entry in entries
        for name, part in zip(
            entry.theirs,
            entry.split_all([torch.empty(own[name], device="meta") for name in entry.all_ours]),
            strict=True,
        )
    }


def _check_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    expected = _own_shapes(model)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - expected.keys()
    # Shapes are checked when tensors are read, so that a lazy mapping reads each only once.
    given = {name: expected.get(name, ()) for name in tensors.keys() - tied}
    _raise_if_any(_name_and_shape_problems("tensors to export", given, expected))


def _name_and_shape_problems(
    where: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[Problem]:
    for kind, names in (
        ("no tensor", expected.keys() - given),
        ("an unknown tensor", given.keys() - expected),
    ):
        if names:
            first, more = short(min(names)), f" and {len(names) - 1} more" if len(names) > 1 else ""
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


# Writing of folders.


def _config_of(form: Form, config: Any, dtype: torch.dtype, ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the config.json of an export. ids: keys of special token ids of the tokenizer."""
    return {
        "model_type": form.model_type,
        **(_of_vocabulary(config, ids) if config.has_vocabulary else {}),
        "dtype": str(dtype).removeprefix("torch."),
        EXPORT_MARK: EXPORTED_BY,
        **form.write_config(config),
    }


def _of_vocabulary(config: Any, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        # The defaults of transformers are ids of other tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **ids,
    }


def _write_weights(
    folder: Path,
    model: nn.Module,
    entries: list[Entry],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    file_bytes: int,
) -> None:
    """Write the weights to one file, or to several with an index; one file is in memory at a time."""
    shapes = _their_shapes(model, entries)
    own = _own_shapes(model)

    def size(entry: Entry) -> int:
        return sum(torch.Size(shapes[name]).numel() for name in entry.theirs) * dtype.itemsize

    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(map(size, shards[-1])) + size(entry) > file_bytes:
            shards.append([])
        shards[-1].append(entry)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content: dict[str, Tensor] = {}
        for entry in shard:
            ours = [tensors[mine].detach() for mine in entry.all_ours]
            for mine, tensor in zip(entry.all_ours, ours, strict=True):
                if tuple(tensor.shape) != own[mine]:
                    got, expected = f"shape {tuple(tensor.shape)}", f"{own[mine]} by the config"
                    raise CheckpointError(Problem(mine, got, expected))
            for theirs, part in zip(entry.theirs, entry.split_all(ours), strict=True):
                content[theirs] = part.to("cpu", dtype).contiguous()
                weight_map[theirs] = name
        # transformers requires the name of the format.
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
        content = parse_object(read_bytes(output / CONFIG, SETTINGS_BYTES))
        if overwrite or EXPORT_MARK in content:
            return
        got, remedy = "another model's folder", "choose another output, or set overwrite=true"
    except (OSError, ValueError):
        got, remedy = "something that is no model's folder", "choose another output"
    raise CheckpointError(Problem(str(output), got, "a new or empty folder, or an earlier export", remedy))

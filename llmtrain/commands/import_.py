"""`llmtrain import`: a model of another library → a checkpoint of llmtrain, which every verb accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config import decode, encode, require_utf8
from llmtrain.distributed import launcher
from llmtrain.errors import ConfigError, DataError, Problem
from llmtrain.files import expand_home
from llmtrain.standard_streams import print_note


@dataclass(frozen=True)
class ImportConfig:
    source: Path
    """A Hugging Face folder, a GGUF file, or a PEFT folder of LoRA."""
    output: Path
    """A folder that does not exist yet or is empty."""
    tokenizer: Path | None = None
    """File or folder of a tokenizer to use in place of the model's."""
    base: Path | None = None
    """Of a PEFT folder: the Hugging Face folder that it was trained over, which must stay where it is; null:
    the one that it names."""
    overwrite: bool = False
    """Replace an earlier import."""

    def problems(self) -> Iterator[Problem]:
        for name in ("source", "output"):
            yield from require_utf8(name, getattr(self, name))


def run(mapping: Mapping[str, Any]) -> None:
    """Write the checkpoint. Raise UserError for whatever a user can fix."""
    config = decode(ImportConfig, mapping)
    if launcher.world_size() > 1:
        raise ConfigError(
            Problem("import", f"{launcher.world_size()} processes", "one", "start it without torchrun")
        )

    from llmtrain.interchange.foreign import read_foreign
    from llmtrain.interchange.imported import save_imported
    from llmtrain.interchange.peft_import import is_peft
    from llmtrain.interchange.trained import fresh_note, listed, unknown_note
    from llmtrain.models.skeleton import skeleton_of
    from llmtrain.nn.state import named_state, named_statistics

    source, output = expand_home(config.source), expand_home(config.output)
    if is_peft(source):
        _import_peft(config, source, output)
        return
    if config.base is not None:
        raise ConfigError(Problem("base", str(config.base), f"nothing, since {source} is no PEFT folder"))
    imported, tokenizer = read_foreign(source, config.tokenizer)
    model = imported.config
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            Problem(
                str(config.tokenizer or source),
                f"a tokenizer of {tokenizer.vocab_size:,} ids",
                f"at most the model's {model.vocab_size:,}",
                "give the model's own: tokenizer=…",
            )
        )
    module = skeleton_of(model)
    description = {
        "imported_from": str(source.absolute()),
        "model": encode(model),
        "data": {"tokenizer_sha256": None if tokenizer is None else tokenizer.sha256},
        "fresh": list(imported.fresh),
        "left_out": list(imported.left_out),
        "dtype": str(imported.dtype).removeprefix("torch."),
        "origin": None if imported.origin is None else encode(imported.origin),
    }
    shapes = {name: tuple(values.shape) for name, values in named_state(module).items()}
    path = save_imported(
        output,
        imported.weights,
        shapes,
        description,
        tokenizer,
        overwrite=config.overwrite,
        statistics=named_statistics(module),
    )
    print_note(f"imported {model.family}, {model.parameter_count():,} parameters, from {source} to {path}")
    if tokenizer is None:
        print_note("no tokenizer came with it: text needs one, give tokenizer=…")
    if imported.left_out:
        print_note(f"left out, since our model has no use for it: {listed(imported.left_out)}")
    if imported.unknown:
        print_note(unknown_note(imported.unknown))
    if imported.fresh:
        print_note(fresh_note(imported.fresh))
    print_note(f"train on: llmtrain train model=pretrained model.path={config.output} data.path=…")


def _import_peft(config: ImportConfig, source: Path, output: Path) -> None:
    from llmtrain.interchange.base import record_of
    from llmtrain.interchange.imported import save_imported
    from llmtrain.interchange.peft_import import import_peft
    from llmtrain.tokenizers.folder import find_tokenizer, load_tokenizer

    found = import_peft(source, None if config.base is None else expand_home(config.base))
    file = config.tokenizer or find_tokenizer(source) or find_tokenizer(found.base)
    tokenizer = None if file is None else load_tokenizer(file)
    description = {
        "imported_from": str(source.absolute()),
        "model": encode(found.config),
        "data": {"tokenizer_sha256": None if tokenizer is None else tokenizer.sha256},
        "origin": None if found.origin is None else encode(found.origin),
        "base": encode(record_of(found.base, output / "checkpoints")),
    }
    shapes = {name: tuple(weight.shape) for name, weight in found.weights.items()}
    path = save_imported(
        output,
        found.weights,
        shapes,
        description,
        tokenizer,
        overwrite=config.overwrite,
        left_out=found.left_out,
    )
    added = sum(weight.numel() for weight in found.weights.values())
    print_note(f"imported {added:,} parameters that {source} adds to {found.base}, to {path}")

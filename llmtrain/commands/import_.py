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
    """A Hugging Face folder, or a GGUF file."""
    output: Path
    """A folder that does not exist yet or is empty."""
    tokenizer: Path | None = None
    """File or folder of a tokenizer to use in place of the model's."""
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
    from llmtrain.interchange.trained import fresh_note, listed, unknown_note
    from llmtrain.models.registry import skeleton_of

    source, output = expand_home(config.source), expand_home(config.output)
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
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    path = save_imported(output, imported.weights, shapes, description, tokenizer, overwrite=config.overwrite)
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

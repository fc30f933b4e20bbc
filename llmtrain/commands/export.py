"""`llmtrain export`: a trained model → a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain.config import decode, require_utf8
from llmtrain.errors import ConfigError, Problem
from llmtrain.files import expand_home
from llmtrain.standard_streams import print_note


@dataclass(frozen=True)
class ExportConfig:
    checkpoint: Path
    """A run folder or a checkpoint folder."""
    output: Path
    """A folder that does not exist yet or is empty."""
    task: str | None = None
    """Task of which the head is written, of a model that learned several."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Number format of the weights; null: that of the source for an untrained import, else fp32."""
    form: Literal["plain", "merged", "peft"] | None = None
    """merged: with what LoRA added summed into the matrices; peft: what LoRA added alone, as a folder of
    PEFT; plain: a model without additions; null: merged if there is something to merge, else plain."""
    overwrite: bool = False
    """Replace the folder of another model."""

    def problems(self) -> Iterator[Problem]:
        for name in ("checkpoint", "output"):
            yield from require_utf8(name, getattr(self, name))


def run(mapping: Mapping[str, Any]) -> None:
    """Write the Hugging Face folder. Raise UserError for whatever a user can fix."""
    config = decode(ExportConfig, mapping)

    import torch

    from llmtrain.interchange import huggingface
    from llmtrain.interchange.merged import merged
    from llmtrain.interchange.one_task import model_of
    from llmtrain.interchange.trained import load_trained

    trained = model_of(load_trained(config.checkpoint), config.task)
    output = expand_home(config.output)
    is_adapted = trained.config.adaptation is not None
    if config.form == "peft":
        from llmtrain.interchange.peft import export_peft

        export_peft(trained, output, overwrite=config.overwrite)
        base = "its base" if trained.base is None else trained.base.path
        print_note(f"exported what was added to {base} from {trained.source} to {output}")
        return
    if config.form == "plain" and is_adapted:
        got = f"plain, with {trained.source}, to whose matrices something was added"
        raise ConfigError(Problem("form", got, "merged, peft"))
    trained = merged(trained)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    huggingface.export_folder(
        trained.config,
        trained.weights,
        trained.tokenizer_path,
        output,
        dtype=trained.dtype if config.dtype is None else dtypes[config.dtype],
        overwrite=config.overwrite,
        origin=trained.origin,
        end_id=trained.own_end_id,
        chat_template=trained.objective.chat_template,
    )
    # load_trained has printed their names.
    never = f"; {len(trained.fresh):,} of its parameters were never trained" if trained.fresh else ""
    summed = ", with what was added to its matrices summed into them" if is_adapted else ""
    print_note(f"exported {trained.source} to {output}{summed}{never}")

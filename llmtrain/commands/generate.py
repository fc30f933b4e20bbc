"""`llmtrain generate`: text from a trained language model, or what a BERT or an XLNet puts for [MASK]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.commands.sharing import SharingConfig, start_sharing
from llmtrain.config import decode, encode
from llmtrain.errors import ConfigError, DataError, Problem, UserError
from llmtrain.generation.config import GenerateConfig
from llmtrain.models.bert_config import BertConfig
from llmtrain.models.xlnet_config import XLNetConfig

TOP_K = 5
"""Pieces shown for each [MASK] unless generate.top_k says otherwise."""


@dataclass(frozen=True)
class GenerateCommandConfig:
    checkpoint: Path
    """A run folder, a checkpoint folder or an exported folder."""
    generate: GenerateConfig
    parallel: SharingConfig = field(default_factory=SharingConfig)
    prompt: tuple[str, ...] = ("",)
    prompt_file: Path | None = None
    device: str = "auto"


def run(mapping: Mapping[str, Any]) -> None:
    """Print each prompt with its continuation, or with its [MASK]s filled.

    Raises UserError for whatever a user can mend.
    """
    config = decode(GenerateCommandConfig, mapping)
    prompts = list(config.prompt)
    if config.prompt_file is not None:
        try:
            prompts = config.prompt_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                Problem("prompt_file", f"{config.prompt_file} ({error})", "a text file")
            ) from error

    from llmtrain.commands.loading import load_trained
    from llmtrain.generation.generate import generate
    from llmtrain.parallel import distributed

    trained = load_trained(config.checkpoint)
    if trained.config.family == "simple_cnn":
        raise ConfigError(Problem("checkpoint", "a model of images", "a language model"))
    if isinstance(trained.config, BertConfig | XLNetConfig):
        from llmtrain.commands.fill import fill_prompts

        fill_prompts(
            trained, prompts, config.generate.top_k or TOP_K, config.parallel, encode(config), config.device
        )
        return
    tokenizer = trained.tokenizer()
    device = distributed.pick_device(config.device)
    ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    longest = max(map(len, ids)) + config.generate.max_new_tokens
    mesh = start_sharing(
        config.parallel, trained, encode(config), device, micro_size=1, sequence_length=longest
    )
    model = trained.build_over(mesh, device)
    try:
        continuations = generate(model, ids, config.generate, eos_id=tokenizer.eos_id)
    except UserError as error:  # all ranks look at the same prompts
        raise distributed.everywhere(error) from None
    if not distributed.is_main():
        return
    for prompt, before, continuation in zip(prompts, ids, continuations, strict=True):
        print(prompt + tokenizer.decode_after(before, continuation), flush=True)
        if len(prompts) > 1:
            print("---", flush=True)

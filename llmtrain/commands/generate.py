"""`llmtrain generate`: continue, answer or fill in prompts with a trained language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import files
from llmtrain.config import MAY_BE_EMPTY, decode, encode
from llmtrain.engine.sharing import SharingConfig, start_sharing
from llmtrain.errors import ConfigError, DataError, Problem, UserError
from llmtrain.files import expand_home
from llmtrain.generation.answer import Texts, refuse_pipeline_of_answers
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.progress import Progress
from llmtrain.models.registry import family_of
from llmtrain.output import check_output, write_output
from llmtrain.standard_streams import print_text

if TYPE_CHECKING:
    from llmtrain.interchange.trained import TrainedModel

TOP_K = 5
"""Default number of tokens shown for each [MASK]; generate.top_k overrides it."""


@dataclass(frozen=True)
class GenerateCommandConfig:
    checkpoint: Path
    """A run folder, a checkpoint folder or an exported folder."""
    generate: GenerateConfig
    parallel: SharingConfig = field(default_factory=SharingConfig)
    prompt: tuple[str, ...] = field(default=("",), metadata={MAY_BE_EMPTY: True})
    """A text, or a list of texts."""
    prompt_file: Path | None = None
    """A file with one prompt per line, in place of `prompt`."""
    adapter: bool = True
    """Of a model with additions (LoRA and the like): with them; false: its base alone."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Name → run or checkpoint whose additions are put on the model, its base; the texts of each are printed
    under its name."""
    chat: bool = False
    """Each prompt is what a user says: render it by the chat template, and print the answer alone."""
    output: Path | None = None
    """A file for the texts, one line per prompt; null: print them."""
    device: str = "auto"
    """auto, cpu or cuda; auto: a GPU if there is one."""

    def problems(self) -> Iterator[Problem]:
        if self.adapters and not self.adapter:
            yield Problem("adapter", "false with adapters", "true, or no adapters")
        if len(self.adapters) > 1 and self.output is not None:
            yield Problem("output", str(self.output), f"null with {len(self.adapters)} adapters", "name one")


def run(mapping: Mapping[str, Any]) -> None:
    """Print each prompt with its continuation, its answer, or the prompt with each [MASK] filled.

    Raise UserError for whatever a user can fix.
    """
    config = decode(GenerateCommandConfig, mapping)
    prompts = list(config.prompt) if config.prompt_file is None else _read_lines(config.prompt_file)
    output = None if config.output is None else expand_home(config.output)
    if output is not None:
        check_output(output)

    from llmtrain.interchange.additions import with_additions, without_additions
    from llmtrain.interchange.base import Given
    from llmtrain.interchange.trained import load_trained

    trained = load_trained(config.checkpoint)
    if not config.adapter:
        trained = without_additions(trained)
    if not config.adapters:
        _generate(config, trained, prompts, output)
        return
    base = Given.of(trained.source)
    for name, path in config.adapters.items():
        adapted = with_additions(base, name, expand_home(path))
        if len(config.adapters) > 1:
            print_text(f"[{name}]")
        _generate(config, adapted, prompts, output)


def _generate(
    config: GenerateCommandConfig, trained: TrainedModel, prompts: Sequence[str], output: Path | None
) -> None:
    from llmtrain.distributed import processes
    from llmtrain.generation.generate import generate
    from llmtrain.generation.settings import resolved_for, text_ends

    family = family_of(trained.config)
    if not family.reads_tokens:
        raise ConfigError(Problem("checkpoint", "a model of images", "a language model"))
    if trained.config.task is not None:
        got = f"a model with the head of a task ({trained.config.task.kind})"
        raise ConfigError(Problem("checkpoint", got, "a language model", "evaluate it, or give its trunk"))
    if config.chat and not family.continues_texts:
        raise ConfigError(Problem("chat", "true", f"false with model.family={trained.config.family}"))
    if family.filling is not None:
        from llmtrain.generation.blanks import fill_prompts

        problems = []
        if output is not None:
            problems.append(Problem("output", str(output), "null with a model that fills [MASK]"))
        if (config.generate.num_beams or 1) > 1:
            got = str(config.generate.num_beams)
            problems.append(Problem("generate.num_beams", got, "1 with a model that fills [MASK]"))
        if problems:
            raise ConfigError(problems)
        fill_prompts(
            trained, prompts, config.generate.top_k or TOP_K, config.parallel, encode(config), config.device
        )
        return
    chat_ends: tuple[int, ...] = ()
    if config.chat:
        ids, eos_id, show, chat_ends = _answers(trained, prompts)
    else:
        ids, eos_id, show = _ways(trained, prompts)
    settings = resolved_for(trained, config.generate, max(map(len, ids), default=1))
    if family.reads_sources:
        refuse_pipeline_of_answers(config.parallel)
        if config.prompt_file is None and config.prompt == ("",):
            remedy = "give prompt=… or prompt_file=…"
            raise ConfigError(Problem("prompt", "nothing", "a text that the model reads", remedy))
    device = processes.pick_device(config.device)
    longest = max(map(len, ids), default=1) + settings.new_tokens
    mesh = start_sharing(
        config.parallel, trained, encode(config), device, micro_size=1, sequence_length=longest
    )
    model = trained.build_over(mesh, device)
    on_done = None
    if output is not None and processes.is_main():
        on_done = Progress(len(prompts))
    try:
        ends = {*text_ends(trained, eos_id), *chat_ends}
        found = generate(model, ids, settings, eos_ids=ends, on_done=on_done)
    except UserError as error:  # all ranks check the same prompts
        raise processes.everywhere(error) from None
    if not processes.is_main():
        return
    shown = [show(number, text) for number, text in enumerate(found)]
    if output is not None:
        content = "".join(" ".join(text.split("\n")) + "\n" for text in shown)
        write_output(output, lambda path: files.write_atomically(path, content))
        return
    for text in shown:
        print_text(text)
        if len(prompts) > 1:
            print_text("---")


def _ways(
    trained: TrainedModel, prompts: Sequence[str]
) -> tuple[list[list[int]], int, Callable[[int, list[int]], str]]:
    """Return the ids of each prompt, the id that ends a text, and (prompt number, found ids) → text."""
    if family_of(trained.config).reads_sources:
        texts = Texts(trained)
        return (
            [texts.source(prompt) for prompt in prompts],
            texts.eos_id,
            lambda number, found: texts.answer(prompts[number], found),
        )
    tokenizer = trained.tokenizer()
    # Models trained by llmtrain saw texts without first ids; as in the sources of an encoder–decoder.
    first = tokenizer.first_ids if trained.sequence_length is None else ()
    ids = [[*first, *tokenizer.encode(prompt)] or [tokenizer.eos_id] for prompt in prompts]
    return (
        ids,
        tokenizer.eos_id,
        lambda number, found: prompts[number] + tokenizer.decode_after(ids[number], found),
    )


def _answers(
    trained: TrainedModel, prompts: Sequence[str]
) -> tuple[list[list[int]], int, Callable[[int, list[int]], str], tuple[int, ...]]:
    """Return what `_ways` does for what users say, and the ids that end an answer."""
    from llmtrain.chat.encoder import Encoder, end_ids
    from llmtrain.chat.error import ChatError
    from llmtrain.chat.renderer import Renderer
    from llmtrain.chat.source import PLAIN, template_of

    tokenizer = trained.tokenizer()
    recorded = trained.objective.chat_template
    try:
        template = template_of(tokenizer, None if recorded == PLAIN else recorded)
        with Renderer(template) as renderer:
            texts = [renderer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
            ends = end_ids(renderer, template, tokenizer)
    except ChatError as fault:
        raise ConfigError(Problem("prompt", fault.got, fault.allowed, "give chat=false")) from None
    encoder = Encoder(tokenizer)
    ids = [encoder.encode(text)[0].tolist() for text in texts]

    def answer(number: int, found: list[int]) -> str:
        return tokenizer.decode_after(ids[number], found).strip()

    return ids, tokenizer.eos_id, answer, ends


def _read_lines(path: Path) -> list[str]:
    """Read lines. Raise DataError if the file is not a text file."""
    try:
        return expand_home(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(Problem("prompt_file", f"{path} ({error})", "a text file")) from error

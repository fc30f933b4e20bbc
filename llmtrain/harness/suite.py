"""Tasks of EleutherAI's lm-evaluation-harness on a trained decoder, as `llmtrain evaluate suite=lm_eval`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtrain import files
from llmtrain.config import MISSING, decode, encode, require
from llmtrain.distributed import launcher
from llmtrain.engine.sharing import SharingConfig, start_sharing
from llmtrain.errors import ConfigError, Problem
from llmtrain.files import expand_home
from llmtrain.harness.config import count_problems
from llmtrain.harness.names import task_problems
from llmtrain.models.registry import family_of
from llmtrain.output import check_output, write_output

if TYPE_CHECKING:
    from llmtrain.interchange.trained import Described, TrainedModel

KEYS = ("tasks", "tasks_path", "limit", "num_fewshot", "add_bos", "chat")
"""Keys of `llmtrain evaluate` that are those of a suite alone, and null, empty or false by default."""
WAIT_MINUTES = 120.0
"""How long other processes wait for rank 0, which fetches the data of tasks and counts their figures."""


@dataclass(frozen=True)
class SuiteConfig:
    """The keys of `llmtrain evaluate` that a suite uses; EvaluateConfig says what they are."""

    checkpoint: Path
    """A run folder, a checkpoint folder or an exported folder."""
    suite: Literal["lm_eval"]
    """The harness."""
    tasks: tuple[str, ...] = ()
    """Names or patterns."""
    tasks_path: Path | None = None
    """A folder of further tasks."""
    limit: int | None = None
    """Documents of each task."""
    num_fewshot: int | None = None
    """Solved examples before each document."""
    add_bos: bool | None = None
    """Whether texts begin with the token that begins texts."""
    chat: bool = False
    """Whether requests are conversations by the model's chat template."""
    batch_tokens: int = 4096
    """Tokens of one forward pass."""
    sequence_length: int | None = None
    """Tokens that the model reads at most; null: all that it can."""
    parallel: SharingConfig = field(default_factory=SharingConfig)
    """How processes share the model."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of matrix products."""
    device: str = "auto"
    """auto, cpu or cuda."""
    output: Path | None = None
    """A JSON file for the figures."""
    format: Literal["text", "json"] = "text"
    """text: a table; json: one object."""

    def problems(self) -> Iterator[Problem]:
        yield from count_problems(self.limit, self.num_fewshot)
        yield from require(self.batch_tokens >= 1, "batch_tokens", self.batch_tokens, "1 or more")
        length = self.sequence_length
        yield from require(length is None or length >= 2, "sequence_length", length, "2 or more, or null")


def run(mapping: Mapping[str, Any], whole: type) -> None:
    """Print the figures of tasks. whole: the config of all keys of the verb.

    Raise UserError for whatever a user can fix."""
    names = {each.name for each in fields(SuiteConfig)}
    config = decode(SuiteConfig, {key: value for key, value in mapping.items() if key in names})
    problems = [*_unused(mapping, whole, names), *task_problems(config.tasks, config.tasks_path)]
    if problems:
        raise ConfigError(problems)
    output = None if config.output is None else expand_home(config.output)
    if output is not None:
        check_output(output)

    from llmtrain.distributed import processes
    from llmtrain.harness.codec import Codec
    from llmtrain.interchange.trained import describe, load_trained

    _check_model(config, describe(config.checkpoint))
    is_alone = launcher.world_size() == 1
    load = partial(_load_tasks, config)
    tasks = load() if is_alone else None  # before the model, which takes longer to load
    trained = load_trained(config.checkpoint)
    codec = Codec(trained.tokenizer(), config.add_bos)
    device = processes.pick_device(config.device)
    longest = config.sequence_length or trained.config.longest_row
    mesh = start_sharing(
        config.parallel,
        trained,
        encode(config),
        device,
        micro_size=1,
        sequence_length=longest or config.batch_tokens,
        shares_samples=True,
        timeout_minutes=WAIT_MINUTES,
    )
    if not is_alone:
        tasks = processes.agree(lambda: load() if processes.is_main() else None)
    results = _results(config, trained, codec, tasks, mesh, device)
    if not processes.is_main():
        return
    _show(config, trained, results, output)


def _results(
    config: SuiteConfig, trained: TrainedModel, codec: Any, tasks: Any, mesh: Any, device: Any
) -> Any:
    """Return the harness's results on rank 0, None on others."""
    from llmtrain.engine.modules import autocast
    from llmtrain.harness.running import run_tasks
    from llmtrain.harness.team import Team

    team = Team(
        trained.build_over(mesh, device),
        codec,
        mesh,
        batch_tokens=config.batch_tokens,
        low_precision=autocast(config.precision, device),
    )

    with ExitStack() as opened:

        def make_model() -> Any:
            from llmtrain.harness.conversing import Conversing
            from llmtrain.harness.model import HarnessModel

            conversing = opened.enter_context(Conversing(trained)) if config.chat else None
            return HarnessModel.of(team, codec, trained, config.sequence_length, conversing)

        return run_tasks(team, make_model, tasks, limit=config.limit, chat=config.chat)


def _show(config: SuiteConfig, trained: TrainedModel, results: Any, output: Path | None) -> None:
    from importlib.metadata import version

    from llmtrain.harness.results import plain, table

    found = {
        "checkpoint": str(trained.source),
        "step": trained.step,
        "suite": config.suite,
        "lm_eval_version": version("lm_eval"),
        "limit": config.limit,
        **plain(results),
    }
    if output is not None:
        write_output(output, lambda path: files.write_json_atomically(path, found))
    if config.format == "json":
        print(json.dumps(found, allow_nan=False), flush=True)
        return
    for name in ("checkpoint", "step", "lm_eval_version"):
        print(f"{name:<15} {found[name]}", flush=True)
    for line in table(results):
        print(line, flush=True)


def _load_tasks(config: SuiteConfig) -> Any:
    from llmtrain.harness.tasks import load_tasks

    return load_tasks(config.tasks, config.tasks_path, config.num_fewshot)


def _unused(mapping: Mapping[str, Any], whole: type, used: set[str]) -> Iterator[Problem]:
    """Yield a problem for each given key that a suite does not use."""
    for each in fields(whole):
        if each.name in used or each.name not in mapping or each.name == "data":
            continue
        usual = each.default_factory() if callable(each.default_factory) else each.default
        value = encode(mapping[each.name])
        if value != encode(usual):
            yield Problem(each.name, str(value), f"its default with suite={mapping['suite']}", "leave it out")
    data = mapping.get("data") or {}
    for key in ("path", "mixture"):
        if data.get(key) not in (None, MISSING):
            yield Problem(f"data.{key}", str(data[key]), "none with a suite, whose tasks bring their data")


def _check_model(config: SuiteConfig, described: Described) -> None:
    """Raise ConfigError for a model that continues no texts, or that has no tokenizer."""
    model = described.config
    family = family_of(model)
    allowed = "a decoder, a language model that continues texts, with its tokenizer"
    if not family.continues_texts:
        got = f"{config.checkpoint}, a model of family {model.family} ({family.kind.replace('_', '–')})"
        raise ConfigError(Problem("checkpoint", got, allowed))
    if model.task is not None:
        got = f"{config.checkpoint}, a model with the head of a task ({model.task.kind})"
        raise ConfigError(Problem("checkpoint", got, allowed, "evaluate it on data, or give its trunk"))
    if described.tokenizer is None:
        raise ConfigError(Problem("checkpoint", f"{config.checkpoint}, without a tokenizer", allowed))
    longest = model.longest_row
    if longest is not None and (config.sequence_length or 0) > longest:
        allowed = f"2 to {longest}, the model's longest, or null"
        raise ConfigError(Problem("sequence_length", str(config.sequence_length), allowed))

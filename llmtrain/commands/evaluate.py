"""`llmtrain evaluate`: loss, perplexity and bits per byte of a trained model on held-out data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llmtrain import files
from llmtrain.config import decode, encode, require
from llmtrain.corpus.corpora import Corpora
from llmtrain.data.config import DataConfig, data_config_type
from llmtrain.engine.sharing import SharingConfig, stage_problems, start_sharing
from llmtrain.errors import ConfigError, Problem
from llmtrain.files import expand_home
from llmtrain.generation.bleu import check_bleu, translation_figures
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.written import check_written, written_figures
from llmtrain.harness import suite
from llmtrain.objectives.base import Calibrates, HasReference, ObjectiveConfig, Scores
from llmtrain.objectives.reading import (
    corpora_problems,
    data_problems,
    data_section,
    open_data,
    open_dataset,
    other_tokenizer,
)
from llmtrain.output import check_output, write_output
from llmtrain.scoring.figure import Figure
from llmtrain.scoring.report import Report
from llmtrain.standard_streams import print_note

if TYPE_CHECKING:
    import torch

    from llmtrain.corpus.text_source import TextSource
    from llmtrain.data.loader import MicroBatch
    from llmtrain.interchange.trained import TrainedModel

PICTURE = "confusion.png"
"""Name of a picture, by which the folder for them is checked."""
COUNT_WINDOW = 2**20
"""Number of tokens to read at once while counting."""


USUAL_LENGTH = 1024
"""Largest default sequence length: models of 128k positions would need a cluster at full length."""


@dataclass(frozen=True)
class EvaluateConfig:
    checkpoint: Path
    """A run folder, a checkpoint folder or an exported folder."""
    data: DataConfig
    objective: ObjectiveConfig | None = None
    """What is evaluated; null: what the model learned by. prompted: labels by a prompt, without training."""
    parallel: SharingConfig = field(default_factory=SharingConfig)
    split: str = "validation"
    """train, validation or test."""
    max_samples: int | None = None
    """Number of sequences to evaluate; null: all."""
    micro_size: int = 8
    """Sequences in one forward pass."""
    sequence_length: int | None = None
    """Tokens of one sequence; null: as in training, or, for a model trained elsewhere, 1024 or its longest
    sequence if that is shorter."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of matrix products."""
    device: str = "auto"
    """auto, cpu or cuda; auto: a GPU if there is one."""
    bleu: bool | None = None
    """Also print BLEU of the texts that an encoder–decoder generates, with the settings of `generate`; for
    the sources of a table ROUGE and chrF too. true with a model of objective=instruct: the same of its last
    answers. null: true for a table of an encoder–decoder, else false."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    unigram: bool = False
    """Also print the loss of the token frequencies of the training split; this reads the whole split."""
    output: Path | None = None
    """A JSON file for the figures; pictures of a task with classes lie beside it, if `pictures` is null."""
    pictures: Path | None = None
    """A folder for pictures of a task with classes: confusion.png and calibration.png; null: none."""
    format: Literal["text", "json"] = "text"
    """text: one line a figure; json: one object."""
    suite: Literal["lm_eval"] | None = None
    """lm_eval: do tasks of EleutherAI's lm-evaluation-harness, in place of data; null: evaluate on data."""
    tasks: tuple[str, ...] = ()
    """With suite=lm_eval: names of tasks, groups or tags, or patterns of them, such as `mmlu_*`."""
    tasks_path: Path | None = None
    """With suite=lm_eval: a folder of further tasks, a .yaml file for each, as --include_path of the harness.
    Functions of Python that such a file names are run."""
    limit: int | None = None
    """With suite=lm_eval: documents of each task, the first ones; null: all."""
    num_fewshot: int | None = None
    """With suite=lm_eval: solved examples before each document; null: as the task says."""
    add_bos: bool | None = None
    """With suite=lm_eval: begin each text with the bos token; null: where the tokenizer does."""
    chat: bool = False
    """With suite=lm_eval: render each request by the model's chat template, solved examples as turns."""
    batch_tokens: int = 4096
    """With suite=lm_eval: tokens of one forward pass, padding included."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.micro_size >= 1, "micro_size", self.micro_size, "1 or more")
        for name in ("max_samples", "sequence_length"):
            value = getattr(self, name)
            yield from require(value is None or value >= 1, name, value, "1 or more, or null")
        if self.bleu is False:
            yield from _unused_settings(self.generate)

    @property
    def writes(self) -> bool:
        """Return whether texts are generated, if the objective has any."""
        return self.data.is_table if self.bleu is None else self.bleu


def _unused_settings(generate: GenerateConfig) -> Iterator[Problem]:
    if generate != GenerateConfig():
        yield Problem("generate", "settings", "none with bleu=false", "give bleu=true")


def run(mapping: Mapping[str, Any]) -> None:
    """Print the figures. Raise UserError for whatever a user can fix."""
    if mapping.get("suite") is not None:
        suite.run(mapping, EvaluateConfig)
        return
    if given := [key for key in suite.KEYS if mapping.get(key) not in (None, [], False)]:
        problems = [Problem(key, str(mapping[key]), "with suite=lm_eval alone", "give it") for key in given]
        raise ConfigError(problems)
    output = None if mapping["output"] is None else expand_home(mapping["output"])
    if output is not None:
        check_output(output)
    pictures = None if mapping["pictures"] is None else expand_home(mapping["pictures"])
    if pictures is not None:
        check_output(pictures / PICTURE if pictures.is_dir() else pictures, key="pictures")

    from llmtrain.interchange.trained import describe

    described = describe(Path(mapping["checkpoint"]))
    mapping = {**mapping, "data": data_section(mapping["data"], described.objective, described.data)}
    config = decode(EvaluateConfig, mapping, {"data": data_config_type})
    objective_config = config.objective or described.objective
    if problems := data_problems(objective_config, config.data):
        raise ConfigError(problems)
    corpora = open_data(objective_config, config.data, described.tokenizer)

    from llmtrain.data.loader import evaluation_batches
    from llmtrain.distributed import processes
    from llmtrain.engine.evaluation import evaluate_batches
    from llmtrain.interchange.trained import load_trained
    from llmtrain.train.examiner import give_classifier
    from llmtrain.train.reference import of_rows, reference_of, starting_model

    trained = load_trained(config.checkpoint).learned_by(config.objective)
    _check(config, trained, corpora)
    writes = config.writes and (config.bleu or trained.objective.paired == "needed")
    of_table = config.data.is_table
    if not writes and (problems := list(_unused_settings(config.generate))):
        raise ConfigError(problems)
    if writes:
        check_bleu(trained.objective, config.parallel)
        if of_table:
            check_written(trained.objective, config.parallel)
    length = _sequence_length(config, trained)
    dataset = open_dataset(
        trained.objective, trained.config, config.data, corpora, config.split, length, _say_skipped
    )
    calibrating = trained.objective.calibration_rows(trained.config, corpora, length)
    objective = trained.objective.build(trained.config, config.data, corpora)
    start = None
    if isinstance(objective, HasReference):
        objective.references = reference_of(trained, dataset)
        start = starting_model(trained) if objective.references is None else None
    device = processes.pick_device(config.device)
    give_classifier(objective, trained.config, device)
    mesh = start_sharing(
        config.parallel,
        trained,
        encode(config),
        device,
        micro_size=config.micro_size,
        sequence_length=length,
        corpora=corpora,
        shares_samples=True,
    )
    batches_of = partial(
        evaluation_batches,
        collate=objective.collate,
        micro_size=config.micro_size,
        data_rank=mesh.coordinates.data,
        data_size=mesh.layout.data,
        workers=config.data.workers,
    )
    batches: Iterator[MicroBatch] = batches_of(dataset, max_samples=config.max_samples)
    counter = None
    if isinstance(corpora, Corpora):
        counter = TargetCounter(max(corpora.vocab_size, trained.config.vocab_size or 0))
        batches = counter.watch(batches)
    model = trained.build_over(mesh, device)
    counted = mesh.contributes_loss
    if isinstance(objective, Calibrates) and calibrating is not None:
        said = evaluate_batches(model, objective, batches_of(calibrating), device, config.precision, counted)
        objective.calibrate(said.rows)
    if isinstance(objective, HasReference) and start is not None:
        rows = batches_of(dataset, max_samples=config.max_samples)
        before = start.build_over(mesh, device)
        said = evaluate_batches(before, objective, rows, device, config.precision, counted)
        objective.references = of_rows(said.rows, len(dataset))
        del before  # or the memory of two would be held
    totals = evaluate_batches(model, objective, batches, device, config.precision, counted)
    if counter is not None:
        counter.sum_over_ranks(counted, device)
    translated: dict[str, Any] = {}
    if writes:
        of_texts: Any = written_figures if of_table else translation_figures
        translated = of_texts(trained, model, dataset, config.generate, mesh, config.max_samples)
    if not processes.is_main():
        return
    figures: dict[str, Any] = {
        "checkpoint": str(trained.source),
        "step": trained.step,
        "split": config.split,
        "targets": totals.num_targets,
        "loss": totals.loss,
        **totals.source_losses,
        **totals.metrics,
    }
    num_bytes = 0
    if counter is not None and corpora is not None:
        num_bytes = counter.num_bytes(corpora)
    figures |= objective.figures(totals.loss, totals.num_targets, totals.metrics, num_bytes)
    if counter is not None and isinstance(corpora, Corpora) and config.unigram:
        figures["unigram_loss"] = counter.unigram_loss(corpora)
    figures |= translated
    report = None
    if isinstance(objective, Scores) and totals.rows:
        figures |= objective.scores(dataset, totals.rows)
        report = objective.report(dataset, totals.rows)
    plain = _plain(figures) | ({} if report is None else report.encode())
    if output is not None:
        write_output(output, lambda path: files.write_json_atomically(path, plain))
    if report is not None:
        _draw(report, f"{config.split} of step {trained.step}", output, pictures)
    if config.format == "json":
        print(json.dumps(plain, allow_nan=False), flush=True)
        return
    width = max(15, *(len(name) for name in figures))
    for name, value in figures.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}} {shown}", flush=True)
    for line in () if report is None else report.lines():
        print(line, flush=True)


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures as JSON: one with an interval as `name` and `name_interval`, null for what is not
    defined."""
    plain: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Figure):
            plain |= {
                name: _finite(value.value),
                f"{name}_interval": [_finite(value.low), _finite(value.high)],
            }
        else:
            plain[name] = _finite(value)
    return plain


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw(report: Report, title: str, output: Path | None, folder: Path | None) -> None:
    """Write the pictures of a report into a folder, or beside the output under its name."""
    if folder is None and output is None:
        return
    from llmtrain.scoring.pictures import draw

    for name, png in draw(report, title).items():
        if folder is not None:
            write_output(folder / f"{name}.png", partial(_write_picture, png), key="pictures")
        elif output is not None:
            beside = output.with_name(f"{output.stem}.{name}.png")
            write_output(beside, partial(_write_picture, png))


def _write_picture(png: bytes, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    files.write_atomically(path, png)


class TargetCounter:
    """Counts the targets of batches by token, for figures that compare models."""

    def __init__(self, vocab_size: int) -> None:
        self._counts_V = np.zeros(vocab_size, dtype=np.int64)

    def watch(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        for micro in batches:
            labels = micro.batch["labels"].numpy()
            self._counts_V += np.bincount(labels[labels >= 0], minlength=len(self._counts_V))
            yield micro

    def sum_over_ranks(self, counted: bool, device: torch.device) -> None:
        """Add up the counts of all ranks for which `counted` is True."""
        import torch

        from llmtrain.distributed import processes

        counts_V = torch.from_numpy(self._counts_V).to(device) * counted
        self._counts_V = processes.all_sum(counts_V).cpu().numpy()

    def num_bytes(self, corpora: TextSource) -> int:
        """Return the UTF-8 bytes of the text of the targets; the end of a document has none."""
        lengths_V = corpora.load_tokenizer().token_byte_lengths()
        return int(self._counts_V[: len(lengths_V)] @ lengths_V)

    def unigram_loss(self, corpora: Corpora) -> float:
        """Return the mean loss, in nats, of the targets under the token frequencies of the training split.

        One is added to each count. A model that ignores the context could reach this loss.
        """
        counts_V = np.ones(len(self._counts_V), dtype=np.int64)
        for train in corpora.splits("train").values():
            for start in range(0, train.num_tokens, COUNT_WINDOW):
                tokens, _ = train.read(start, min(train.num_tokens, start + COUNT_WINDOW))
                counts_V += np.bincount(tokens, minlength=len(counts_V))
        log_probs_V = np.log(counts_V / counts_V.sum())
        return float(-(self._counts_V @ log_probs_V) / max(1, self._counts_V.sum()))


def _say_skipped(tar: str, samples: int) -> None:
    text = f"warning: {tar} is bad: its {samples:,} sequences are left out"
    print_note(text)


def _check(config: EvaluateConfig, trained: TrainedModel, corpora: TextSource | None) -> None:
    problems = corpora_problems(trained.objective, corpora)
    problems += stage_problems(trained.objective, config.parallel)
    if corpora is not None and trained.tokenizer_path is not None:
        ours = corpora.tokenizer_sha256
        theirs = trained.tokenizer().sha256
        if ours != theirs:
            where, path = str(trained.source), trained.tokenizer_path
            problems.append(other_tokenizer(config.data, ours, theirs, where, path))
    vocab_size = trained.config.vocab_size
    if not problems and corpora is not None and vocab_size is not None:
        needed = corpora.vocab_size
        if needed > vocab_size:
            problems.append(
                Problem(
                    "data.path",
                    f"data with a vocabulary of {needed:,} tokens",
                    f"at most {vocab_size:,}, the vocabulary of {trained.source}",
                    "prepare it with that model's own tokenizer",
                )
            )
    if problems:
        raise ConfigError(problems)


def _sequence_length(config: EvaluateConfig, trained: TrainedModel) -> int:
    longest = trained.config.longest_row
    usual = min(longest or USUAL_LENGTH, USUAL_LENGTH)
    length = config.sequence_length or trained.sequence_length or usual
    if longest is not None and length > longest:
        raise ConfigError(
            Problem("sequence_length", str(length), f"1 to {longest}, the model's longest", "shorten it")
        )
    return length

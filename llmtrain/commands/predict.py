"""`llmtrain predict`: what a fine-tuned model says of each row of a file, beside the row's own columns.

Rows are read, tokenized and predicted in chunks, of which the next one is tokenized while the model works. A
rank writes each of its chunks into a folder beside the output, so that a killed job goes on where it was; at
the end they are joined in the order of the input.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from llmtrain.config import decode, encode, require
from llmtrain.data.loader import in_order
from llmtrain.data.order import batches_by_length
from llmtrain.engine.sharing import SharingConfig, stage_problems, start_sharing
from llmtrain.errors import ConfigError, DataError, Problem
from llmtrain.files import disk_problem, expand_home, write_atomically
from llmtrain.generation.answer import refuse_pipeline_of_answers
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.written import Writer
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.output import check_output
from llmtrain.scoring.attention import AttendedText, as_html, as_png
from llmtrain.standard_streams import print_note
from llmtrain.tables.build import files_fingerprint, find_table_files, phrases
from llmtrain.tables.config import TableDataConfig
from llmtrain.tables.records import Record, name_of, read_records
from llmtrain.tables.table import TableSplit
from llmtrain.tables.writing import SUFFIXES, join_chunks, write_chunk

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmtrain.data.datasets.examples import Examples
    from llmtrain.prepare.source_file import SourceFile
    from llmtrain.tokenizers.base import Tokenizer

Chunk = Sequence[tuple[str, Record]]
"""Rows, each with where it is."""
ROWS_AT_A_TIME = 2048
CPU_TOKENS = 1024
"""Tokens of a forward pass on a CPU, if `micro_size` is not given."""


@dataclass(frozen=True)
class PredictConfig:
    checkpoint: Path
    """A run folder, a checkpoint folder or an exported folder."""
    input: str
    """A file, a folder, a glob pattern or `package:NAME/path`."""
    output: Path
    """A .jsonl, .csv, .tsv or .parquet file."""
    task: str | None = None
    """Task to predict, of a model that learned several."""
    objective: ObjectiveConfig | None = None
    """What is predicted; null: what the model learned by. prompted: labels by a prompt, without training."""
    parallel: SharingConfig = field(default_factory=SharingConfig)
    text_field: str | None = None
    """Field of the text; null: that of the training data."""
    text_pair_field: str | None = None
    """Field of the second text; null: that of the training data."""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "conll", "json"] = "auto"
    """Form of the input; auto: by its extension."""
    header: bool | None = None
    """Whether the first line of a csv or tsv names its columns; null: as in the training data."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Settings of the texts that an encoder–decoder generates; max_new_tokens=null: the length of targets in
    training."""
    sequence_length: int | None = None
    """Tokens of the longest row; null: as in training."""
    micro_size: int | None = None
    """Rows of the longest length in a forward pass; of shorter rows as many more. null: 32 on a GPU; on a
    CPU as many as make 1,024 tokens, whose hidden states stay in its cache."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of matrix products; texts are always written in fp32."""
    device: str = "auto"
    """auto, cpu or cuda; auto: a GPU if there is one."""
    attention: Path | None = None
    """A .html or .png file for the weights of a model with attention over the words of texts; null: none."""
    attention_rows: int = 10
    """Rows, from the first, whose weights are drawn."""

    def problems(self) -> Iterator[Problem]:
        size = self.micro_size
        yield from require(size is None or size >= 1, "micro_size", size, "1 or more, or null")
        length = self.sequence_length
        yield from require(length is None or length >= 1, "sequence_length", length, "1 or more, or null")
        allowed = " ".join(SUFFIXES)
        yield from require(self.output.suffix in SUFFIXES, "output", self.output, f"a name with {allowed}")
        drawn, count = self.attention, self.attention_rows
        is_drawing = drawn is None or drawn.suffix in (".html", ".png")
        yield from require(is_drawing, "attention", drawn, "a name with .html or .png, or null")
        yield from require(1 <= count <= 1000, "attention_rows", count, "1 to 1000")


def run(mapping: Mapping[str, Any]) -> None:
    """Write the predictions. Raise UserError for whatever a user can fix."""
    config = decode(PredictConfig, mapping)
    output = expand_home(config.output)
    check_output(output)

    from llmtrain.distributed import processes
    from llmtrain.interchange.one_task import described_of, model_of
    from llmtrain.interchange.trained import describe, load_trained

    described = described_of(describe(config.checkpoint), config.task)
    objective: Any = config.objective or described.objective
    writes = objective.paired == "needed"
    if writes:
        refuse_pipeline_of_answers(config.parallel)
    elif config.generate != GenerateConfig():
        got = f"settings with a model of {objective.kind}, which writes no texts"
        raise ConfigError(Problem("generate", got, "none", "leave it out"))
    if problems := stage_problems(objective, config.parallel):
        raise ConfigError(problems)
    lacks_head = objective.has_task_head and described.config.task is None
    if not writes and (not objective.labels_rows or lacks_head):
        got = f"a model that learned by {objective.kind}"
        remedy = "see llmtrain finetune --help"
        raise ConfigError(Problem("checkpoint", got, "one with the head of a task", remedy))
    data = _data(config, described.data)
    if config.attention is not None:
        check_output(expand_home(config.attention))
        refuse_without_weights(described.config, data)
    files = find_table_files(data)[""]
    trained = model_of(load_trained(config.checkpoint), config.task).learned_by(config.objective)
    length = config.sequence_length or trained.sequence_length or 512
    device = processes.pick_device(config.device)
    micro_size = config.micro_size or (32 if device.type == "cuda" else max(1, CPU_TOKENS // length))
    mesh = start_sharing(
        config.parallel,
        trained,
        encode(config),
        device,
        micro_size=micro_size,
        sequence_length=length,
        shares_samples=True,
    )
    model = trained.build_over(mesh, device)
    task = objective.build(trained.config, data)
    writer = Writer(trained, model, config.generate) if writes else None
    work = _Work(
        config,
        objective,
        task,
        data,
        trained.tokenizer(),
        model,
        device,
        length,
        micro_size * length,
        trained.config,
        writer,
    )
    key = xxhash.xxh3_64_hexdigest(
        f"{files_fingerprint({'': files})}/{trained.source}/{trained.step}/{encode(data)}/{length}"
        f"/{encode(config.generate)}".encode()
    )
    folder = output.with_name(f".{output.name}.{key}.parts")
    try:
        folder.mkdir(exist_ok=True)
        chunks = work.run(files, folder, mesh.coordinates.data, mesh.layout.data, mesh.contributes_loss)
        processes.barrier()
        if processes.is_main():
            join_chunks([folder / f"{number:08d}.jsonl" for number in range(chunks)], output)
            shutil.rmtree(folder)
            print_note(f"written    {output}")
            if config.attention is not None:
                drawn = expand_home(config.attention)
                write_atomically(drawn, work.drawing(files, drawn.suffix))
                print_note(f"written    {drawn}")
    except DataError:
        shutil.rmtree(folder, ignore_errors=True)  # of an input that has to change
        raise
    except OSError as error:
        raise ConfigError(disk_problem(error, output, key="output")) from error


def refuse_without_weights(model: Any, data: TableDataConfig) -> None:
    """Raise ConfigError for a model, or rows, whose words have no weights to draw."""
    if not model.weighs_tokens:
        got, allowed = f"a drawing with model.family={model.family} without attention over its states", "null"
        raise ConfigError(Problem("attention", got, allowed, "train with model=attention_lstm"))
    if data.text_pair_field is not None:
        raise ConfigError(Problem("attention", "a drawing of pairs of texts", "null with text_pair_field"))


def _data(config: PredictConfig, recorded: Mapping[str, Any] | None) -> TableDataConfig:
    """Return the section `data` for the input: that of the training data with what is given."""
    section = TableDataConfig.keys_of(recorded)
    section |= {"path": config.input, "train": None, "validation": None, "test": None}
    section |= {"format": config.format, "kind": TableDataConfig.kind}
    for name in ("text_field", "text_pair_field", "header"):
        if getattr(config, name) is not None:
            section[name] = getattr(config, name)
    return decode(TableDataConfig, section)


@dataclass
class _Work:
    """The prediction of all rows of some files."""

    config: PredictConfig
    objective: Any
    """A TaskConfig, or that of an encoder–decoder that writes."""
    task: Any
    data: TableDataConfig
    tokenizer: Tokenizer
    model: nn.Module
    device: torch.device
    length: int
    tokens: int
    """Tokens of a forward pass."""
    model_config: Any
    writer: Writer | None = None
    """Writes texts, with a model that does."""

    def run(self, files: Sequence[SourceFile], folder: Path, rank: int, size: int, writes: bool) -> int:
        """Write the chunks of this rank that are not there yet; return the number of all chunks."""
        started, rows, number = time.perf_counter(), 0, -1

        def own() -> Iterator[tuple[Path, Chunk]]:
            nonlocal number
            for number, chunk in enumerate(self._chunks(files)):
                path = folder / f"{number:08d}.jsonl"
                if number % size == rank and not path.exists():
                    yield path, chunk

        def tokenized(place: tuple[Path, Chunk]) -> tuple[Path, Chunk, Examples]:
            return *place, self._tokenized(place[1])

        for path, chunk, examples in in_order(tokenized, own(), workers=1):
            records = self._predicted(chunk, examples)
            if writes:
                write_chunk(path, records)
            rows += len(chunk)
            rate = rows / (time.perf_counter() - started)
            print_note(f"{rows:,} rows, {rate:,.0f} rows/s")
        if number < 0:
            raise DataError(Problem("input", "no row", "rows with text"))
        return number + 1

    def _chunks(self, files: Sequence[SourceFile]) -> Iterator[Chunk]:
        def rows() -> Iterator[tuple[str, Record]]:
            for file in files:
                for record in read_records(file, quoting=self.data.quoting, header=self.data.header):
                    yield name_of(file, record.line), record

        reading = rows()
        while chunk := list(islice(reading, ROWS_AT_A_TIME)):
            yield chunk

    def drawing(self, files: Sequence[SourceFile], suffix: str) -> bytes:
        """Return the weights of the first rows, as HTML or PNG."""
        chunk = next(self._chunks(files))[: self.config.attention_rows]
        said = self._predicted(chunk, self._tokenized(chunk))
        texts = [self.objective.content(record.values, self.data)[0] for _, record in chunk]
        columns = self.objective.encode_texts([(text,) for text in texts], self.tokenizer)
        columns |= self.objective.blank_labels(texts)
        examples = self._examples(TableSplit("input", columns, ""))
        attended = []
        for row, (text, values) in enumerate(zip(texts, said, strict=True)):
            weights = self._weights(examples, row)
            spans = self.tokenizer.encode_with_offsets(text)[1][: weights.shape[1]]
            attended.append(AttendedText(self._caption(values), text, spans, weights))
        title = f"attention of {self.config.checkpoint}"
        return as_png(attended, title) if suffix == ".png" else as_html(attended, title).encode()

    def _weights(self, examples: Examples, row: int) -> np.ndarray:
        """Return the weights of the tokens of a row's text, (heads, tokens)."""
        import torch

        from llmtrain.engine.modules import to_device

        batch = to_device(self.task.collate(examples.get(np.array([row]))), self.device)
        with torch.inference_mode():
            weights = self.model.attention_weights(batch["tokens"], batch["lengths"])[0]  # type: ignore[operator]
        first, count = examples.text_positions(row)
        return np.asarray(weights[:, first : first + count].cpu().numpy())

    def _caption(self, values: Mapping[str, Any]) -> str:
        """Return what the model says of a row, and its label if the row has one."""
        label = values.get(self.data.label_field)
        given = "" if label is None else f"label {label}, "
        sure = f" ({values['probability']:.3f})" if "probability" in values else ""
        return f"{given}prediction {values['prediction']}{sure}"

    def _tokenized(self, chunk: Chunk) -> Examples:
        """Return the rows as the model reads them."""
        contents = []
        for where, record in chunk:
            try:
                contents.append(self.objective.content(record.values, self.data))
            except ValueError as error:
                raise DataError(Problem(where, *phrases(error))) from error
        columns = self.objective.encode_texts(contents, self.tokenizer)
        columns |= self.objective.blank_labels(contents)
        return self._examples(TableSplit("input", columns, ""))

    def _predicted(self, chunk: Chunk, examples: Examples) -> list[dict[str, Any]]:
        """Return the rows with what the model says of them."""
        said = self._said(examples, len(chunk))
        return [{**record.values, **of_row} for (_, record), of_row in zip(chunk, said, strict=True)]

    def _said(self, examples: Any, count: int) -> list[dict[str, Any]]:
        """Return what the model says of each row."""
        if self.writer is not None:
            sources = [examples.source(row) for row in range(count)]
            return [{"prediction": text} for text in self.writer.write(sources)]
        found: dict[int, np.ndarray] = {}
        for rows in batches_by_length(examples.lengths, self.tokens):
            found |= dict(zip(rows.tolist(), self._forward(examples, rows), strict=True))
        of_rows = self.task.said_of(examples, found)
        return [of_rows[row] for row in range(count)]

    def _examples(self, split: TableSplit) -> Examples:
        return self.objective.examples_of_split(self.model_config, split, self.tokenizer, self.length)

    def _forward(self, examples: Examples, rows: np.ndarray) -> list[np.ndarray]:
        import torch

        from llmtrain.engine.modules import autocast, to_device

        batch = to_device(self.task.collate(examples.get(rows)), self.device)
        self.model.eval()
        with torch.inference_mode(), autocast(self.config.precision, self.device):
            logits = self.model(**self.task.inputs(batch)).float()
        return self.task.predictions(logits, batch)

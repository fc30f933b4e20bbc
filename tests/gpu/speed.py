"""Tokens per second, MFU and peak memory of training in bf16, against transformers' Trainer and `plan`.

Both take fused AdamW, clip at 1, and have neither dropout nor document masks, which the Trainer lacks.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.plan.estimate import estimate
from llmtrain.track.peak import PeakKeeper
from llmtrain.track.throughput import memory_bytes
from llmtrain.train.resolve import resolve
from tests.bench.against_trainer import rows_of, trainer_steps
from tests.gpu.runs import corpus, engine_of
from tests.gpu.table import Row, judged
from tests.support.training import compose

STEPS, WARM_STEPS = 12, 4
SLOWEST = 0.9
"""Of the Trainer's tokens per second, on a GPU."""
PLANNED = {"cuda": (0.5, 1.05), "cpu": (0.0, 2.0)}
"""Least and most of the planned bytes that a run may hold: on a GPU a plan adds up what is not there at once,
and what the allocator loses. On a CPU what else is imported counts too."""
GIB = 2**30

COMMON = (
    "precision=bf16",
    "model.dropout=0.0",
    "data.document_mask=false",
    "train.steps=1000",
    "data.workers=1",
)
TINY = (
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.mlp_hidden_size=128",
    "model.vocab_size=512",
    "batch.sequence_length=64",
    "batch.global_size=2",
    "batch.micro_size=2",
    "precision=fp32",
)
"""On a CPU, behind the others; not every processor has bf16."""


@dataclass(frozen=True)
class Contest:
    part: str
    overrides: tuple[str, ...]
    theirs: Callable[[Any, int], Any]
    """(our config, tokens of a row) → their model, of random weights."""


def gpt2(device: str, folder: Path) -> Iterator[Row]:
    def theirs(config: Any, T: int) -> Any:
        import transformers

        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size, n_positions=T, n_embd=config.hidden_size,
                n_layer=config.num_layers, n_head=config.num_heads, n_inner=config.mlp_width,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            )
        )  # fmt: skip

    sizes = _sizes(1024, 8)
    yield from _rows(
        Contest("gpt2 124M", ("model=gpt2_124m", "model.vocab_size=50257", *sizes), theirs), device, folder
    )


def bert(device: str, folder: Path) -> Iterator[Row]:
    def theirs(config: Any, T: int) -> Any:
        import transformers

        return transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=config.vocab_size, max_position_embeddings=T, hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
                intermediate_size=config.mlp_width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    overrides = ("model=bert_base", "objective=mlm", "model.vocab_size=30522", *_sizes(512, 16))
    yield from _rows(Contest("bert base", overrides, theirs), device, folder)


def llama(device: str, folder: Path) -> Iterator[Row]:
    """Llama 3.2's form, 1.24 billion parameters."""

    def theirs(config: Any, T: int) -> Any:
        import transformers

        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size, max_position_embeddings=T, hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
                num_key_value_heads=config.kv_heads, intermediate_size=config.mlp_width,
                tie_word_embeddings=True, use_cache=False,
            )
        )  # fmt: skip

    model = (
        "model=llama3_8b",
        "model.hidden_size=2048",
        "model.num_layers=16",
        "model.num_heads=32",
        "model.num_kv_heads=8",
        "model.mlp_hidden_size=8192",
        "model.tie_embeddings=true",
    )
    tiny = ("model.num_kv_heads=2",) if device == "cpu" else ()
    yield from _rows(Contest("llama 1B", (*model, *tiny, *_sizes(2048, 2)), theirs), device, folder)


def _sizes(length: int, rows: int) -> tuple[str, ...]:
    return (f"batch.sequence_length={length}", f"batch.global_size={rows}", f"batch.micro_size={rows}")


def _rows(contest: Contest, device: str, folder: Path) -> Iterator[Row]:
    settings = [*contest.overrides, *COMMON, *(TINY if device == "cpu" else ())]
    settings += [f"data.path={corpus(folder)}", f"device={device}"]
    resolved = resolve(compose(settings))
    config = resolved.config
    planned = estimate(config.model, resolved.layout, config).memory
    if device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
        if planned.total > there:
            why = f"it needs {planned.total / GIB:.0f} GiB, and this GPU has {there / GIB:.0f}"
            yield Row(contest.part, "all of it", "passed over", why)
            return
    tokens = config.batch.global_size * config.batch.sequence_length
    flops = config.model.flops_per_token(config.objective.row(config.batch.sequence_length))
    peak = PeakKeeper(device, config.precision)

    def speed(seconds: Sequence[float]) -> tuple[float, str]:
        rate = tokens / statistics.median(seconds[WARM_STEPS:])
        share = peak.utilization(rate * flops)
        source = "" if peak.peak is None else f" of {peak.peak.source}"
        return rate, f"{rate:,.0f} tokens/s, MFU {'unknown' if share is None else f'{share:.1%}{source}'}"

    seconds, rows, held = _train(settings, device)
    ours, told = speed(seconds)
    yield judged(contest.part, "llmtrain", ours > 0, told)

    least, most = PLANNED[device]
    # A GPU's context is no allocation of torch's.
    expected = planned.total - (planned.runtime if device == "cuda" else 0)
    detail = f"held {held / GIB:.2f} of {expected / GIB:.2f} GiB planned: {held / expected:.2f}"
    good = least <= held / expected <= most
    yield judged(contest.part, "peak memory", good, f"{detail} ({least:g} to {most:g})")

    with torch.device(device):
        model = contest.theirs(config.model, config.batch.sequence_length)
    steps = trainer_steps(model, rows, config.batch.micro_size, config.precision, device)
    theirs, told = speed([wall for wall, _, _ in steps])
    detail = f"{told}; llmtrain {ours / theirs:.2f} times as fast"
    detail += f" (at least {SLOWEST:g})" if device == "cuda" else ""
    good = device == "cpu" or ours >= SLOWEST * theirs
    yield judged(contest.part, "transformers' Trainer", good, detail)


def _train(settings: Sequence[str], device: str) -> tuple[list[float], list[Any], int]:
    """Seconds of each step, the rows that were read as their model takes them, and the most bytes held."""
    engine, loader = engine_of(settings)
    seconds: list[float] = []
    rows: list[Any] = []
    for step in itertools.islice(loader.steps(0), STEPS):
        started = time.perf_counter()
        engine.train_step(step.micro_batches, lr=3e-4)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        for micro in step.micro_batches:
            rows += rows_of(_theirs(micro.batch))
    held = memory_bytes(device)
    del engine, loader
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds, rows, held


def _theirs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Their decoders shift labels themselves; a BERT's name the hidden tokens."""
    is_decoder = torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
    return {"input_ids": batch["tokens"], "labels": batch["tokens"] if is_decoder else batch["labels"]}

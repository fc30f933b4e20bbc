"""Published runs as the planner takes them: rows of published.csv → model, layout and assumptions."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from llmtrain.config import decode
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.nn.memory import Conditions
from llmtrain.nn.model_config import Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.layout import Layout
from llmtrain.plan.config import AssumeConfig, ClusterConfig
from llmtrain.plan.memory import GIB, memory_of_stages
from llmtrain.plan.times.collectives import links_of
from llmtrain.plan.times.device import device_of
from llmtrain.plan.times.layer import Setting
from llmtrain.plan.times.step import Host, StepTime, step_time

FOLDER = Path(__file__).parent
CONF = FOLDER.parents[1] / "conf"
CLUSTERS = {"h100_96g_500w": "h100_96g"}
"""GPU of a row → its cluster, where the names differ."""
FUSED = ("Megatron-LM", "Megatron-DeepSpeed", "NeMo")
"""Programs whose operations on each element are fused by hand."""
FIRST_FLASH: dict[str, Any] = {"composer FSDP": "flash1"}
"""Programs of before FlashAttention 2: these runs have `attn_impl: triton` of llm-foundry (2023)."""
HOST_NETWORKS = {"4 Omni-Path": 4 * 100e9 / 8, "400 Gb/s per node": 400e9 / 8}
"""Words of a row on its network → bytes a second that a node of eight devices shares, where `conf/cluster/`
has others."""


@dataclass(frozen=True)
class Run:
    """A published run."""

    source: str
    group: str
    """Near-duplicates: one model on one kind of GPU in one source."""
    label: str
    gpu: str
    model: GPTConfig
    layout: Layout
    recompute: RecomputeConfig
    precision: str
    assume: AssumeConfig
    interconnect: str
    tokens_per_second: float
    """Tokens a second of one device, as published."""
    memory_gib: float | None

    @property
    def devices_kind(self) -> str:
        return self.gpu.partition("_")[0]


def read(path: Path = FOLDER / "published.csv") -> list[Run]:
    """Return the runs of a file."""
    with path.open(newline="") as file:
        return [_run(row) for row in csv.DictReader(file)]


def cluster_of(run: Run) -> ClusterConfig:
    """Return the cluster of a run, with the network that its source states."""
    cluster = _cluster(CLUSTERS.get(run.gpu, run.gpu))
    shared = next((bytes_ for words, bytes_ in HOST_NETWORKS.items() if words in run.interconnect), None)
    return cluster if shared is None else replace(cluster, network_bandwidth=shared / 8)


@cache
def _cluster(name: str) -> ClusterConfig:
    return decode(ClusterConfig, yaml.safe_load((CONF / f"cluster/{name}.yaml").read_text()))


def predicted(run: Run, cluster: ClusterConfig, *, is_exact: bool = True) -> StepTime:
    """Return the time of a run's step on a cluster."""
    precision: Any = run.precision
    device = device_of(cluster, precision)
    assert device is not None
    setting = Setting(
        device,
        links_of(cluster, run.layout.world_size),
        run.layout,
        Row(run.layout.sequence_length, predicted=run.layout.sequence_length),
        run.assume,
        run.assume.attention,
        residual_bytes=2,
    )
    host = Host(cluster.host_bandwidth or 1e12, cluster.host_memory_bandwidth or 1e12)
    return step_time(run.model, setting, run.recompute, 2, host, is_exact=is_exact)


def tokens_per_second(run: Run, cluster: ClusterConfig, *, is_exact: bool = True) -> float:
    """Return the planned tokens a second of one device."""
    seconds = predicted(run, cluster, is_exact=is_exact).seconds
    return run.layout.tokens_per_step / seconds / run.layout.world_size


def memory_gib(run: Run) -> float:
    """Return the planned memory of one device, in the stage that holds most, in GiB."""
    precision: Any = run.precision
    length = run.layout.sequence_length
    stages = memory_of_stages(
        run.model,
        Row(length, predicted=length),
        run.layout,
        precision=precision,
        optimizer=OptimizerConfig(),
        conditions=Conditions("cuda", document_mask=False, recompute=run.recompute),
    )
    return max(stage.total for stage in stages) / GIB


def by_source(runs: list[Run]) -> Iterator[tuple[str, list[Run]]]:
    """Yield each source with its runs."""
    for source in sorted({run.source for run in runs}):
        yield source, [run for run in runs if run.source == source]


def padded(size: int, multiple: int) -> int:
    """Return the next multiple, as Megatron pads vocabularies (`--make-vocab-size-divisible-by 128`)."""
    return -(-size // multiple) * multiple


def _run(row: dict[str, str]) -> Run:
    def number(name: str, default: int = 1) -> int:
        return int(float(row[name])) if row[name] else default

    gated = row["gated"] == "yes"
    tensor, pipeline, sequence = number("tp"), number("pp"), number("cp")
    data, micro = number("dp"), number("micro_batch")
    framework = row["framework"]
    model = GPTConfig(
        vocab_size=padded(number("vocab"), 128 * tensor if framework in FUSED else 1),
        max_sequence_length=number("seq_len"),
        hidden_size=number("hidden"),
        num_layers=number("layers"),
        num_heads=number("heads"),
        num_kv_heads=number("kv_heads"),
        mlp_hidden_size=number("ffn"),
        activation="silu" if gated else "gelu_tanh",
        gated_mlp=gated,
        norm="rmsnorm" if gated else "layernorm",
        positions="rope" if gated or "Nemotron" in row["model"] else "learned",
        tie_embeddings=row["tied_emb"] != "no",
        dropout=0.1 if framework == "Megatron-LM" else 0.0,
    )
    layout = Layout(
        world_size=number("n_gpus"),
        data=data,
        tensor=tensor,
        pipeline=pipeline,
        sequence=sequence,
        zero=number("zero_stage", 0),
        micro_size=micro,
        accumulation=number("global_batch") // (data * micro),
        global_size=number("global_batch"),
        sequence_length=number("seq_len"),
        tensor_sequence=row["seq_parallel"] == "yes" and tensor > 1,
        balance="time",
    )
    modern = framework == "NeMo"
    assume = AssumeConfig(
        virtual_stages=number("vpp"),
        attention="all_scores" if row["flash"] == "no" else FIRST_FLASH.get(framework, "flash"),
        even_layers=pipeline > 1 and framework != "Megatron-DeepSpeed",
        whole_recompute=framework in FUSED,
        gradient_bytes=4 if "mixed_precision DEFAULT" in row["note"] else None,
        fused=framework in FUSED or row["compile"] == "yes",
        overlap_gradients=True if modern else None,
        scatter_gradients=modern,
        regather=True,
        overlap_transfers=modern,
        overlap_tensor=modern or "async TP" in row["note"],
    )
    return Run(
        source=row["family"],
        group=row["group"],
        label=f"{row['model']}, {row['n_gpus']} devices",
        gpu=row["gpu"],
        model=model,
        layout=layout,
        recompute=RecomputeConfig(row["recompute"]),  # type: ignore[arg-type]
        precision="fp16" if row["precision"] == "fp16" else "bf16",
        assume=assume,
        interconnect=row["interconnect"],
        tokens_per_second=float(row["tok_s_gpu"]),
        memory_gib=float(row["peak_mem_gib"]) if row["peak_mem_gib"] else None,
    )

"""The configuration of the machines that a run is planned for, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmtrain.config import require
from llmtrain.errors import Problem

BOUNDS: Mapping[str, tuple[float, float]] = {
    "devices_per_node": (1, 10_000),
    "memory_bytes": (1, 1e14),
    "memory_bandwidth": (1e8, 1e15),
    "multiprocessors": (1, 1e5),
    "node_bandwidth": (1e7, 1e14),
    "node_latency": (0, 1),
    "network_bandwidth": (1e6, 1e13),
    "network_latency": (0, 10),
    "host_bandwidth": (1e7, 1e14),
    "host_memory_bandwidth": (1e8, 1e14),
    "storage_bandwidth": (1e5, 1e14),
    "watts": (0.1, 1e5),
    "price_per_hour": (0, 1e5),
    "pue": (1, 5),
}
"""Figure → the smallest and the largest value that is accepted: beyond them the unit must be wrong."""
PRECISIONS = ("fp32", "bf16", "fp16")
PEAK_BOUNDS = (1e8, 1e18)
"""Bounds of a peak, in FLOP/s."""
NEEDED = (
    "device",
    "devices_per_node",
    "memory_bytes",
    "memory_bandwidth",
    "node_bandwidth",
    "network_bandwidth",
)
"""Figures that every cluster but this machine must have."""


@dataclass(frozen=True)
class EfficiencyConfig:
    """Fractions of the data sheet's figures that a device reaches in practice: the constants of the time
    model.
    `tests/bench/published.py` fits those of GPUs to published runs; `llmtrain plan calibrate` measures those
    of this machine."""

    matrix: float = 0.75
    """Share of the peak that large matrix products reach."""
    matrix_depth: float = 150.0
    """Length of the inner dimension at which a matrix product reaches half of that rate."""
    matrix_depths: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Precision → the same of its products; a precision that is missing has matrix_depth."""
    weight_gradients: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Precision → rate of the product that gives a weight's gradient, both of whose operands are read across
    their rows, in that of other products; missing: 1."""
    attention: float = 0.6
    """Share of the peak that a flash attention kernel reaches in its matrix products."""
    memory: float = 0.75
    """Share of the memory bandwidth that elementwise operations reach."""
    unfused: float = 1.5
    """Memory traffic of unfused elementwise operations, as a multiple of that of fused ones."""
    node_link: float = 0.75
    """Share of `node_bandwidth` that collectives reach."""
    network: float = 0.75
    """Share of `network_bandwidth` that collectives reach."""
    interference: float = 0.2
    """Share of a collective's time by which it slows the computation that overlaps with it."""
    kernel_seconds: float = 5e-6
    """Time that the host takes to launch one operation of the device."""
    layer_seconds: float = 0.0
    """Fixed overhead of each pass through a layer."""
    step_seconds: float = 0.0
    """Fixed overhead of each step."""

    def problems(self) -> Iterator[Problem]:
        for name in ("matrix", "attention", "memory", "node_link", "network"):
            value = getattr(self, name)
            yield from require(0 < value <= 1.5, name, value, "above 0, up to 1.5")
        yield from require(self.matrix_depth >= 0, "matrix_depth", self.matrix_depth, "0 or more")
        for name in ("matrix_depths", "weight_gradients"):
            for precision, value in getattr(self, name).items():
                where = f"{name}.{precision}"
                yield from require(precision in PRECISIONS, name, precision, ", ".join(PRECISIONS))
                is_share = name == "weight_gradients"
                is_right = 0 < value <= 1.5 if is_share else value >= 0
                yield from require(is_right, where, value, "above 0, up to 1.5" if is_share else "0 or more")
        yield from require(self.unfused >= 1, "unfused", self.unfused, "1 or more")
        yield from require(0 <= self.interference <= 1, "interference", self.interference, "0 to 1")
        for name in ("kernel_seconds", "layer_seconds", "step_seconds"):
            value = getattr(self, name)
            yield from require(0 <= value <= 10, name, value, "0 to 10 seconds")


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that a run is planned for; all null: this machine."""

    name: str = "local"
    """Name of the cluster in messages."""
    device: Literal["cpu", "cuda"] | None = None
    """Kind of device; null: the kind that this machine has."""
    devices_per_node: int | None = None
    """Number of devices, and so of processes, of one host."""
    memory_bytes: int | None = None
    """Memory of one device; null: this machine's."""
    peak_flops: Mapping[str, float] = field(default_factory=dict)
    """Peak FLOP/s of dense matrix products of one device, by precision (fp32, bf16, fp16)."""
    memory_bandwidth: float | None = None
    """Bytes that a device reads and writes of its memory in a second."""
    multiprocessors: int | None = None
    """Multiprocessors of a device, each of which computes a tile of a matrix product; null: any product fills
    the device."""
    node_bandwidth: float | None = None
    """Bytes that a device can send to others of its host in a second."""
    node_latency: float = 5e-6
    """Latency of a message within a host, in seconds."""
    network_bandwidth: float | None = None
    """Bytes that a device can send to other hosts in a second: its share of the host's adapters."""
    network_latency: float = 1.5e-5
    """Latency of a message between hosts, in seconds."""
    host_bandwidth: float | None = None
    """Bytes that a device can exchange with the host's memory in a second, as offloading does; null: as fast
    as the device's memory."""
    host_memory_bandwidth: float | None = None
    """Bytes that a host reads and writes of its memory in a second, for an optimizer step on it; null: as
    host_bandwidth."""
    storage_bandwidth: float | None = None
    """Bytes of a checkpoint that one host writes in a second; null: unknown, and not counted."""
    watts: float | None = None
    """Electric power of one device with its share of the host; null: energy is not counted."""
    pue: float = 1.2
    """Power of the whole building divided by that of its computers (power usage effectiveness)."""
    price_per_hour: float | None = None
    """Price of one device for an hour, in dollars; null: cost is not counted."""
    efficiency: EfficiencyConfig = field(default_factory=EfficiencyConfig)

    def problems(self) -> Iterator[Problem]:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            allowed = f"{least:g} to {most:g}, or null"
            yield from require(value is None or least <= value <= most, name, value, allowed)
        least, most = PEAK_BOUNDS
        for precision, peak in self.peak_flops.items():
            where = f"peak_flops.{precision}"
            yield from require(precision in PRECISIONS, "peak_flops", precision, ", ".join(PRECISIONS))
            yield from require(least <= peak <= most, where, peak, f"{least:g} to {most:g} FLOP/s")
        if self.has_figures:
            missing = [name for name in NEEDED if getattr(self, name) is None]
            missing += [] if self.peak_flops else ["peak_flops"]
            if missing:
                others = f" and of {', '.join(missing[1:])}" if missing[1:] else ""
                remedy = "give all, or take cluster=local without figures"
                if self.name == "local":
                    remedy = "llmtrain plan calibrate measures all figures of this machine"
                yield Problem(missing[0], "nothing", f"a figure of it{others}, as of the others", remedy)

    @property
    def has_figures(self) -> bool:
        """Whether the cluster is described, so that times can be planned for it."""
        figures = (self.memory_bytes, self.memory_bandwidth, self.node_bandwidth, self.network_bandwidth)
        return any(figure is not None for figure in figures) or bool(self.peak_flops)

    @property
    def is_local(self) -> bool:
        """Whether the run is planned for this machine."""
        return self.memory_bytes is None


@dataclass(frozen=True)
class AssumeConfig:
    """How the software of the planned run differs from llmtrain: for plans of runs of other programs."""

    virtual_stages: int = 1
    """Runs of layers of each pipeline stage under the interleaved schedule (arXiv:2104.04473); 1: 1F1B, which
    llmtrain runs."""
    attention: Literal["auto", "flash", "flash1", "all_scores"] = "auto"
    """Attention's kernel. auto: the one that llmtrain chooses; flash: FlashAttention 2 or cuDNN's; flash1:
    the first FlashAttention, half as fast; all_scores: scores of all pairs are written to memory, as before
    it."""
    even_layers: bool = False
    """All pipeline stages have the same number of layers, without regard to embedding and head, as in
    Megatron; false: stages are balanced including these, as in llmtrain."""
    fused: bool = False
    """Elementwise operations are fused, by a compiler or by hand, as in Megatron, and so are the two input
    matrices of a gated MLP; llmtrain fuses neither."""
    overlap_gradients: bool | None = None
    """Gradients are reduced during the backward pass; null: as in llmtrain, which does so without a
    pipeline."""
    whole_recompute: bool = False
    """Recomputation of a whole layer computes its last product again, whose output nothing needs; false: as
    in llmtrain."""
    gradient_bytes: Literal[2, 4] | None = None
    """Bytes of each gradient element in reductions; null: as in llmtrain."""
    scatter_gradients: bool = False
    """Below ZeRO 3 gradients are reduce-scattered: a rank receives the sums only for the optimizer state that
    it holds, as in Megatron and NeMo; false: all-reduced, which is twice the bytes, as in DeepSpeed."""
    regather: bool = False
    """ZeRO 3 gathers all weights again for the backward pass, as FSDP does; false: all but the last ones of
    the forward pass, which DeepSpeed keeps."""
    overlap_transfers: bool = False
    """Pipeline stages send activations and gradients while they compute; false: they wait until the transfer
    is done."""
    overlap_tensor: bool = False
    """Collectives of tensor and sequence parallelism overlap, in chunks, with the matrix products that they
    serve."""

    def problems(self) -> Iterator[Problem]:
        yield from require(
            1 <= self.virtual_stages <= 1000, "virtual_stages", self.virtual_stages, "1 to 1000"
        )

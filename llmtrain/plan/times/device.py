"""One device as the time model sees it: what it can compute and move in a second."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmtrain.parallel.config import Precision
from llmtrain.plan.config import ClusterConfig, EfficiencyConfig


@dataclass(frozen=True)
class Device:
    """Figures of one device in one precision."""

    peak: float
    """FLOP/s of dense matrix products."""
    bandwidth: float
    """Bytes of memory a second."""
    multiprocessors: int | None
    number_bytes: int
    """Bytes of a number in matrix products."""
    efficiency: EfficiencyConfig
    weight_gradient: float = 1.0
    """Rate of products that give a weight's gradient, in that of others."""

    @property
    def function_bytes(self) -> int:
        """Bytes that stand for a number in activations and softmax. A processor computes these in fp32, which
        takes it longer than their traffic, whatever the type."""
        return 4 if self.multiprocessors is None else self.number_bytes

    def traffic_seconds(self, size: float) -> float:
        """Return the time to read and write `size` bytes of memory."""
        return size / (self.bandwidth * self.efficiency.memory)


def device_of(cluster: ClusterConfig, precision: Precision) -> Device | None:
    """Return the device of a cluster; None if the cluster lacks its figures for this precision."""
    peak, efficiency = cluster.peak_flops.get(precision), cluster.efficiency
    if peak is None or cluster.memory_bandwidth is None:
        return None
    return Device(
        peak,
        cluster.memory_bandwidth,
        cluster.multiprocessors,
        4 if precision == "fp32" else 2,
        replace(efficiency, matrix_depth=efficiency.matrix_depths.get(precision, efficiency.matrix_depth)),
        efficiency.weight_gradients.get(precision, 1.0),
    )

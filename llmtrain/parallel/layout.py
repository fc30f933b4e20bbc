"""A layout: how the processes of a run and its batch are divided. Pure arithmetic, free of torch.

Ranks are ordered (pipeline, data, sequence, tensor), tensor innermost: tensor parallelism communicates most
often and so gets neighbouring ranks; pipeline parallelism communicates least and gets the most distant ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llmtrain.parallel.config import Offload


@dataclass(frozen=True)
class ModelShape:
    """The facts of a model's config that decide over which axes, and by what, the model can be divided."""

    family: str
    axes: frozenset[str]
    """The axes among tensor, pipeline and sequence that the family supports."""
    num_layers: int = 1
    kv_heads: int = 1
    """Number of key-value heads; each stays whole on one process, with the query heads that share it."""
    mlp_width: int = 1
    dropout: float = 0.0
    shares_tokens: bool = True
    """Whether `tensor_sequence` is supported: the tensor group divides the tokens between its matrices."""
    reads_lengths: bool = False
    """Whether position embeddings depend on the length of the sequence."""
    steps_by_token: bool = False
    """Whether a forward pass calls a module once for each token, of which rows have different numbers."""
    has_statistics: bool = False
    """Whether forward passes change some of its numbers, as those of batch norm do."""


class Coordinates(NamedTuple):
    """The index of a rank on each axis."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """A division whose products hold: data · tensor · pipeline · sequence == world_size and
    accumulation · micro_size · data == global_size. `plan_layout` makes it; fields as in `ParallelConfig`."""

    world_size: int
    data: int
    tensor: int
    pipeline: int
    sequence: int
    zero: int
    micro_size: int
    accumulation: int
    """Micro-batches of one optimizer step on each replica."""
    global_size: int
    sequence_length: int
    tensor_sequence: bool = False
    balance: Literal["parameters", "time"] = "parameters"
    offload_optimizer: Offload = "none"
    offload_parameters: Offload = "none"
    quantized_weights: bool = False
    quantized_gradients: bool = False
    hierarchical_partition: int = 1

    @property
    def model(self) -> int:
        """Processes that together hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def replica_size(self) -> int:
        """Sequences of one optimizer step on each replica."""
        return self.accumulation * self.micro_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all replicas."""
        return self.global_size * self.sequence_length

    def coordinates(self, rank: int) -> Coordinates:
        """Return the coordinates of `rank`; raises ValueError unless 0 ≤ rank < world_size."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside world_size {self.world_size}")
        rank, tensor = divmod(rank, self.tensor)
        rank, sequence = divmod(rank, self.sequence)
        pipeline, data = divmod(rank, self.data)
        return Coordinates(pipeline, data, sequence, tensor)

    def rank(self, coordinates: Coordinates) -> int:
        """Return the rank at `coordinates`; the inverse of `coordinates()`."""
        pipeline, data, sequence, tensor = coordinates
        return ((pipeline * self.data + data) * self.sequence + sequence) * self.tensor + tensor

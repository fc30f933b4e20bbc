"""Tensors without values, and a record of what an engine does with them.

Numbers of a model take no memory here: they have shapes, types and devices alone, which is all that a step's
groups, collectives and bytes depend on. Token ids, labels and counts are real, since programs branch on them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from llmtrain.dry_run.record import BETWEEN, Collective, Traffic, name_of
from llmtrain.parallel.layout import Layout

_TO_HOST = torch.ops.aten._local_scalar_dense.default
_LITERAL = torch.ops.aten.lift_fresh.default
_KINDS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "recv": "receive",
}
"""Operation of torch's c10d → name in tables; others keep theirs."""


class Imagination(FakeTensorMode):
    """A mode in which floating-point tensors have no values.

    Read on the host, such a number is 1, and what was counted or compared of them is 0 or false: a norm is
    finite, nothing overflows.
    Operations over integers alone are computed.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._layout = layout
        self._names: dict[str, str] = {}
        self.traffic = Traffic()
        self.held_bytes = 0
        """Bytes of the imagined tensors that are alive."""
        self.peak_bytes = 0
        """The most that were alive at once since it was last set."""
        self._known: set[int] = set()
        self._inside = False

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:  # a part of another operation
            return super().dispatch(func, types, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        if func.namespace == "c10d":
            self._record(func, leaves)
        if not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            if _is_real(func, leaves, kwargs):
                with no_dispatch():
                    return func(*args, **kwargs)
        elif func is _TO_HOST:
            if args[0].is_floating_point():
                return 1.0
            return False if args[0].dtype is torch.bool else 0
        self._inside = True
        try:
            result = super().dispatch(func, types, args, kwargs)
        finally:
            self._inside = False
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.device.type != "meta":
                self._watch(leaf)
        return result

    def _watch(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held_bytes -= size

    def _record(self, func: Any, leaves: list[Any]) -> None:
        name = func._schema.name.partition("::")[2].rstrip("_")
        kind = _KINDS.get(name, name)
        given = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))
        # The type of a group's object is known by its text alone.
        groups = [
            dist.ProcessGroup.unbox(leaf)
            for leaf in leaves
            if isinstance(leaf, torch.ScriptObject) and str(leaf._type()).endswith("ProcessGroup")
        ]
        size = groups[0].size() if groups else 1
        if kind in ("all-gather", "reduce-scatter"):
            given = given * size // (size + 1)  # the whole, and a part
        elif kind == "all-to-all":
            given //= 2  # what goes out, and what comes in
        group = BETWEEN if kind in ("send", "receive") else self._name(groups)
        collective = Collective(kind, group, 2 if group == BETWEEN else size)
        self.traffic.calls[collective] += 1
        self.traffic.sizes[collective] += given

    def _name(self, groups: list[Any]) -> str:
        if not groups:
            return BETWEEN
        key = groups[0].group_name
        if key not in self._names:
            self._names[key] = name_of(self._layout, dist.get_process_group_ranks(groups[0]))
        return self._names[key]


def _is_real(func: Any, leaves: list[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation without imagined inputs is computed."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if tensors:
        return func is _LITERAL or not any(tensor.dtype.is_floating_point for tensor in tensors)
    dtype = kwargs.get("dtype")
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point


@contextlib.contextmanager
def modules_stay() -> Iterator[None]:
    """Let modules keep their parameters when they are moved or converted: torch would exchange imagined ones
    by a way that they refuse, and an engine's already have their place and type."""
    apply = nn.Module._apply
    nn.Module._apply = lambda module, _convert, recurse=True: module  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]

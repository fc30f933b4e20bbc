"""Record every collective of this process, whichever library calls it: llmtrain, DeepSpeed, fairscale or
torch.

All of them go through the methods of torch's class ProcessGroup, for any backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import ProcessGroup, Work

from llmtrain.watch import layout, recorder

_MARK = "_llmtrain_watches"


def install() -> None:
    """Wrap the methods; the second time do nothing. Without a recorder they only call what they wrap."""
    if hasattr(ProcessGroup, _MARK):
        return
    for method in layout.KINDS:
        if hasattr(ProcessGroup, method):
            setattr(ProcessGroup, method, _noted(method, getattr(ProcessGroup, method)))
    Work.wait = _noted_wait(Work.wait)  # type: ignore[method-assign]
    setattr(ProcessGroup, _MARK, True)


def _noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(group: Any, *arguments: Any, **named: Any) -> Any:
        current = recorder.current
        if current is None:
            return method(group, *arguments, **named)
        current.begin_call(group, name, arguments)
        work = None
        try:
            work = method(group, *arguments, **named)
        finally:
            current.end_call(work)
        return work

    return noted


def _noted_wait(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def noted(work: Any, *arguments: Any, **named: Any) -> Any:
        current = recorder.current
        if current is None:
            return method(work, *arguments, **named)
        current.begin_wait(work)
        try:
            return method(work, *arguments, **named)
        finally:
            current.end_wait()

    return noted

"""The time of a step as a table of parts, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.plan.times.step import StepTime

BOUND = {
    "matrix products": "matrix products",
    "attention": "attention",
    "element operations": "the memory's bandwidth",
    "embedding and head": "the output layer",
    "recomputation": "recomputation",
    "tensor parallelism": "collectives of tensor parallelism",
    "sequence parallelism": "exchanges of sequence parallelism",
    "pipeline transfers": "transfers between pipeline stages",
    "pipeline bubble": "idle pipeline stages",
    "weight gathers": "gathers of weights",
    "gradient reduction": "the reduction of gradients",
    "optimizer": "the optimizer",
    "offload": "offloading to the host",
    "starting operations": "the host, which starts operations",
    "input": "reading the data",
    "checkpoint": "checkpoints",
    "other": "what each step takes besides",
}
"""Part → the bottleneck that is reported if this part is the longest."""
COMPUTING = ("matrix products", "attention", "embedding and head")
SHOWN_FROM = 0.0005
"""Share of a step from which a part has a line of its own."""


def lines(time: StepTime) -> Iterator[str]:
    """Yield the table: each part's seconds, how much the step is longer for it, and the share of the step."""
    yield f"  {'part of a step':<22} {'takes':>10} {'adds':>10} {'share':>7}"
    shown = [name for name, seconds in time.parts.items() if seconds >= SHOWN_FROM * time.seconds]
    for name in sorted(shown, key=time.parts.__getitem__, reverse=True):
        # A bubble, and what a part waits for itself, takes no time elsewhere.
        taken = time.busy.get(name, time.parts[name])
        adds, share = milliseconds(time.parts[name]), time.parts[name] / time.seconds
        yield f"  {name:<22} {milliseconds(taken):>10} {adds:>10} {share:>7.1%}"


def bound(time: StepTime) -> str:
    """Return what a step is bound by: its longest part, and, if that is computation, the longest of what the
    computation waits for."""
    longest = max(time.parts, key=time.parts.__getitem__)
    others = {name: seconds for name, seconds in time.parts.items() if name not in COMPUTING}
    text = f"{BOUND.get(longest, longest)} ({time.parts[longest] / time.seconds:.0%})"
    second = max(others, key=others.__getitem__, default=longest)
    if longest in COMPUTING and second != longest:
        text += f", then {BOUND.get(second, second)} ({time.parts[second] / time.seconds:.0%})"
    return text


def milliseconds(seconds: float) -> str:
    """Return a time such as 12.3 ms or 4.56 s."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"

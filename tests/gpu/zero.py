"""ZeRO 0 to 3 on one rank, with and without offload, against plain torch on the same device in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.gpu.runs import family_overrides, no_tf32
from tests.gpu.table import Row, judged
from tests.parity.matrix import TOLERANCES, deviation
from tests.support.training import train_steps

STEPS = 3
OFFLOADED = {
    1: ("parallel.offload_optimizer=cpu",),
    2: ("parallel.offload_optimizer=cpu",),
    3: ("parallel.offload_optimizer=cpu", "parallel.offload_parameters=cpu"),
}


def check(device: str, folder: Path) -> Iterator[Row]:
    no_tf32()
    settings = family_overrides("GPT-2 form", device, folder)
    reference = train_steps((*settings, "precision=fp32"), STEPS, device=device)
    for precision, zero, offload in cases(device):
        overrides = (f"parallel.zero={zero}", "engine=deepspeed", f"precision={precision}", *offload)
        trace = train_steps((*settings, *overrides), STEPS, device=device)
        found, tolerance = deviation(trace, reference), TOLERANCES[precision]
        detail = f"loss {found.loss:.1e} (at most {tolerance.loss:g}), gradient norm {found.norm:.1e}"
        detail += f" ({tolerance.norm:g}), weights {found.update:.1e} of the way ({tolerance.update:g})"
        name = f"ZeRO {zero}, {precision}{', offloaded' if offload else ''}"
        yield judged("zero", name, found.within(tolerance), detail)


def cases(device: str) -> list[tuple[str, int, tuple[str, ...]]]:
    """(precision, stage, offload); the matrix has the others on a CPU."""
    plain = [(precision, zero, ()) for precision in TOLERANCES for zero in (0, 1, 2, 3)]
    offloaded = [(precision, zero, OFFLOADED[zero]) for precision in TOLERANCES for zero in OFFLOADED]
    return [*plain, *offloaded] if device == "cuda" else [*plain[:4], offloaded[-1]]

"""How far the planner's times are from published runs, and the fit of its constants.

    python -m tests.bench.published            # errors by source, and with each left out of the fit: minutes
    python -m tests.bench.published --quick    # errors by source alone
    python -m tests.bench.published --fit      # fit the constants to all runs and print them
    python -m tests.bench.published --fit --write   # and write them into conf/cluster/

published.csv has 296 runs of 8 to 3,072 A100 and H100, with the page of each. Seven constants are shared by
all devices; four more belong to a kind of device, and one to the H100 of 500 W, which torchtitan's nine rows
alone are of. Runs of one model on one device in one source (a group) weigh together as much as one run.
Constants that the runs do not determine stay near what the literature says (PRIORS); kernel_seconds,
layer_seconds and step_seconds are left as assumed, and conf/cluster/ marks those that lie at a bound: these
are no measurements. `UNALIGNED_BATCH` (plan/times/products.py) is no constant of the fit: it was set by hand,
after BLOOM's trials. Published peaks of memory are of other programs, and most by nvidia-smi, which counts
contexts, NCCL's buffers and what an allocator has cached; llmtrain's own are in plan_memory.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from llmtrain.plan.config import ClusterConfig, EfficiencyConfig
from tests.bench.published_rows import CONF, Run, by_source, cluster_of, memory_gib, read, tokens_per_second

Constants = dict[str, float]

PRIORS: dict[str, tuple[float, float, float]] = {
    # start, least, most
    "a100.matrix": (0.85, 0.5, 1.0),
    "a100.matrix_depth": (200, 10, 1000),
    "a100.attention": (0.7, 0.2, 1.0),
    "a100.memory": (0.8, 0.4, 0.95),
    "h100.matrix": (0.75, 0.4, 1.0),
    "h100.matrix_depth": (300, 10, 1000),
    "h100.attention": (0.45, 0.2, 1.0),
    "h100.memory": (0.8, 0.4, 0.95),
    "h100_96g.matrix": (0.6, 0.3, 1.0),
    "unfused": (1.7, 1, 4),
    "node_link": (0.8, 0.4, 0.95),
    "network": (0.8, 0.7, 0.95),
    "interference": (0.4, 0.01, 1),
    "kernel_seconds": (5e-6, 1e-6, 2e-5),
    "layer_seconds": (1e-5, 1e-6, 3e-4),
    "step_seconds": (1e-2, 1e-3, 0.3),
}
"""Constant → its value before a fit, and its bounds. FlashAttention 2 reaches 225 of 312 TFLOP/s on an A100
(arXiv:2307.08691, section 4.1); cuBLAS reaches about 270 on it; nccl-tests about 235 of NVLink's 300 GB/s,
and more than 0.7 of a network. Left free, that would go to 0.5 for BLOOM's trials over Omni-Path, and to 0.95
without them."""
UNTOLD = ("kernel_seconds", "layer_seconds", "step_seconds")
"""Constants that no published run determines; the fit leaves them at their assumed values."""
PRIOR_WEIGHT = 0.1
"""Error of one run that a constant off by a factor of e counts as."""
LINEAR_UP_TO = 0.05
"""Errors beyond this one weigh less than their square (soft L1), so that no single run decides."""
KIND = {
    "h200": "h100",
    "b200": "h100",
    "mi300x": "h100",
    "h100_96g": "h100",
    "l40s": "a100",
    "rtx4090": "a100",
}
"""Cluster → the kind of device whose constants it takes, where no run tells its own."""
OF_KIND = ("matrix", "matrix_depth", "attention", "memory")
SHARED = tuple(name for name in PRIORS if "." not in name)


def efficiency(constants: Constants, cluster: str) -> EfficiencyConfig:
    """Return the constants of a cluster."""
    kind = KIND.get(cluster, cluster.partition("_")[0])
    of_kind = {name: constants[f"{kind}.{name}"] for name in OF_KIND}
    own = {name: constants[f"{cluster}.{name}"] for name in OF_KIND if f"{cluster}.{name}" in constants}
    return EfficiencyConfig(**{name: constants[name] for name in SHARED}, **(of_kind | own))


def errors(runs: Sequence[Run], constants: Constants | None, *, is_exact: bool) -> npt.NDArray[np.float64]:
    """Return the logarithm of planned over published tokens a second of each run; constants: None for those
    of conf/cluster/."""
    found = []
    for run in runs:
        cluster: ClusterConfig = cluster_of(run)
        if constants is not None:
            cluster = replace(cluster, efficiency=efficiency(constants, cluster.name))
        found.append(math.log(tokens_per_second(run, cluster, is_exact=is_exact) / run.tokens_per_second))
    return np.array(found)


def fit(runs: Sequence[Run], rounds: int = 12) -> Constants:
    """Return the constants with which the planner is nearest to `runs`."""
    names = [name for name in PRIORS if name not in UNTOLD]
    kept = {name: PRIORS[name][0] for name in UNTOLD}
    low, high = (np.log([PRIORS[name][place] for name in names]) for place in (1, 2))
    priors = np.log([PRIORS[name][0] for name in names])
    sizes = Counter(run.group for run in runs)
    weights = np.array([1 / math.sqrt(sizes[run.group]) for run in runs])

    def residuals(logs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        constants = kept | dict(zip(names, np.exp(logs).tolist(), strict=True))
        of_runs = weights * errors(runs, constants, is_exact=False)
        return np.concatenate([of_runs, PRIOR_WEIGHT * (logs - priors)])

    solution = least_squares(
        residuals,
        np.clip(priors, low + 1e-6, high - 1e-6),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=LINEAR_UP_TO,
        diff_step=1e-3,
        max_nfev=rounds,
    )
    return dict(zip(names, np.exp(solution.x).tolist(), strict=True)) | kept


def table(title: str, rows: Sequence[tuple[str, Sequence[Run], npt.NDArray[np.float64]]]) -> str:
    """Return the errors of tokens a second, a row each of `rows`: name, runs, errors."""
    lines = [
        f"{title:<34} {'runs':>5} {'median':>8} {'by group':>9} {'within 20 %':>12} {'worst':>7} {'bias':>7}"
    ]
    for name, runs, found in rows:
        absolute = np.abs(np.expm1(found))
        groups: dict[str, list[float]] = {}
        for run, error in zip(runs, absolute, strict=True):
            groups.setdefault(run.group, []).append(float(error))
        of_groups = statistics.median(statistics.mean(group) for group in groups.values())
        lines.append(
            f"{name:<34} {len(runs):>5} {np.median(absolute):>8.1%} {of_groups:>9.1%} "
            f"{np.mean(absolute <= 0.2):>12.0%} {absolute.max():>7.0%} {np.median(np.expm1(found)):>+7.1%}"
        )
    return "\n".join(lines)


def show(runs: Sequence[Run], found: npt.NDArray[np.float64], title: str) -> None:
    """Print a table by source and over all."""
    places = {id(run): place for place, run in enumerate(runs)}
    rows = [
        (source, of_source, found[[places[id(run)] for run in of_source]])
        for source, of_source in by_source(list(runs))
    ]
    print(table(title, [*rows, ("all", runs, found)]), flush=True)


def memory_table(runs: Sequence[Run]) -> str:
    """Return the published peaks of memory beside the forecast, by source."""
    lines = [f"{'peak memory of a GPU':<34} {'runs':>5} {'median':>8} {'worst':>7} {'bias':>7}"]
    for source, of_source in by_source([run for run in runs if run.memory_gib is not None]):
        found = np.array([memory_gib(run) / (run.memory_gib or 1) - 1 for run in of_source])
        absolute = np.abs(found)
        lines.append(
            f"{source:<34} {len(of_source):>5} {np.median(absolute):>8.1%} {absolute.max():>7.0%} "
            f"{np.median(found):>+7.1%}"
        )
    return "\n".join(lines)


def left_out(runs: list[Run]) -> npt.NDArray[np.float64]:
    """Return the errors of each run with constants that were fitted without its source."""
    found = np.zeros(len(runs))
    for source, of_source in by_source(runs):
        others = [run for run in runs if run.source != source]
        constants = fit(others, rounds=6)
        of_it = errors(of_source, constants, is_exact=True)
        places = [place for place, run in enumerate(runs) if run.source == source]
        found[places] = of_it
    return found


def note_of(name: str, value: float, cluster: str) -> str:
    """Return a comment for a constant that the runs do not tell, or one source alone; empty for others."""
    kind = KIND.get(cluster, cluster.partition("_")[0])
    known = [key for key in (f"{cluster}.{name}", f"{kind}.{name}", name) if key in PRIORS]
    _, least, most = PRIORS[known[0]]
    if known[0] == f"{cluster}.{name}":
        return "  # of the rows of torchtitan alone"
    if name in UNTOLD:
        return "  # assumed: the runs do not tell it"
    return "" if 1.01 * least < value < 0.99 * most else "  # at the bound of the fit"


def write(constants: Constants) -> None:
    """Write the constants into conf/cluster/."""
    for path in sorted((CONF / "cluster").glob("*.yaml")):
        if path.stem == "local":
            continue
        head = path.read_text().partition("efficiency:\n")[0]
        found = efficiency(constants, path.stem)
        values = {name: float(f"{value:.3g}") for name, value in vars(found).items() if value != {}}
        lines = [f"  {name}: {value}{note_of(name, value, path.stem)}" for name, value in values.items()]
        kind = KIND.get(path.stem)
        borrowed = [name for name in OF_KIND if f"{path.stem}.{name}" not in constants]
        note = "  # fitted by tests/bench/published.py\n"
        if kind:
            names = ", ".join(borrowed)
            note += f"  # {names}: of the {kind.upper()}, since no published run tells this device's own\n"
            note += "  # the others: shared by all devices\n"
        path.write_text(f"{head}efficiency:\n{note}" + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, help="another file of runs with the same columns, such as others.csv"
    )
    parser.add_argument("--quick", action="store_true", help="leave no source out")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    runs = read(options.runs) if options.runs else read()
    if options.fit:
        constants = fit(runs, rounds=30)
        for name, value in constants.items():
            print(f"{name:<20} {value:.3g}")
        show(runs, errors(runs, constants, is_exact=True), "fitted to all")
        if options.write:
            write(constants)
        return
    show(runs, errors(runs, None, is_exact=True), "constants of conf/cluster")
    if any(run.memory_gib is not None for run in runs):
        print(f"\n{memory_table(runs)}", flush=True)
    if not options.quick:
        print()
        show(runs, left_out(runs), "each source left out of the fit")


if __name__ == "__main__":
    main()

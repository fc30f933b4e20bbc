"""`llmtrain preflight`: is any host or rank off, before a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtrain import files
from llmtrain.config import decode
from llmtrain.distributed import launcher
from llmtrain.errors import LaunchError
from llmtrain.files import expand_home
from llmtrain.output import check_output, write_output
from llmtrain.preflight.config import PreflightConfig
from llmtrain.standard_streams import print_note


def run(mapping: Mapping[str, Any]) -> None:
    """Check all hosts and ranks; print the tables on rank 0.

    Raise LaunchError with a problem for each host, rank or link that is off.
    """
    config = decode(PreflightConfig, mapping)
    is_main = launcher.rank() == 0
    outputs = {"output": config.output, "cluster_output": config.cluster_output}
    paths = {key: expand_home(path) for key, path in outputs.items() if path is not None}
    for key, path in paths.items() if is_main else ():
        check_output(path, key)

    from llmtrain.preflight.check import check

    report = check(config)
    if is_main:
        for line in report.lines():
            print(line, flush=True)
        if "output" in paths:
            found = report.as_object()
            write_output(paths["output"], lambda path: files.write_json_atomically(path, found))
            print_note(f"wrote {paths['output']}")
        if "cluster_output" in paths and report.figures:
            from llmtrain.preflight.cluster_file import cluster_of, text_of

            place = paths["cluster_output"]
            text = text_of(cluster_of(report, place.stem), "Measured by llmtrain preflight.")
            write_output(place, lambda path: files.write_atomically(path, text), "cluster_output")
            print_note(f"wrote {place}")
    if report.problems:
        failure = LaunchError(report.problems)
        failure.everywhere = True
        raise failure

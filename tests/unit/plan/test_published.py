"""The planner is near 296 published runs; `python -m tests.bench.published` prints by how much."""

from __future__ import annotations

import numpy as np

from tests.bench.published import PRIORS, efficiency, errors
from tests.bench.published_rows import FOLDER, cluster_of, read
from tests.support.clusters import cluster


def test_times_are_near_published_ones() -> None:
    runs = read()
    assert len(runs) == 296
    found = np.abs(np.expm1(errors(runs, None, is_exact=False)))
    assert np.median(found) <= 0.08
    assert np.mean(found <= 0.2) >= 0.9
    for source in {run.source for run in runs}:
        of_source = found[[run.source == source for run in runs]]
        assert np.median(of_source) <= 0.2, source


def test_runs_that_nothing_was_fitted_to_are_near_too() -> None:
    runs, known = read(FOLDER / "others.csv"), read()
    assert not {run.source for run in runs} & {run.source for run in known}
    found = np.abs(np.expm1(errors(runs, None, is_exact=False)))
    assert np.median(found) <= 0.1
    assert found.max() <= 0.2


def test_few_constants_for_a_kind_and_none_for_a_source() -> None:
    of_a100 = {name for name in PRIORS if "." not in name or name.startswith("a100.")}
    assert len(of_a100) <= 12
    sources = {run.source for run in read()}
    assert not any(source in name for name in PRIORS for source in sources)


def test_the_clusters_have_what_a_fit_writes() -> None:
    """Those of one kind have the same constants, but for what published runs tell of one alone."""
    constants = {name: start for name, (start, _, _) in PRIORS.items()}
    assert efficiency(constants, "h200") == efficiency(constants, "h100_80g")
    assert efficiency(constants, "h100_96g").matrix == PRIORS["h100_96g.matrix"][0]
    assert cluster("h200").efficiency == cluster("h100_80g").efficiency
    assert cluster("rtx4090").efficiency == cluster("a100_80g").efficiency


def test_a_source_may_state_its_network() -> None:
    networks = {run.source: cluster_of(run).network_bandwidth for run in read()}
    assert networks["bloom"] == 6.25e9
    assert networks["dgxc"] == 50e9

"""The clusters of conf/cluster/, decoded."""

from __future__ import annotations

from functools import cache

import yaml

from llmtrain.config import decode
from llmtrain.plan.config import ClusterConfig
from tests.support.training import REPOSITORY


@cache
def cluster(name: str) -> ClusterConfig:
    """Return a cluster of conf/cluster/."""
    return decode(ClusterConfig, yaml.safe_load((REPOSITORY / f"conf/cluster/{name}.yaml").read_text()))

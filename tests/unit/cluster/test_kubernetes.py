"""cluster/kubernetes, cluster/docker: manifests that the API server takes, and that go on after code 75."""

from __future__ import annotations

import copy
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.distributed.hosts import Hosts, hosts_from_environment
from llmtrain.errors import EXIT_CODE, INTERRUPTED_EXIT_CODE
from tests.support.kubernetes import problems
from tests.support.training import REPOSITORY

FOLDER = REPOSITORY / "cluster/kubernetes"
DOCKERFILE = REPOSITORY / "cluster/docker/Dockerfile"


def manifests() -> dict[str, dict[str, Any]]:
    """Every manifest by its kind."""
    files = [FOLDER / "jobset.yaml", FOLDER / "trainjob.yaml"]
    return {m["kind"]: m for file in files for m in yaml.safe_load_all(file.read_text())}


def jobset(kind: str) -> dict[str, Any]:
    """The JobSet that a manifest is, or holds."""
    manifest = manifests()[kind]
    return manifest["spec"] if kind == "JobSet" else manifest["spec"]["template"]["spec"]


def container(kind: str) -> dict[str, Any]:
    [job] = jobset(kind)["replicatedJobs"]
    [found] = job["template"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.parametrize("kind", ["JobSet", "TrainingRuntime", "TrainJob"])
def test_manifests_fit_the_published_schemas(kind: str):
    manifest = manifests()[kind]
    assert problems(manifest) == []
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["suspendet"] = True
    wrong["spec"]["suspend"] = "yes"
    assert sorted(problems(wrong)) == [
        f"{kind}.spec.suspend" + (": 'yes' is no boolean" if kind != "TrainingRuntime" else " is unknown"),
        f"{kind}.spec.suspendet is unknown",
    ]


def action(kind: str, exit_code: int | None) -> str:
    """What becomes of a JobSet when a container ends with a code, or with None when its pod is evicted.

    As the Job's and the JobSet's controllers decide: the first rule that matches.
    """
    own = jobset(kind)
    [job] = own["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {})
        if exit_code is not None and codes and exit_code in codes["values"]:
            assert codes["containerName"] == container(kind)["name"]
            reason = "PodFailurePolicy"
            message = (
                f"Container {codes['containerName']} for pod default/llmtrain-node-0-0 failed with exit code "
                f"{exit_code} matching {rule['action']} rule at index {index}"
            )
            break
        if exit_code is None and rule.get("onPodConditions") == [{"type": "DisruptionTarget"}]:
            reason, message = "PodFailurePolicy", "Pod has condition DisruptionTarget matching FailJob rule"
            break
    for rule in own["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("kind", ["JobSet", "TrainingRuntime"])
def test_an_interrupted_run_goes_on_and_a_mistake_ends_it(kind: str):
    assert action(kind, INTERRUPTED_EXIT_CODE) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(kind, None) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(kind, EXIT_CODE) == "FailJobSet"
    assert action(kind, 137) == action(kind, 1) == "RestartJobSet"
    assert jobset(kind)["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize("kind", ["JobSet", "TrainingRuntime"])
def test_pods_have_time_to_save_and_no_privileges(kind: str):
    [job] = jobset(kind)["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    environment = {one["name"]: one.get("value") for one in container(kind)["env"]}
    assert pod["terminationGracePeriodSeconds"] > int(environment["STOP_TIMEOUT"])
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['securityContext']['runAsUser']}\n" in DOCKERFILE.read_text()
    mounted = {mount["name"]: mount["mountPath"] for mount in container(kind)["volumeMounts"]}
    assert mounted == {"data": "/data", "shm": "/dev/shm"}


def test_the_launcher_finds_its_hosts_in_a_jobset():
    [job] = jobset("JobSet")["replicatedJobs"]
    spec = job["template"]["spec"]
    environment = {one["name"]: one.get("value") for one in container("JobSet")["env"]}
    assert environment["NODE_RANK"] is None, "the pod's own index"
    found = hosts_from_environment({**environment, "NODE_RANK": "1"})
    name = manifests()["JobSet"]["metadata"]["name"]
    assert found == Hosts(8, 2, 1, f"{name}-{job['name']}-0-0.{name}", 29500)
    assert found.num_nodes == spec["parallelism"] == spec["completions"]
    assert found.num_processes == int(container("JobSet")["resources"]["limits"]["nvidia.com/gpu"])


@pytest.mark.parametrize(("processes", "number"), [("8", 8), ("auto", None)])
def test_the_launcher_finds_its_hosts_in_a_trainjob(processes: str, number: int | None, tmp_path: Path):
    """The runtime's command, with a launcher in place of ours that tells what it was given."""
    told = tmp_path / "torchrun.sh"
    told.write_text('#!/bin/sh\nenv\necho "$@"\n')
    told.chmod(0o755)
    command = [
        word.replace("/opt/llmtrain/launch/torchrun.sh", shlex.quote(str(told)))
        for word in container("TrainingRuntime")["command"]
    ]
    arguments = manifests()["TrainJob"]["spec"]["trainer"]["args"]
    given = {
        "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": processes,
        "PET_MASTER_ADDR": "llmtrain-node-0-0.llmtrain", "PET_MASTER_PORT": "29500", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    done = subprocess.run([*command, *arguments], env=given, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    environment: Mapping[str, str] = dict(line.partition("=")[::2] for line in lines)
    assert hosts_from_environment(environment) == Hosts(number, 2, 1, "llmtrain-node-0-0.llmtrain", 29500)
    assert last.split() == arguments


def test_the_image_has_what_it_copies_and_the_lock_s_cuda():
    lines = DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    ignored = (REPOSITORY / "cluster/docker/Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (REPOSITORY / source).exists()
                assert f"!{source.split('/')[0]}" in ignored
    [base] = [line.split()[1] for line in lines if line.startswith("FROM ")]
    cuda = re.search(r"cuda:(\d+\.\d+)", base)
    locks = [lock.read_text() for lock in (REPOSITORY / "launch/constraints").glob("*.txt")]
    assert cuda is not None
    assert all(f"\ncuda-toolkit=={cuda[1]}." in lock for lock in locks)
    [user] = [line for line in lines if line.startswith("USER ")]
    assert user.split()[1] not in ("root", "0")
    [entry] = [line for line in lines if line.startswith("ENTRYPOINT ")]
    assert entry == 'ENTRYPOINT ["/opt/llmtrain/launch/torchrun.sh"]'
    assert "WORKDIR /opt/llmtrain" in lines

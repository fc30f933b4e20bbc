"""launch/slurm.sbatch on a real Slurm: cluster/slurm/two_nodes.sh brings up two nodes on this machine.

One job starts from scratch; the others find a `python` that starts warm (see support/warm_program.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.test_launch_torchrun import TRAINING, losses, one_process, unavailable, wait_for_first_step
from tests.support.corpora import write_text
from tests.support.ports import free_cluster_ports
from tests.support.training import REPOSITORY
from tests.support.warm_program import warm_program

__all__ = ["one_process"]
pytestmark = pytest.mark.slow

PROGRAMS = ("llmtrain", "python")
PREFLIGHT = "seconds=0.05 link_bytes=4096 room.shm_bytes=0"
SBATCH = REPOSITORY / "launch/slurm.sbatch"
TWO_NODES = REPOSITORY / "cluster/slurm/two_nodes.sh"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    """The environment of a user of a running cluster with node1 and node2."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [
        program for program in ("slurmctld", "sbatch", "munged") if not shutil.which(program, path=path)
    ]
    if os.geteuid() != 0 or missing:
        unavailable("a Slurm of one's own needs root, slurm-wlm and munge (apt-get install slurm-wlm munge)")
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        foreign = ("SLURM_", "SBATCH_", "MASTER_", "NPROC_PER_NODE", "NNODES", "LOG_DIR")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        port = free_cluster_ports()
        environment = {
            **clean,
            "SLURM_PORT": str(port),
            # Clusters of two modules may run at once, and ports of jobs follow from their numbers.
            "SLURM_FIRST_JOB": str(1 + 20 * (port - 17100)),
            "OMP_NUM_THREADS": "1",
            "VIRTUAL_ENV": sys.prefix,
        }
        started = subprocess.run(
            [TWO_NODES, "start", folder], env=environment, capture_output=True, text=True
        )
        assert started.returncode == 0, started.stderr
        try:
            yield {**environment, "SLURM_CONF": f"{folder}/slurm.conf"}
        finally:
            subprocess.run([TWO_NODES, "stop", folder], env=environment, check=True, capture_output=True)
            assert not processes_with({"SLURM_CONF": f"{folder}/slurm.conf"}), "something is left"


@pytest.fixture(scope="module")
def warm(cluster: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """The environment of a user of the cluster whose `python` starts warm."""
    # A socket's path must be short.
    with (
        tempfile.TemporaryDirectory(prefix="warm-") as folder,
        warm_program(Path(folder), PROGRAMS) as programs,
    ):
        yield {**cluster, "VIRTUAL_ENV": "", "PATH": f"{programs}:{cluster['PATH']}"}
        assert not warm_processes(), "something is left"


def warm_processes() -> dict[str, psutil.Process]:
    """The launchers and ranks that run on the cluster and started warm, by name."""
    children = psutil.Process().children(recursive=True)
    return {child.name(): child for child in children if re.fullmatch(r"launcher|rank \d+", child.name())}


def processes_with(variables: Mapping[str, str]) -> list[psutil.Process]:
    """The processes that have these environment variables."""

    def environment(process: psutil.Process) -> dict[str, str]:
        try:
            return process.environ()
        except psutil.Error:
            return {}

    return [p for p in psutil.process_iter() if variables.items() <= environment(p).items()]


class Job:
    """A job submitted from `folder`."""

    def __init__(self, cluster: Mapping[str, str], folder: Path, *overrides: str, **environment: str) -> None:
        self.environment, self.folder = {**cluster, **environment}, folder
        command = ["sbatch", "--parsable", "--nodes", "2", str(SBATCH), *overrides]
        done = subprocess.run(command, env=self.environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()
        self.logs = folder / f"llmtrain-{self.id}"

    def output(self) -> str:
        """What the job said."""
        path = self.folder / f"llmtrain-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def exit_code(self) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + 240
        while True:
            command = ["scontrol", "show", "job", self.id]
            shown = subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout
            if not re.search(r"JobState=(PENDING|CONFIGURING|RUNNING|COMPLETING)", shown):
                found = re.search(r"ExitCode=(\d+):(\d+)", shown)
                assert found is not None, shown
                assert found[2] == "0", shown
                return int(found[1])
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.2)


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [("cluster", ["engine=local"]), ("warm", ["parallel.zero=1"])],
    ids=["DDP, cold", "ZeRO 1"],
)
def test_two_nodes_train_as_one_process(
    request: pytest.FixtureRequest,
    one_process: list[float],
    corpus: Path,
    tmp_path: Path,
    environment: str,
    overrides: list[str],
):
    folder = tmp_path / "a folder of the user's"
    folder.mkdir()
    arguments = [*TRAINING, f"data.path={corpus}", "run.dir=the run", "train.steps=4", *overrides]
    checked_first = {"PREFLIGHT": f"factor=1000 {PREFLIGHT}"} if environment == "warm" else {}
    job = Job(request.getfixturevalue(environment), folder, *arguments, **checked_first)
    assert job.exit_code() == 0, job.output()
    np.testing.assert_allclose(losses(folder / "the run"), one_process, rtol=1e-5)
    assert "step 4" in job.output()
    assert "step 4" in (job.logs / "rank0.log").read_text()
    assert (job.logs / "rank1.log").exists()
    assert ("messages between hosts" in job.output()) == (environment == "warm")
    assert (job.logs / "preflight/rank1.log").exists() == (environment == "warm")


def test_a_node_that_is_off_ends_the_job_before_training(
    warm: Mapping[str, str], corpus: Path, tmp_path: Path
):
    too_much = f"room.run_bytes=1_000_000_000_000_000_000 {PREFLIGHT}"
    job = Job(warm, tmp_path, *TRAINING, f"data.path={corpus}", "run.dir=run", PREFLIGHT=too_much)
    assert job.exit_code() == 2, job.output()
    assert "disk of run: got" in job.output()
    assert not (tmp_path / "run").exists()


def test_a_mistake_fails_the_job_with_code_2(warm: Mapping[str, str], corpus: Path, tmp_path: Path):
    arguments = [*TRAINING, f"data.path={corpus}", "run.dir=run", "model.num_leyers=2"]
    job = Job(warm, tmp_path, *arguments)
    assert job.exit_code() == 2, job.output()
    assert 1 <= job.output().count("model.num_leyers") <= 2, "once a node at most"
    assert "Traceback" not in job.output()


def test_a_killed_rank_gives_the_job_its_exit_code(warm: Mapping[str, str], corpus: Path, tmp_path: Path):
    """Not that of node 0, whose rank only loses its peer, nor the highest one, which srun would give."""
    endless = ["run.dir=run", "train.steps=100000", "evaluation.at_start=false"]
    job = Job(warm, tmp_path, *TRAINING, f"data.path={corpus}", *endless)
    wait_for_first_step(tmp_path / "run")
    warm_processes()["rank 1"].kill()
    assert job.exit_code() == 137, job.output()
    assert "rank 1 exited with 137" in job.output()


@pytest.mark.parametrize("to", [[], ["--batch"]], ids=["tasks", "script"])
def test_a_job_that_is_asked_to_stop_saves_and_gives_75(
    warm: Mapping[str, str], corpus: Path, tmp_path: Path, to: list[str]
):
    endless = ["run.dir=run", "train.steps=100000", "checkpoint.every=null", "evaluation.at_start=false"]
    job = Job(warm, tmp_path, *TRAINING, f"data.path={corpus}", *endless)
    wait_for_first_step(tmp_path / "run")
    subprocess.run(["scancel", "--signal=USR1", *to, job.id], env=job.environment, check=True)
    assert job.exit_code() == 75, job.output()
    assert "as asked; run the same command to resume" in job.output()
    assert len(list((tmp_path / "run/checkpoints").glob("step-*/manifest.json"))) == 1


def test_tasks_of_srun_prepare_one_corpus(warm: Mapping[str, str], tmp_path: Path):
    """Three tasks on two nodes; and a mistake, which one of them tells."""
    source = write_text(tmp_path / "text.jsonl")

    def prepare(command: list[str], source: Path, output: str) -> subprocess.CompletedProcess[str]:
        arguments = [f"source={source}", f"output={output}", "tokenizer.vocab_size=320", "tar_bytes=20000"]
        run = [*command, "llmtrain", "prepare", *arguments, "workers=1"]
        return subprocess.run(run, env=warm, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    srun = ["srun", "--nodes=2", "--ntasks=3", "--overcommit", "--kill-on-bad-exit=0"]
    done = prepare(srun, source, "many")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("encoding …") == 1, "rank 0 alone tells how far it is"
    assert prepare([], source, "one").returncode == 0
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert files == sorted(
        p.relative_to(tmp_path / "many") for p in (tmp_path / "many").rglob("*") if p.is_file()
    )
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "many" / f).read_bytes() for f in files)
    source.write_bytes(b'{"text": "\xfc"}')
    failed = prepare(srun, source, "failed")
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.count("got bytes that are not UTF-8") == 1


def test_the_cluster_starts_twice_and_tells_its_state(cluster: Mapping[str, str]):
    folder = Path(cluster["SLURM_CONF"]).parent
    for verb in ("start", "status"):
        done = subprocess.run([TWO_NODES, verb, folder], env=cluster, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "node2" in done.stdout
    others = {**cluster, "SLURM_CONF": ""}
    refused = subprocess.run(
        [TWO_NODES, "start", folder / "another"], env=others, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "is in use" in refused.stderr

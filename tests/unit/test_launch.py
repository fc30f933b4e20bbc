"""launch/ and distributed.torchrun: what the environment tells, and how mistakes of a user are told."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.distributed import hosts, restarts, torchrun
from llmtrain.distributed.hosts import Hosts
from llmtrain.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = ["launch/quickstart.sh", "launch/test.sh", "launch/torchrun.sh", "launch/slurm.sbatch"]
SCRIPTS += [
    "launch/setup.sh",
    "launch/lock.sh",
    "launch/verses.sh",
    "launch/preflight.sh",
    "cluster/slurm/two_nodes.sh",
    ".ci/run",
]


def mistakes(**environment: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        hosts.hosts_from_environment(environment)
    return [problem.where for problem in caught.value.problems]


def test_one_host_by_default():
    assert hosts.hosts_from_environment({}) == hosts.Hosts()
    assert hosts.hosts_from_environment({"NPROC_PER_NODE": "8"}).num_processes == 8
    assert hosts.hosts_from_environment({"NNODES": "1", "NODE_RANK": ""}).port == 0, "any free port"


def test_one_host_ignores_what_names_a_cluster():
    """Containers and job shells often carry MASTER_ADDR of something else."""
    for names in ({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}, {"RDZV_ENDPOINT": "elsewhere:1"}):
        found = hosts.hosts_from_environment(names)
        assert (found.num_nodes, found.node_rank, found.address, found.port) == (1, 0, "127.0.0.1", 0)


def test_hosts_with_ranks_known_beforehand():
    environment = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "node0", "NPROC_PER_NODE": "2"}
    expected = hosts.Hosts(2, 4, 3, "node0", hosts.DEFAULT_PORT)
    assert hosts.hosts_from_environment(environment) == expected
    assert hosts.hosts_from_environment({**environment, "MASTER_PORT": "4321"}).port == 4321


@pytest.mark.parametrize(
    ("endpoint", "address", "port"),
    [("node0:400", "node0", 400), ("node0", "node0", 29500), ("[fd00::2]:400", "fd00::2", 400)],
)
def test_hosts_that_number_themselves(endpoint: str, address: str, port: int):
    found = hosts.hosts_from_environment({"NNODES": "2", "RDZV_ENDPOINT": endpoint, "RDZV_ID": "job7"})
    assert found == hosts.Hosts(None, 2, None, address, port, "job7")


def test_mistakes_in_the_environment_are_told_together():
    assert mistakes(NNODES="2") == ["MASTER_ADDR", "NODE_RANK"]
    assert mistakes(NNODES="2", MASTER_ADDR="a", NODE_RANK="2") == ["NODE_RANK"]
    assert mistakes(NNODES="0", NPROC_PER_NODE="two") == ["NPROC_PER_NODE", "NNODES"]
    assert mistakes(NNODES="2", MASTER_ADDR="a", NODE_RANK="0", MASTER_PORT="70000") == ["MASTER_PORT"]
    assert mistakes(RDZV_ENDPOINT="host:port") == ["RDZV_ENDPOINT"]
    assert mistakes(RDZV_ENDPOINT=":29500") == ["RDZV_ENDPOINT"]


def test_route_to_this_host():
    interface, address, is_local = hosts.route_to("127.0.0.1")
    assert (address, is_local) == ("127.0.0.1", True)
    assert interface in [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize("name", hosts.LOCALHOST)
def test_localhost_stays_on_the_loopback(name: str):
    """Not so this machine's own name, under which others may reach it."""
    assert hosts.route_to(name) == hosts.route_to("127.0.0.1")
    assert hosts.reachable_address(name) == "127.0.0.1"


@pytest.mark.parametrize(
    ("chosen", "expected"), [("", "198.51.100.2"), ("cluster0", "10.0.0.2"), ("no-such0", "198.51.100.2")]
)
def test_a_name_that_leads_to_the_loopback_takes_an_interface_that_others_reach(
    chosen: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    """As of a Debian machine with one public and one private network."""

    class Entry(NamedTuple):
        address: str
        family: int = socket.AF_INET

    addresses = {"lo": "127.0.0.1", "public0": "198.51.100.2", "cluster0": "10.0.0.2"}
    own = {"127.0.1.1": "127.0.0.1", "192.0.2.1": "198.51.100.2"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 2, 17, "", ("127.0.1.1", 9))]
    )
    monkeypatch.setattr(hosts, "_own_address", lambda _, towards: own[towards])
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {name: [Entry(a)] for name, a in addresses.items()})
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
    interface = next(name for name, address in addresses.items() if address == expected)
    assert hosts.route_to("machine") == (interface, expected, True)
    assert hosts.reachable_address("machine") == expected


def test_an_interface_that_the_user_names_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    hosts.restrict_to_interface("eth0")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert os.environ.pop("NCCL_SOCKET_IFNAME") == "=eth0"


def test_a_host_that_cannot_be_resolved():
    with pytest.raises(ConfigError, match="resolve"):
        hosts.route_to("no-such-host.invalid")
    with pytest.raises(ConfigError, match="RDZV_ENDPOINT: got"):
        hosts.route_to("no-such-host.invalid", "RDZV_ENDPOINT")


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_a_port_that_another_program_answers_on_is_refused(greeting: bytes, monkeypatch: pytest.MonkeyPatch):
    """torch's store waits for its word without end."""
    from llmtrain.distributed.rendezvous import Rendezvous

    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 1)
    connections = []

    def answer() -> None:
        with suppress(OSError):
            while True:
                connections.append(holder.accept()[0])
                connections[-1].sendall(greeting)

    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        Thread(target=answer, daemon=True).start()
        for variable, node_rank in (("RDZV_ENDPOINT", None), ("MASTER_PORT", 1)):
            with pytest.raises(ConfigError, match=rf"{variable}: got {port} of 127\.0\.0\.1, where another"):
                Rendezvous(Hosts(1, 2, node_rank, port=port), hosts.route_to("127.0.0.1"), 10)


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([0, 3], 3),
        ([1, 3, 1], 3),  # a peer's broken connection is an exception
        ([1, -9], -9),  # killed for its memory, say
        ([-15, 1], 1),  # the agent terminates the others
        ([143, 2], 2),
        ([-6, 1], -6),
        ([-6, -11, 1], -11),
        ([75, -15, 75], 75),  # asked to stop, one before it could listen
        ([75, 1], 1),
        ([75, -9], -9),
        ([1, 1], 1),
    ],
)
def test_root_cause(codes: list[int], cause: int):
    assert codes[restarts.root_cause(codes)] == cause


@given(st.lists(st.sampled_from([0, 1, 2, 75, -6, -9, -15, 134, 143]), min_size=1).filter(any), st.randoms())
def test_root_cause_is_a_failure_and_knows_no_order(codes: list[int], random):
    cause = codes[restarts.root_cause(codes)]
    assert cause
    shuffled = random.sample(codes, len(codes))
    own = {1, 75, 134, 143}
    if restarts.shell_code(cause) in own:
        found = shuffled[restarts.root_cause(shuffled)]
        assert restarts.shell_code(found) == restarts.shell_code(cause)
    assert (restarts.shell_code(cause) in own) == all(restarts.shell_code(c) in own | {0} for c in codes)


def test_job_exit_code_comes_from_all_hosts(tmp_path: Path):
    assert torchrun.job_exit_code(tmp_path) == 0
    for node, code in enumerate([143, 1, 2]):
        (tmp_path / torchrun._exit_report(node)).write_text(f"{code}\n")
    assert torchrun.job_exit_code(tmp_path) == 2


def test_log_folder(tmp_path: Path):
    assert torchrun.log_folder({"LOG_DIR": str(tmp_path)}, ["run.dir=x"]) == tmp_path
    assert torchrun.log_folder({}, ["seed=1", f"run.dir={tmp_path}/a b"]) == tmp_path / "a b/logs"
    assert torchrun.log_folder({}, [f"run.dir='{tmp_path}'"]) == tmp_path / "logs"
    assert torchrun.log_folder({}, ["run.name=first"]) == Path("runs/first/logs").absolute()
    assert torchrun.log_folder({}, []) == Path("runs/default/logs").absolute()


def test_earlier_logs_are_kept(tmp_path: Path):
    log = tmp_path / "rank0.log"
    for launch in ("first", "second", "third"):
        torchrun.keep_previous(log)
        log.write_text(launch)
    kept = [(tmp_path / name).read_text() for name in ("rank0.1.log", "rank0.2.log", "rank0.log")]
    assert kept == ["first", "second", "third"]


def test_a_link_that_waits_for_a_log_is_moved_aside(tmp_path: Path):
    log, elsewhere = tmp_path / "rank0.log", tmp_path / "elsewhere"
    log.symlink_to(elsewhere)
    torchrun.keep_previous(log)
    log.write_text("ours")
    assert not elsewhere.exists()


def test_logs_that_are_a_link_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "logs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"logs: got a link to .*elsewhere; allowed: a folder, not a link"):
        torchrun.launch([f"run.dir={tmp_path}"], {})
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_report_that_is_none_tells_no_exit_code(tmp_path: Path):
    (tmp_path / ".exit-code-of-node-0").write_text("many")
    (tmp_path / ".exit-code-of-node-1").write_text("2\n")
    assert torchrun.job_exit_code(tmp_path) == 2


def test_mistakes_need_no_torch():
    """They must answer at once, and importing torch takes seconds."""
    code = "import sys; from llmtrain.distributed.torchrun import main; code = main(['x=1'])\n"
    code += "assert 'torch' not in sys.modules; sys.exit(code)"
    environment = {**os.environ, "NNODES": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str):
    path = REPOSITORY / script
    subprocess.run(["bash", "-n", path], check=True)
    assert script.endswith("setup.sh") or os.access(path, os.X_OK)


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = f"set -euo pipefail; source '{REPOSITORY}/launch/setup.sh'; {script}"
    clean = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", "-c", command], env={**clean, **environment}, capture_output=True, text=True, cwd="/"
    )


def test_the_active_environment_is_found():
    active = Path(sys.executable).parent.parent
    assert (
        bash('find_python; echo "$python"', VIRTUAL_ENV=str(active)).stdout.strip() == f"{active}/bin/python"
    )


def test_no_python_with_llmtrain(tmp_path: Path):
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch")
    done = subprocess.run(
        [tmp_path / "launch/torchrun.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 2
    assert "no Python with llmtrain" in done.stderr


def checkout(folder: Path) -> Path:
    """A copy of what set-up reads, with an environment whose pip only notes that it was called."""
    shutil.copytree(REPOSITORY / "launch", folder / "launch")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text(
        "#!/bin/bash\n"
        f'case "$*" in *"pip --disable"*) echo "$@" >>"{folder}/pip-calls"; : >"{folder}/.venv/bin/llmtrain";'
        f' chmod +x "{folder}/.venv/bin/llmtrain"; exit ${{PIP_CODE:-0}};;\n'
        f'*compileall*) echo "$@" >>"{folder}/compiled"; exit 1;;\n'
        f'*) exec "{sys.executable}" "$@";; esac\n'
    )
    python.chmod(0o755)
    return folder


def set_up(folder: Path, extra: str = "demo", **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    command = f"set -euo pipefail; source launch/setup.sh; set_up {extra}"
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**clean, **environment}, capture_output=True, text=True
    )


def test_set_up_installs_once_and_again_when_something_changed(tmp_path: Path):
    folder = checkout(tmp_path / "a b")
    calls = folder / "pip-calls"
    for _ in range(2):
        done = set_up(folder)
        assert done.returncode == 0, done.stderr
        assert len(calls.read_text().splitlines()) == 1
    assert "installing" not in done.stdout
    assert f"{folder}[demo]" in calls.read_text()
    assert f"--constraint {folder}/.venv/llmtrain-constraints.txt" in calls.read_text()
    assert "--no-compile" in calls.read_text()
    compiled = (folder / "compiled").read_text().splitlines()
    assert compiled == [f"-m compileall -qq -j 0 {sysconfig.get_path('purelib')}"]
    set_up(folder, "test")
    assert f"{folder}[test]" in calls.read_text()
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n")
    set_up(folder)
    assert len(calls.read_text().splitlines()) == 3
    with next((folder / "launch/constraints").iterdir()).open("a") as file:
        file.write("\n")
    set_up(folder)
    assert len(calls.read_text().splitlines()) == 4


def test_set_up_makes_its_environment_over_a_container_s_torch(tmp_path: Path):
    """The container's Python is the one on PATH; only what it is called with is looked at."""
    folder = checkout(tmp_path / "repository")
    shutil.rmtree(folder / ".venv")
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in *--torch) echo "2.13.0a0+abc.nv26.01";; "-m venv"*) echo "$@" >"$CALLS"; exit 1;;\n'
        f'*) exec "{sys.executable}" "$@";; esac\n'
    )
    python.chmod(0o755)
    calls = tmp_path / "calls"
    path = f"{python.parent}:{os.environ['PATH']}"
    done = set_up(folder, PATH=path, CALLS=str(calls))
    assert "and its torch 2.13.0a0+abc.nv26.01" in done.stdout, done.stderr
    assert "--system-site-packages" in calls.read_text()


def test_set_up_that_fails_is_tried_again(tmp_path: Path):
    folder = checkout(tmp_path / "repository")
    done = set_up(folder, PIP_CODE="1")
    assert done.returncode == 2
    assert "could not install" in done.stderr
    assert set_up(folder).returncode == 0
    assert len((folder / "pip-calls").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"), [(["reboot"], "start, stop, status"), (["status", "/nonexistent"], "not run")]
)
def test_the_small_cluster_says_what_is_wrong(arguments: list[str], message: str):
    script = REPOSITORY / "cluster/slurm/two_nodes.sh"
    done = subprocess.run([script, *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr

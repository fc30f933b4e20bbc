"""What becomes of a job whose ranks have ended; and launchers that meet again, over a real store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmtrain.distributed import liveness, requeue
from llmtrain.distributed.admission import Helpers
from llmtrain.distributed.elastic import composed_folders
from llmtrain.distributed.failures import explain
from llmtrain.distributed.hosts import Hosts, hosts_from_environment, route_to
from llmtrain.distributed.rendezvous import JobOverError, Rendezvous
from llmtrain.distributed.restarts import Ending, Restarts, Verdict
from llmtrain.distributed.shared_folder import require_shared
from llmtrain.errors import ConfigError, UserError
from llmtrain.parallel.config import BatchConfig, ParallelConfig
from llmtrain.parallel.elastic import shrunk
from tests.support.ports import free_port


def save(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        ([Ending(0), Ending(0)], Verdict(False, 0)),
        ([Ending(1, "rank 0 …"), Ending(137, "rank 1 …")], Verdict(True, 137, "rank 1 …")),
        ([Ending(137, "ended", followed=True), Ending(1, "rank 1 …")], Verdict(True, 1, "rank 1 …")),
        ([Ending(1, "rank 0 …"), None], Verdict(True, 1, "host 1 gave no sign of life")),
        ([Ending(1, "rank 0 …"), Ending(2, "rank 1 …")], Verdict(False, 2)),
        ([Ending(75), Ending(75)], Verdict(False, 75)),
        ([Ending(1, "rank 0 …", asked=True), Ending(75)], Verdict(False, 1)),
    ],
)
def test_what_follows(endings: list[Ending | None], expected: Verdict, tmp_path: Path) -> None:
    assert Restarts(3, tmp_path).decide({str(i): ending for i, ending in enumerate(endings)}) == expected


def test_failures_without_a_new_step_end_a_job(tmp_path: Path) -> None:
    restarts = Restarts(100, tmp_path)
    crash: dict[str, Ending | None] = {"0": Ending(1, "rank 0 exited with 1")}
    assert [restarts.decide(crash).restart for _ in range(2)] == [True, True]
    save(tmp_path, 20)
    assert restarts.decide(crash).restart
    assert (restarts.step, restarts.made) == (20, 3)
    assert restarts.decide(crash).restart
    last = restarts.decide(crash)
    assert last == Verdict(False, 1, "rank 0 exited with 1; 3 failures without a new step")
    assert Restarts(0, tmp_path).decide(crash).why == "rank 0 exited with 1; all 0 restarts are used up"


def test_a_copy_in_memory_counts_as_a_new_step(tmp_path: Path) -> None:
    run, memory = tmp_path / "run", tmp_path / "memory"
    restarts = Restarts(100, run, memory)
    crash: dict[str, Ending | None] = {"0": Ending(1, "rank 0 exited with 1")}
    for step in range(1, 4):
        (memory / f"step-{step:08}").mkdir(parents=True)
        (memory / f"step-{step:08}/manifest.json").write_text("{}")
        assert [restarts.decide(crash).restart for _ in range(2)] == [True, True]
    assert restarts.step == 0, "what the message names is on disk"
    assert not restarts.decide(crash).restart


def test_bounds_of_hosts() -> None:
    both = {"RDZV_ENDPOINT": "a:1"}
    elastic = hosts_from_environment({"NNODES": "2:4", **both})
    assert (elastic.least, elastic.num_nodes, elastic.is_elastic, elastic.max_restarts) == (2, 4, True, 100)
    fixed = hosts_from_environment({"NNODES": "2", "MAX_RESTARTS": "5", **both})
    assert (fixed.least, fixed.num_nodes, fixed.is_elastic, fixed.max_restarts) == (2, 2, False, 5)
    for wrong in ("3:2", "2:", "a:b"):
        with pytest.raises(ConfigError, match=r"^NNODES: got"):
            hosts_from_environment({"NNODES": wrong, **both})


def launcher(port: int, least: int, most: int, **helpers: object) -> Rendezvous:
    hosts = Hosts(1, most, None, port=port, least_nodes=least, max_restarts=9)
    return Rendezvous(hosts, route_to("127.0.0.1"), 20, Helpers(join_seconds=0.5, **helpers))  # type: ignore[arg-type]


def together(calls: Sequence[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_launchers_go_on_without_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And take one that came meanwhile."""
    monkeypatch.setattr(liveness, "ALIVE_SECONDS", 2.0)
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.3)
    port = free_port()
    three = [launcher(port, 2, 3) for _ in range(3)]
    together([one.next_rendezvous for one in three])
    assert [one.num_nodes for one in three] == [3, 3, 3]
    first, other, gone = three[0], *sorted(three[1:], key=lambda one: one._name or 0)
    gone.close()

    def failing(endings: object) -> Verdict:
        assert endings == {"0": Ending(1), "1": Ending(1), "2": None}
        return Verdict(True, 1, "why")

    crash = [lambda one=one: one.conclude(Ending(1), failing) for one in (first, other)]
    assert together(crash) == [Verdict(True, 1, "why")] * 2
    infos = together([first.next_rendezvous, other.next_rendezvous])
    assert [(info.rank, info.world_size) for info in infos] == [(0, 2), (1, 2)]  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:
        spare = launcher(port, 2, 3)
        waiting = pool.submit(spare.next_rendezvous)
        retry = [
            lambda one=one: one.conclude(Ending(1), lambda _: Verdict(True, 1)) for one in (first, other)
        ]
        together(retry)
        together([first.next_rendezvous, other.next_rendezvous])
        assert waiting.result().rank == 2
    end = [
        lambda one=one: one.conclude(Ending(0), lambda _: Verdict(False, 0)) for one in (first, other, spare)
    ]
    assert together(end) == [Verdict(False, 0)] * 3
    for one in (first, other, spare):
        one.close()


def test_only_as_many_hosts_as_a_layout_fits_are_taken() -> None:
    port = free_port()
    both = [launcher(port, 1, 2, fits=lambda num_nodes: num_nodes == 1, is_stopping=lambda: False)]
    info = both[0].next_rendezvous()
    assert (info.rank, info.world_size) == (0, 1)
    both[0].close()


def test_a_host_that_waits_while_the_job_ends_gets_its_exit_code() -> None:
    port = free_port()
    both = [launcher(port, 1, 2, fits=lambda num_nodes: num_nodes == 1) for _ in range(2)]
    both[0].next_rendezvous()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(both[1].next_rendezvous)
        both[0].conclude(Ending(1), lambda _: Verdict(False, 9))
        over = waiting.exception()
    assert isinstance(over, JobOverError)
    assert over.code == 9
    for one in both:
        one.close()


def test_the_run_folder_that_a_preset_sets() -> None:
    assert composed_folders(["experiment=verses"]).run == Path("runs/verses").absolute()
    assert composed_folders(["model=none", "run.dir=elsewhere"]).run == Path("elsewhere").absolute()


def test_a_run_folder_that_hosts_do_not_share_is_refused(tmp_path: Path) -> None:
    from torch.distributed import HashStore, PrefixStore

    monkey = pytest.MonkeyPatch()
    monkey.setattr("llmtrain.distributed.shared_folder.SEEN_SECONDS", 0.5)
    store = HashStore()

    def check(attempt: str, folders: Sequence[str]) -> list[str]:
        def of_host(rank: int) -> str:
            own = PrefixStore(attempt, store)
            try:
                require_shared(own, rank, len(folders), tmp_path / folders[rank], "REQUEUE=1")
            except UserError as error:
                return str(error)
            return ""

        return [str(said) for said in together([lambda r=r: of_host(r) for r in range(len(folders))])]

    with monkey.context():
        assert check("one", ["a", "a", "a"]) == ["", "", ""]
        told = check("two", ["a", "a", "b"])
    assert all(
        "not the same folder on" in said and "with REQUEUE=1, a folder that all" in said for said in told
    )
    monkey.undo()
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize(
    ("axes", "size", "expected"),
    [
        (("data",), 4, [(2, 2, 1, 2)]),
        (("data",), 6, []),  # 8 samples are not divided by 3
        (("data",), 2, [(1, 2, 1, 2)]),
        (("data",), 1, []),
        (("data", "tensor"), 1, [(1, 1, 1, 2)]),
        (("tensor",), 4, [(4, 1, 1, 2)]),
    ],
)
def test_which_layouts_are_tried(axes: tuple[str, ...], size: int, expected: list[tuple[int, ...]]) -> None:
    parallel = ParallelConfig(data=4, tensor=2, elastic=axes)  # type: ignore[arg-type]
    found = list(shrunk(parallel, BatchConfig(8, 2, 16), size))
    shapes = [(p.data, p.tensor, p.pipeline, b.micro_size) for p, b in found]
    assert shapes[: len(expected)] == expected
    assert bool(shapes) == bool(expected)


def test_a_job_is_requeued_until_starts_bring_no_new_step(tmp_path: Path) -> None:
    logs, run = tmp_path / "logs", tmp_path / "run"
    assert requeue.begin(logs, run, 2) == ""
    save(run, 10)
    assert requeue.end(75, logs, run, 2) == ""
    assert requeue.begin(logs, run, 2) == ""
    assert requeue.end(1, logs, run, 2) == "", "the first start from step 10"
    assert requeue.begin(logs, run, 2) == ""
    assert requeue.end(137, logs, run, 2) == "2 starts of the job saved no step beyond 10 (MAX_STARTS)"
    assert requeue.begin(logs, run, 2).startswith("2 starts"), "also where it was cut down before its end"
    assert "mistake" in requeue.end(2, logs, run, 2)
    assert requeue.end(0, logs, run, 2) == "all steps are done"
    assert requeue.begin(logs, run, 2, "8") == "", "another job"
    assert requeue.begin(logs, run, 2, "8") == ""
    assert requeue.begin(logs, run, 2, "8").startswith("2 starts")
    assert requeue.main(["begin", f"run.dir={run}"], {"MAX_STARTS": "x"}) == 2


def test_a_requeued_job_whose_node_lacks_the_run_folder_is_refused(tmp_path: Path) -> None:
    logs, run = tmp_path / "logs", tmp_path / "run"
    for has_copy in (True, False):
        assert requeue.begin(logs, run, 3) == ""
        save(run, 10)
        assert requeue.end(75, logs, run, 3, has_copy) == ""
        shutil.rmtree(run)  # as on a node that does not see it
    with pytest.raises(ConfigError, match=r"run\.dir: got .*has no run, while this job saved step 10"):
        requeue.begin(logs, run, 3)
    assert requeue.begin(logs, run, 3, "another job") == ""


def test_ranks_that_follow_those_of_another_host_are_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    killed = {1: ProcessFailure(local_rank=0, pid=1, exitcode=-9, error_file="")}
    assert explain(killed, tmp_path, followed=True)[0] == 137
    assert capsys.readouterr().err == "llmtrain: ended this host's ranks, as those of another host failed\n"
    explain(killed, tmp_path, followed=False)
    assert (
        "rank 1 exited with 137 (killed by SIGKILL, maybe out of memory); its log" in capsys.readouterr().err
    )

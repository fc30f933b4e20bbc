"""Launchers that meet: each in a thread, over a real store on the loopback."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from llmtrain.distributed import liveness, stores
from llmtrain.distributed.hosts import Hosts, route_to
from llmtrain.distributed.rendezvous import Rendezvous
from llmtrain.distributed.restarts import Ending, Verdict
from llmtrain.errors import ConfigError, LaunchError
from tests.support.ports import free_port
from tests.support.sockets import listeners

SECONDS = 5


def launcher(port: int, node_rank: int | None, size: int = 3, seconds: float = SECONDS, run: str = "run"):
    return Rendezvous(Hosts(1, size, node_rank, port=port, run_id=run), route_to("127.0.0.1"), seconds)


def meet(launchers: Sequence[Rendezvous]) -> list[Future[int]]:
    """The place of each, or what it raised."""
    with ThreadPoolExecutor(len(launchers)) as pool:
        return [pool.submit(lambda each: each.next_rendezvous().rank, each) for each in launchers]


def test_hosts_take_the_places_that_they_were_given():
    port = free_port()
    met = meet([launcher(port, node_rank) for node_rank in (0, 2, 1)])
    assert [place.result() for place in met] == [0, 2, 1]


def test_hosts_number_themselves():
    """The first serves, and is host 0, where rank 0 speaks."""
    port = free_port()
    met = meet([launcher(port, None) for _ in range(3)])
    assert met[0].result() == 0
    assert sorted(place.result() for place in met) == [0, 1, 2]


def test_the_ranks_use_the_same_store():
    alone = launcher(0, 0, size=1)
    info = alone.next_rendezvous()
    where = info.bootstrap_store_info
    assert alone.use_agent_store
    assert where is not None
    assert where.master_addr == "127.0.0.1"
    info.store.set("key", "value")
    assert stores.connect(where.master_addr, where.master_port, SECONDS).get("agent/1/key") == b"value"


@pytest.mark.parametrize(
    ("node_ranks", "size", "told"),
    [((0, 2), 4, "2 of 4 joined, not NODE_RANK 1, 3"), ((None, None), 3, "2 of 3 joined")],
)
def test_who_is_missing_is_told(node_ranks: Sequence[int | None], size: int, told: str):
    port = free_port()
    met = meet([launcher(port, node_rank, size, seconds=1) for node_rank in node_ranks])
    with pytest.raises(
        LaunchError, match=rf"^start: got not all {size} hosts within 1 s \({told}\); see the messages"
    ):
        met[0].result()
    with pytest.raises(LaunchError, match=r"\(host 0 waits for others\)"):
        met[1].result()


def test_another_run_is_not_let_in():
    port = free_port()
    first, other = launcher(port, None, 2, seconds=1), launcher(port, None, 2, run="other")
    meet([first])
    told = rf"RDZV_ENDPOINT: got {port} of 127\.0\.0\.1, which the run 'run' uses; give each run its own port"
    with pytest.raises(LaunchError, match=told):
        other.next_rendezvous()


@pytest.mark.parametrize("node_rank", [1, None])
def test_one_that_comes_when_all_have_met_is_told(node_rank: int | None):
    """A second host with the same NODE_RANK, or one host too many."""
    port = free_port()
    both = [launcher(port, None if node_rank is None else place, 2) for place in (0, 1)]
    assert [place.result() for place in meet(both)] == [0, 1]
    with pytest.raises(LaunchError, match="got too many hosts: all 2 have joined without this one"):
        launcher(port, node_rank, 2).next_rendezvous()


@pytest.mark.parametrize("node_rank", [1, None])
def test_a_launcher_that_was_started_again_is_counted_once(
    node_rank: int | None, monkeypatch: pytest.MonkeyPatch
):
    """It ended before all had come, as when its host was started anew."""
    monkeypatch.setattr(liveness, "ALIVE_SECONDS", 1.0)
    port = free_port()
    first = launcher(port, None if node_rank is None else 0)
    [ended] = meet([launcher(port, node_rank, seconds=0.1)])
    assert isinstance(ended.exception(), LaunchError)
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(first.next_rendezvous)
        time.sleep(1.5)
        again = [launcher(port, node_rank), launcher(port, node_rank and 2)]
        places = [pool.submit(each.next_rendezvous) for each in again]
        assert sorted(each.result().rank for each in (waiting, *places)) == [0, 1, 2]


def test_a_launcher_that_takes_the_place_of_one_that_was_killed_waits_until_that_one_counts_as_gone(
    monkeypatch: pytest.MonkeyPatch,
):
    """Of two with the same NODE_RANK, as when a scheduler starts a host anew at once. Signs of life of the
    second are none of the first, or the job would wait for ever for the ranks of the first."""
    monkeypatch.setattr(liveness, "ALIVE_SECONDS", 1.5)
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.2)
    port = free_port()

    def start(node_rank: int) -> Rendezvous:
        hosts = Hosts(1, 2, node_rank, port=port, max_restarts=1)
        return Rendezvous(hosts, route_to("127.0.0.1"), 10 * SECONDS)

    first, second = start(0), start(1)
    assert [place.result() for place in meet([first, second])] == [0, 1]
    second.close()  # as its end does
    third = start(1)
    endings: dict[str, Ending | None] = {}

    def decide(found: dict[str, Ending | None]) -> Verdict:
        endings.update(found)
        return Verdict(True, 1, "host 1 is gone")

    with ThreadPoolExecutor(2) as pool:
        comes = pool.submit(third.next_rendezvous)
        time.sleep(2)  # the first looks only now: the third has counted the second as gone, and gives signs
        assert pool.submit(first.conclude, Ending(1, "rank 0"), decide).result(SECONDS).restart
        again = pool.submit(first.next_rendezvous)
        assert (again.result(SECONDS).rank, comes.result(SECONDS).rank) == (0, 1)
    assert endings == {"0": Ending(1, "rank 0"), "1": None}
    for each in (first, third):
        each.close()


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._file,)


def test_nothing_that_stands_in_the_store_is_unpickled(tmp_path: Path):
    """Of anything that a launcher reads there."""
    port, file = free_port(), tmp_path / "exploded"
    serving = launcher(port, 0, 2, seconds=1)
    bomb = pickle.dumps(Bomb(file), protocol=0)
    for key in ("launchers/places", "launchers/run", "torch.rendezvous.run", "agent/MASTER_ADDR"):
        stores.connect("127.0.0.1", port, SECONDS).set(key, bomb.decode())
    [met] = meet([serving])
    assert met.exception() is not None
    assert not file.exists()
    pickle.loads(bomb)
    assert file.exists(), "the test's own bomb"


@pytest.mark.parametrize(("node_rank", "variable"), [(0, "MASTER_PORT"), (None, "RDZV_ENDPOINT")])
@pytest.mark.parametrize("held", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_refused_with_its_number(
    held: str, node_rank: int | None, variable: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("llmtrain.distributed.hosts.ANSWER_SECONDS", 0.5)
    with socket.create_server((held, 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{variable}: got {port}[ ,].*another (MASTER_PORT|port)$"):
            launcher(port, node_rank)
    assert launcher(port, node_rank, 1).next_rendezvous().rank == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_store_listens_on_one_address_until_it_goes(address: str):
    import psutil

    try:
        store = stores.serve(address, 0, SECONDS)
    except OSError:
        pytest.skip(f"NOT TESTED HERE: this host has no {address}")
    port = store.port
    found = {listener.address for listener in listeners(psutil.Process()) if listener.port == port}
    assert found == {address}
    stores.connect(address, port, SECONDS).set("key", "value")
    assert store.get("key") == b"value"
    del store
    stores.serve(address, port, SECONDS)

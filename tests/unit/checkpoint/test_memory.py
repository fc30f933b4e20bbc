"""Copies in memory: which of them the hosts that are left hold whole, and going on without damaged ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from llmtrain.checkpoint import memory_room
from llmtrain.checkpoint.config import MemoryConfig
from llmtrain.checkpoint.manifest import step_folder
from llmtrain.checkpoint.memory import MemoryTier
from llmtrain.checkpoint.memory_choice import Held, choose
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.distributed import processes
from llmtrain.distributed.memory_folder import MEMORY
from llmtrain.errors import ConfigError
from tests.support import ranks
from tests.support.owners import MATRIX, Owner, flat


def held(*files: str, manifest: str = "a", of: int = 3) -> Held:
    return Held(manifest, of, frozenset(files))


@pytest.mark.parametrize(
    ("hosts", "at_least", "step", "passed_over"),
    [
        ([{}, {}], 0, None, []),
        ([{5: held("0", "1")}, {5: held("1", "2")}, {5: held("2", "0")}], 0, 5, []),
        ([{5: held("0", "1")}, {}, {5: held("2", "0")}], 0, 5, []),
        ([{5: held("0", "2"), 9: held("0")}, {5: held("1")}], 0, 5, [9]),
        ([{5: held("0", "1", "2")}], 5, 5, []),
        ([{5: held("0", "1", "2")}], 6, None, []),
        ([{5: held("0", "1")}, {5: held("2", manifest="b")}], 0, None, [5, 5]),
        ([{5: held("0")}, {5: held("0", "1", "2", manifest="b")}], 0, 5, [5]),
    ],
)
def test_the_newest_copy_that_is_whole(
    hosts: list[Mapping[int, Held]], at_least: int, step: int | None, passed_over: list[int]
) -> None:
    choice, reasons = choose(hosts, at_least)
    assert (None if choice is None else choice.step) == step
    assert [step for step, _ in reasons] == passed_over


class Host:
    """A rank with a tier of its own, in the folder of its host."""

    def __init__(self, folder: Path) -> None:
        os.environ[MEMORY] = str(folder)
        self.said: list[str] = []
        self.folder = folder
        self.tier = MemoryTier(MemoryConfig(3, folder), self.said.append)
        self.tier.open()

    def close(self) -> None:
        self.tier.close()
        del os.environ[MEMORY]

    def save(self, step: int, owner: Owner) -> None:
        """A copy, which all hosts hold when it returns."""
        self.tier.save(step, owner, {"model": {"family": "none"}})  # type: ignore[arg-type]
        self.tier.finish()
        neighbour = self.tier._neighbour
        if neighbour is not None and neighbour._thread is not None:
            neighbour._thread.join(60)
        processes.barrier()

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.folder.glob("step-*"))


def state_at(checkpoint: Checkpoint | None) -> torch.Tensor | None:
    """The whole weight that a copy holds, wherever its files are."""
    if checkpoint is None:
        return None
    owner = Owner(MATRIX)
    owner.clear()
    checkpoint.restore(owner)  # type: ignore[arg-type]
    return owner.state()[0]["weight"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def lose_and_damage(root: str) -> list[object]:
    """Two hosts of one rank each make copies at steps 3, 6 and 9, and lose some."""
    rank = processes.rank()
    folder = Path(root) / f"host{rank}"
    folder.mkdir()
    owner = Owner(MATRIX, [flat(0, 12, 24)[rank]])
    host, whole, expected = Host(folder), Owner(MATRIX), {}
    results: list[object] = []
    for step in (3, 6, 9):
        owner.step()
        whole.step()
        expected[step] = whole.state()[0]["weight"]
        host.save(step, owner)
    results.append(host.steps())
    names = sorted(path.name for path in (folder / step_folder(9)).iterdir())
    results.append(names)

    def go_on(at_least: int = 0) -> tuple[int | None, bool, list[str]]:
        nonlocal host
        host.close()
        host = Host(folder)
        found = host.tier.newest(at_least)
        step = None if found is None else found.step
        value = state_at(found)
        is_right = value is None or torch.equal(value, expected[step or 0])
        processes.barrier()
        return step, is_right, host.said

    own = folder / step_folder(9) / f"rank-{rank:05d}.safetensors"
    results.append(go_on())
    if rank == 1:  # another machine in its place
        shutil.rmtree(folder)
        folder.mkdir()
    processes.barrier()
    results.append(go_on())
    if rank == 0:  # the only host with all; what host 1 has read, it has
        flip(own)
    processes.barrier()
    results.append(go_on())
    for path in Path(root).glob(f"*/{step_folder(9)}/rank-00000.safetensors"):
        if rank == 0:
            flip(path)
    processes.barrier()
    results.append(go_on())
    results.append(host.steps())
    results.append(go_on(7))
    host.tier.forget()
    results.append(host.steps())
    host.close()
    return results


@pytest.mark.slow
def test_two_hosts(tmp_path: Path) -> None:
    first, second = ranks.run(2, lose_and_damage, str(tmp_path))
    both = ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert first[:2] == second[:2] == [[6, 9], both], "two generations, and the neighbour's files"
    assert first[2] == second[2] == (9, True, [])
    assert first[3] == second[3] == (9, True, []), "the second host has none of its files"
    flaw = "damaged copy in memory: step 9, rank-00000.safetensors of host {}: another checksum than when"
    flaw += " it was written"
    assert first[4] == second[4] == (9, True, [flaw.format(0)]), "host 1 has it too"
    step, is_right, said = first[5]
    assert (step, is_right) == (6, True)
    assert said[-1] == "copy in memory of step 9 passed over: no host that is left holds 1 of its 2 files"
    assert flaw.format(1) in said
    assert first[6] == [6], "later copies are gone, as the run comes to their steps once more"
    assert first[7] == (None, True, [])
    assert first[8] == second[8] == []


def test_one_host_keeps_two_copies_and_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MEMORY, raising=False)
    said: list[str] = []
    tier = MemoryTier(MemoryConfig(3), said.append)
    tier.open()
    assert not tier.is_due(3)
    assert said == [
        "warning: checkpoint.memory.every=3: no copies are made, as no launcher restarts ranks "
        "(launch/torchrun.sh with MAX_RESTARTS)"
    ]
    host, owner = Host(tmp_path), Owner(MATRIX)
    for step in (3, 6, 9):
        host.save(step, owner)
        owner.step()
    assert host.steps() == [6, 9]
    flip(tmp_path / step_folder(9) / "manifest.json")
    found = host.tier.newest(0)
    assert found is not None
    assert found.step == 6
    assert "damaged copy in memory: host 0: " in host.said[0]
    host.close()


def test_too_little_room_is_refused_before_ranks_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MEMORY, str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    free = memory_room.shutil.disk_usage(tmp_path).free
    memory_room.refuse_without_room(MemoryConfig(5), free // 9)
    memory_room.refuse_without_room(MemoryConfig(None), free)
    with pytest.raises(ConfigError) as caught:
        memory_room.refuse_without_room(MemoryConfig(5), free // 7)
    told = str(caught.value)
    assert told.startswith(f"checkpoint.memory.dir: got {tmp_path} with ")
    assert "for 2 copies of what 2 ranks save and of as many of the neighbour; name a local NVMe disk" in told
    monkeypatch.setenv("LLMTRAIN_ATTEMPT", "2")
    memory_room.refuse_without_room(MemoryConfig(5), free)

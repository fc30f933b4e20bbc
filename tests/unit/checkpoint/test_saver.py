"""Saving beside training: what is written is the state at the call, and what has a name is whole."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtrain.checkpoint import saver as saver_module
from llmtrain.checkpoint import store, writer
from llmtrain.checkpoint.reader import Checkpoint
from llmtrain.checkpoint.retention import list_steps
from llmtrain.checkpoint.saver import Copier, Saver
from llmtrain.distributed import processes
from llmtrain.errors import TrainingError
from llmtrain.tensor_boxes import Shard
from tests.support import ranks
from tests.support.owners import Cut, Owner, whole_cuts

TENSORS = {"a.w": torch.arange(24.0).reshape(4, 6), "b.w": torch.arange(5.0) - 2, "c.w": torch.ones(3, 2, 2)}


class Gate:
    """Lets a function that other code calls begin, and holds it until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        held = getattr(owner, name)

        def hold(*arguments: object, **options: object) -> object:
            self.reached.set()
            assert self._open.wait(60)
            return held(*arguments, **options)

        monkeypatch.setattr(owner, name, hold)

    def open(self) -> None:
        self._open.set()


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this, which is how a full disk answers too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_holds(path: Path, state: list[dict[str, torch.Tensor]]) -> None:
    checkpoint = Checkpoint.open(path)
    assert checkpoint.damage() is None
    assert checkpoint.incompleteness() is None
    loader = Owner(TENSORS)
    loader.clear()
    checkpoint.restore(loader)  # type: ignore[arg-type]
    for found, expected in zip(loader.state(), state, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_written_is_the_state_at_the_call(tmp_path: Path, asynchronous: bool):
    saver, owner = Saver(tmp_path, asynchronous=asynchronous), Owner(TENSORS)
    states = {}
    for step in range(1, 6):
        owner.step()
        states[step] = owner.state()
        saver.save(step, owner, {}, None)  # type: ignore[arg-type]
        saver.poll()
    saver.finish()
    for path in list_steps(tmp_path):
        assert_holds(path, states.pop(Checkpoint.open(path).step))
    assert not states


def test_an_optimizer_step_waits_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch, Copier, "copy")
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    before = owner.state()
    saver.save(1, owner, {}, None)  # type: ignore[arg-type]
    assert gate.reached.wait(60)
    stepping = threading.Thread(target=owner.step)
    stepping.start()
    stepping.join(0.1)
    assert stepping.is_alive()
    gate.open()
    stepping.join(60)
    assert not stepping.is_alive()
    saver.finish()
    assert_holds(tmp_path / "step-00000001", before)
    assert not owner.optimizer._optimizer_step_pre_hooks


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch, os, "fsync")
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    before = owner.state()
    said: list[Path] = []
    saver.save(1, owner, {}, None, lambda path, seconds: said.append(path))  # type: ignore[arg-type]
    assert gate.reached.wait(60)
    for _ in range(3):
        owner.step()
        saver.poll()
    assert not said
    assert not list_steps(tmp_path)
    gate.open()
    saver.finish()
    assert said == [tmp_path / "step-00000001"]
    assert_holds(said[0], before)
    saver.finish()
    saver.poll()
    assert len(said) == 1


def test_what_training_does_meanwhile_is_no_part_of_what_a_save_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [10.0]
    took: list[float] = []
    monkeypatch.setattr(saver_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    gate = Gate(monkeypatch, Copier, "copy")
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    saver.save(1, owner, {}, None, lambda path, seconds: took.append(seconds))  # type: ignore[arg-type]
    assert gate.reached.wait(60)
    now[0] += 3.0
    gate.open()
    assert saver._pending is not None
    saver._pending.wait()
    now[0] += 100.0  # a long step
    saver.poll()
    saver.finish()
    assert took == [3.0]


def test_a_save_finishes_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    saver.save(1, owner, {}, None)  # type: ignore[arg-type]
    saver.save(2, owner, {}, None)  # type: ignore[arg-type]
    assert [path.name for path in list_steps(tmp_path)] == ["step-00000001"]
    saver.finish()
    assert len(list_steps(tmp_path)) == 2


def test_host_memory_is_taken_once(tmp_path: Path):
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    places = []
    for step in (1, 2, 3):
        saver.save(step, owner, {}, None)  # type: ignore[arg-type]
        saver.finish()
        places.append(sorted(buffer.data_ptr() for buffer in saver._copier._buffers.values()))
    assert places[0] == places[1] == places[2]
    assert sum(b.nbytes for b in saver._copier._buffers.values()) == 12 * sum(
        t.numel() for t in TENSORS.values()
    )


def test_low_precision_state_is_written_in_fp32():
    values = torch.tensor([1.5, -2.25], dtype=torch.bfloat16)
    share = store.Share([store.Part("weight", "w", Shard((2,)), 0, values)], {}, {})
    (part,) = Copier().copy(share).parts
    assert part.values.dtype == torch.float32
    assert part.values.tolist() == [1.5, -2.25]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("ends_by", ["poll", "finish", "save"])
def test_a_full_disk(tmp_path: Path, asynchronous: bool, ends_by: str):
    saver, owner = Saver(tmp_path, asynchronous=asynchronous), Owner(TENSORS)
    saver.save(1, owner, {}, None)  # type: ignore[arg-type]
    saver.finish()
    said: list[Path] = []

    def save_and_end() -> None:
        saver.save(2, owner, {}, None, lambda path, seconds: said.append(path))  # type: ignore[arg-type]
        assert saver._pending is not None
        saver._pending.wait()
        if ends_by == "save":
            saver.save(3, owner, {}, None)  # type: ignore[arg-type]
        getattr(saver, ends_by)()

    words = r"got a full disk .* MiB free.* rank 0's share; .*make room"
    with largest_file(500), pytest.raises(TrainingError, match=words) as caught:
        save_and_end()
    assert caught.value.everywhere
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert not said
    saver.save(3, owner, {}, None)  # type: ignore[arg-type]
    saver.finish()
    assert_holds(tmp_path / "step-00000003", owner.state())


def test_no_folder_can_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="no checkpoint was written: run the same command"):
        Saver(tmp_path / "file").save(1, Owner(TENSORS), {}, None)  # type: ignore[arg-type]


def test_no_memory_for_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError("out of it")

    monkeypatch.setattr(saver_module.np, "copyto", refuse)
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    saver.save(1, owner, {}, None)  # type: ignore[arg-type]
    owner.step()
    with pytest.raises(TrainingError, match="MemoryError while writing rank 0's share: out of it"):
        saver.finish()
    assert not list(tmp_path.iterdir())


def test_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writer, "CHUNK_BYTES", 8)
    gate = Gate(monkeypatch, os, "write")
    saver, owner = Saver(tmp_path), Owner(TENSORS)
    saver.save(1, owner, {}, None)  # type: ignore[arg-type]
    assert gate.reached.wait(60)
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("it wrote all of it"))
    threading.Timer(0.05, gate.open).start()
    saver.abandon()
    assert not list(tmp_path.iterdir())
    saver.abandon()


def save_on_ranks(root: str, fails_on: int | None) -> tuple[str, int, bool]:
    """Two saves on all ranks, of which one rank's second does not fit; → (error, polls until the first was
    whole, whether a later save works)."""
    rank, size = processes.rank(), processes.world_size()
    cuts = whole_cuts(TENSORS)
    flat = Cut("a.w", Shard((4, 6)), 0, 24)
    ends = [24 * i // size for i in range(size + 1)]
    cuts = [flat._replace(start=ends[rank], stop=ends[rank + 1]), *(cuts[1:] if rank == 0 else [])]
    owner = Owner(TENSORS, cuts)
    saver = Saver(Path(root))
    whole: list[Path] = []
    saver.save(1, owner, {}, None, lambda path, seconds: whole.append(path))  # type: ignore[arg-type]
    polls = 0
    while not whole:
        saver.poll()
        polls += 1
    owner.step()
    message = ""
    with largest_file(100 if rank == fails_on else 10**6):
        try:
            saver.save(2, owner, {}, None)  # type: ignore[arg-type]
            saver.finish()
        except TrainingError as error:
            message = str(error)
    saver.save(3, owner, {}, None)  # type: ignore[arg-type]
    saver.finish()
    return message, polls, processes.gather(rank) == list(range(size))


@pytest.mark.slow
@pytest.mark.parametrize("fails_on", [None, 0, 1])
def test_several_ranks(tmp_path: Path, fails_on: int | None):
    results = ranks.run(2, save_on_ranks, str(tmp_path), fails_on)
    assert len({polls for _, polls, _ in results}) == 1
    messages = {message for message, _, _ in results}
    assert len(messages) == 1
    assert all(in_step for _, _, in_step in results)
    (message,) = messages
    names = ["step-00000001", "step-00000003"]
    if fails_on is None:
        assert message == ""
        names.insert(1, "step-00000002")
    else:
        assert f"rank {fails_on}'s share" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    whole = Owner(TENSORS)
    assert_holds(tmp_path / "step-00000001", whole.state())
    whole.step()
    assert_holds(tmp_path / "step-00000003", whole.state())

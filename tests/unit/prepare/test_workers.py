"""Workers: results as they end, and a dead worker told as one."""

from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.prepare.workers import Workers


def double(value: int) -> int:
    return 2 * value


def test_a_pipe_closed_by_the_dying_executor_is_a_killed_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def closed(*_: object, **__: object) -> None:
        raise OSError("handle is closed")

    def run() -> None:
        with Workers(2, tmp_path, 0) as workers:
            monkeypatch.setattr(workers._executor, "submit", closed)
            monkeypatch.setattr(workers._executor, "shutdown", closed)
            list(workers.map(double, [(1,), (2,)]))

    with pytest.raises(DataError, match="a worker process that was killed"):
        run()


@pytest.mark.parametrize("count", [1, 2])
def test_every_task_has_its_result(tmp_path: Path, count: int):
    with Workers(count, tmp_path, 0) as workers:
        assert sorted(workers.map(double, [(n,) for n in range(9)])) == [2 * n for n in range(9)]

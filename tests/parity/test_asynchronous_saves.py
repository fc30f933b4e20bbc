"""What a save beside training holds is the state at its call, in every engine: the next step comes while the
copy is under way, and must wait for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.support import ranks
from tests.support.training import TINY_GPT, compose, open_loader

pytestmark = pytest.mark.slow


def save_both_ways(overrides: list[str], root: str) -> tuple[dict[str, object], dict[str, object], bool]:
    """Save once waiting and once not, and train on at once; → the files of both checkpoints, and whether the
    weights had changed by the time that the second was on the disk."""
    from llmtrain.checkpoint import saver as saver_module
    from llmtrain.checkpoint import store
    from llmtrain.checkpoint.reader import Checkpoint
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.resolve import resolve

    class SlowCopier(saver_module.Copier):
        def copy(self, share: store.Share) -> store.Share:
            time.sleep(0.5)
            return super().copy(share)

    resolved = resolve(compose(overrides))
    config, layout = resolved.config, resolved.layout
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    engine = build_engine(config, layout, torch.device("cpu"), objective, None)
    loader = open_loader(resolved)
    batches = loader.steps(0)
    for _ in range(2):
        engine.train_step(next(batches).micro_batches, lr=1e-2)
    waited = store.save(Path(root) / "waited", 2, engine, {}, None)
    saver = saver_module.Saver(Path(root) / "beside")
    saver._copier = SlowCopier()
    saver.save(2, engine, {}, None)
    for _ in range(2):
        engine.train_step(next(batches).micro_batches, lr=1e-2)
        saver.poll()
    saver.finish()
    beside = Path(root) / "beside" / waited.name
    later = store.save(Path(root) / "later", 2, engine, {}, None)
    files = [Checkpoint.open(path).manifest["files"] for path in (waited, beside, later)]
    processes.barrier()
    return files[0], files[1], files[2] != files[0]


@pytest.mark.in_turns(2)
@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ["engine=local"]),
        (2, ["engine=local", "precision=bf16"]),
        (2, ["engine=deepspeed", "parallel.zero=0"]),
        (2, ["parallel.zero=1", "precision=bf16"]),
        (2, ["parallel.zero=2"]),
        (2, ["parallel.zero=3", "precision=bf16"]),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2", "parallel.zero=1"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_the_state_at_the_call(corpus: Path, tmp_path: Path, size: int, overrides: list[str]):
    settings = [*TINY_GPT, f"data.path={corpus}", "train.steps=20", *overrides]
    for waited, beside, has_changed in ranks.run(size, save_both_ways, settings, str(tmp_path)):
        assert beside == waited
        assert has_changed

"""Nothing that a run stores, prints or sends holds the password or the signature of its data's URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.test_train_faults import curve
from tests.support.servers import FileServer
from tests.support.training import TINY_GPT
from tests.support.warm import llmtrain

pytestmark = pytest.mark.slow

SECRETS = (b"hunter2", b"3f9asignature")


def test_a_run_keeps_no_secret_of_its_url(corpus: Path, tmp_path: Path):
    """In its files, in what W&B would upload and in what it printed; and it resumes as ever."""
    run = tmp_path / "run"
    with FileServer(corpus) as served:
        url = served.url.replace("://", "://reader:hunter2@") + "?code=a,3f9asignature"
        command = ["train", *TINY_GPT, "device=cpu", f"data.path={url}", f"data.cache.dir={tmp_path}/cache"]
        command += [f"run.dir={run}", "track=[jsonl,tensorboard,wandb]", "evaluation.max_samples=8"]
        for steps in (2, 4):
            done = llmtrain(*command, f"train.steps={steps}", WANDB_MODE="offline")
            assert done.returncode == 0, done.stderr
            for secret in SECRETS:
                assert secret.decode() not in done.stdout + done.stderr
        assert "resuming from" in done.stderr
        assert "data.path" not in done.stderr, "a note of a change that is none"
        assert sorted(curve(run)) == [1, 2, 3, 4]
        elsewhere = [f"data.path={url.replace('?', '/nowhere?')}", f"run.dir={tmp_path}/other"]
        mistake = llmtrain(*command, *elsewhere)
        assert mistake.returncode == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    for secret in SECRETS:
        assert secret.decode() not in mistake.stderr
        assert not [path for path in files if secret in path.read_bytes()]
        assert not [path for path in files if secret in str(path).encode()]

"""Training on a corpus from elsewhere, over HTTP and S3, is training on the same corpus in a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.remote_streams import loader_of, refusal, shard, stream
from tests.support.servers import Faults, FileServer, s3_client, s3_server, upload
from tests.support.training import TINY_GPT
from tests.support.warm import llmtrain

pytestmark = pytest.mark.usefixtures("short_waits")


def train(path: str, run: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = [*TINY_GPT, "train.steps=12", "checkpoint.every=6", "evaluation.every=6"]
    settings += ["evaluation.max_samples=16"]
    options = [f"data.path={path}", f"run.dir={run}", *overrides]
    return llmtrain("train", *settings, *options, **environment)


def metrics(run: Path) -> list[dict[str, float]]:
    """Of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "data_digest" in line]


def curve(run: Path) -> list[tuple[float, ...]]:
    return [(m["step"], m["data_digest"], m["loss"]) for m in metrics(run)]


@pytest.fixture(scope="module")
def local_curve(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    run = tmp_path_factory.mktemp("local") / "run"
    done = train(str(prepared), run)
    assert done.returncode == 0, done.stderr
    assert len(curve(run)) == 12
    return curve(run)


@pytest.mark.slow
def test_training_over_http(served: FileServer, tmp_path: Path, local_curve: list[tuple[float, ...]]):
    served.faults = Faults(cut_every=4, unavailable=2)
    options = [f"data.cache.dir={tmp_path}/cache", "data.cache.bytes=45000"]
    done = train(f"{served.url}/corpus", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == local_curve
    last = metrics(tmp_path / "run")[-1]
    assert last["cache_retries"] >= 2
    assert last["cache_files"] <= len([request for request in served.log if request.status < 300])
    assert last["cache_bytes"] > 7168 * last["cache_files"] > 0
    assert last["cache_evictions"] > 0


@pytest.mark.slow
def test_training_over_http_refuses_a_bad_shard_in_one_line(
    prepared: Path, served: FileServer, tmp_path: Path
):
    served.faults.truncated[shard(prepared, 2)] = 5000
    options = [f"data.cache.dir={tmp_path}/cache", "data.shuffle_tars=17"]
    done = train(f"{served.url}/corpus", tmp_path / "run", *options)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("llmtrain: error: ")]
    assert len(errors) == 1
    assert f"{served.url}/{shard(prepared, 2)}: got a truncated file of 5000 bytes" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def s3(prepared: Path) -> Iterator[dict[str, str]]:
    with s3_server() as environment:
        upload(prepared, environment, "bucket", "corpora/reviews")
        yield environment


@pytest.mark.slow
def test_training_over_s3(s3: dict[str, str], tmp_path: Path, local_curve: list[tuple[float, ...]]):
    options = [f"data.cache.dir={tmp_path}/cache", "data.cache.bytes=45000"]
    done = train("s3://bucket/corpora/reviews", tmp_path / "run", *options, **s3)
    assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "run") == local_curve


@pytest.mark.slow
def test_the_stream_over_s3_is_the_local_one_or_refused(
    prepared: Path, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    there = "s3://bucket/corpora/reviews"
    tight = ["data.cache.bytes=45000", "data.cache.timeout=10"]
    assert stream(loader_of(there, tmp_path / "cache", *tight)) == stream(loader_of(prepared, tmp_path))
    name = shard(prepared, 4).removeprefix("corpus/")
    client = s3_client(s3)
    content = (prepared / name).read_bytes()
    key = {"Bucket": "bucket", "Key": f"corpora/reviews/{name}"}
    client.put_object(**key, Body=content[:5000])
    refused = refusal(lambda: stream(loader_of(there, tmp_path / "truncated", *tight)))
    assert f"{there}/{name}: got a truncated file of 5000 bytes; allowed: 10240 bytes" in refused
    client.put_object(**key, Body=content[::-1])
    refused = refusal(lambda: stream(loader_of(there, tmp_path / "altered", *tight)))
    assert f"{there}/{name}: got an altered file" in refused
    client.delete_object(**key)
    refused = refusal(lambda: stream(loader_of(there, tmp_path / "missing", *tight)))
    assert f"{there}/{name}: got no such file" in refused
    client.put_object(**key, Body=content)
    shutil.rmtree(tmp_path / "cache")
    assert stream(loader_of(there, tmp_path / "cache", *tight), 5)
    refused = refusal(lambda: loader_of("s3://nobody/corpora", tmp_path, *tight))
    assert "s3://nobody/corpora/manifest.json: got no such file" in refused

"""A corpus that comes from elsewhere, over a way that goes wrong: the stream is that of the same corpus in a
folder, bit by bit, or refused in one line that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from llmtrain.corpus import transport
from llmtrain.corpus.cache import Cache, CacheConfig
from llmtrain.corpus.cache_folder import RemoteFile
from llmtrain.corpus.tar_files import TarFileError
from llmtrain.data.loader import Loader
from llmtrain.errors import DataError, UserError
from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from llmtrain.train.resolve import resolve
from tests.support.corpora import write_text
from tests.support.servers import Faults, FileServer, s3_client, s3_server, upload
from tests.support.training import REPOSITORY, TINY_GPT, compose, open_loader
from tests.support.warm import llmtrain

SIZE = 300_000
STEPS = 120
"""More than two epochs of the corpus below."""

READER = """
import hashlib, json, sys
import numpy as np
from llmtrain.corpus import transport
from llmtrain.corpus.cache import Cache, CacheConfig
from pathlib import Path

transport.FIRST_WAIT = 0.01
job = json.loads(sys.argv[1])
cache = Cache(CacheConfig(dir=Path(job["dir"]), bytes=job["bytes"], timeout=5.0))
found = []
for number in np.random.default_rng(job["seed"]).permutation(job["order"]).tolist():
    with open(cache.open(*job["files"][number]), "rb") as file:
        found.append((number, hashlib.sha256(file.read()).hexdigest()))
print(json.dumps(found))
"""
"""Reads files of a cache in an order of its own and prints what they held."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transport, "FIRST_WAIT", 0.001)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[FileServer, list[RemoteFile]]]:
    """A server, and its five files of SIZE bytes."""
    folder = tmp_path / "served"
    folder.mkdir()
    rng = np.random.default_rng(0)
    found = []
    with FileServer(folder) as server:
        for number in range(5):
            content = rng.bytes(SIZE)
            (folder / f"{number}.tar").write_bytes(content)
            found.append(RemoteFile(f"{server.url}/{number}.tar", SIZE, xxhash.xxh3_128_hexdigest(content)))
        yield server, found


def start_reader(
    folder: Path, files: Sequence[RemoteFile], order: Sequence[int], *, bound: int = 1 << 30, seed: int = 0
) -> subprocess.Popen[str]:
    job = {
        "dir": str(folder),
        "bytes": bound,
        "files": [(file.url, file.size, file.xxh3_128) for file in files],
        "order": list(order),
        "seed": seed,
    }
    return subprocess.Popen(
        [sys.executable, "-c", READER, json.dumps(job)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_reader(process: subprocess.Popen[str]) -> list[tuple[int, str]]:
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return [(number, found) for number, found in json.loads(output)]


def expected(server: FileServer, number: int) -> str:
    return hashlib.sha256((server.folder / f"{number}.tar").read_bytes()).hexdigest()


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come true")


def partial_size(folder: Path, file: RemoteFile) -> int:
    path = folder / f"{file.name}.partial"
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_many_processes_in_less_room_than_they_need(
    files: tuple[FileServer, list[RemoteFile]], tmp_path: Path
):
    server, remote = files
    server.faults.cut_every = 7
    order = [0, 1, 2, 3, 4] * 4
    readers = [
        start_reader(tmp_path / "cache", remote, order, bound=2 * SIZE, seed=seed) for seed in range(4)
    ]
    for reader in readers:
        found = finish_reader(reader)
        assert len(found) == len(order)
        assert all(digest == expected(server, number) for number, digest in found)
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert sum(sizes) <= 2 * SIZE


@pytest.mark.slow
def test_a_process_killed_while_it_downloads_is_gone_on_from(
    files: tuple[FileServer, list[RemoteFile]], tmp_path: Path
):
    server, remote = files
    server.faults.slow = 0.5
    killed = start_reader(tmp_path / "cache", remote, [0])
    wait_until(lambda: partial_size(tmp_path / "cache", remote[0]) > 0)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    arrived = partial_size(tmp_path / "cache", remote[0])
    server.faults.slow = 0.0
    assert finish_reader(start_reader(tmp_path / "cache", remote, [0])) == [(0, expected(server, 0))]
    assert server.ranges("0.tar") == [None, f"bytes={arrived}-"]


@pytest.mark.slow
def test_a_process_that_waits_goes_on_from_where_a_killed_one_was(
    files: tuple[FileServer, list[RemoteFile]], tmp_path: Path
):
    server, remote = files
    server.faults.slow = 1.0
    killed = start_reader(tmp_path / "cache", remote, [0])
    wait_until(lambda: partial_size(tmp_path / "cache", remote[0]) > 0)
    waiting = start_reader(tmp_path / "cache", remote, [0])
    # It has come to the file's lock, or will soon; both end alike.
    time.sleep(0.5)
    killed.send_signal(signal.SIGKILL)
    server.faults.slow = 0.0
    killed.communicate()
    assert finish_reader(waiting) == [(0, expected(server, 0))]
    first, second = server.ranges("0.tar")
    assert (first, str(second)[:6]) == (None, "bytes=")


def read(cache: Cache, file: RemoteFile) -> str:
    with open(cache.open(file.url, file.size, file.xxh3_128), "rb") as opened:
        return hashlib.sha256(opened.read()).hexdigest()


def test_a_disk_smaller_than_the_bound(files: tuple[FileServer, list[RemoteFile]], small_disk: Path):
    server, remote = files
    cache = Cache(CacheConfig(dir=small_disk / "cache"))
    for number in (0, 1, 2, 3, 4, 0):
        assert read(cache, remote[number]) == expected(server, number)
    assert cache.counters.evictions == 3
    # What had arrived when the disk was full is gone on from.
    first, second = server.ranges("3.tar")
    assert (first, second) == (None, f"bytes={second[6:-1]}-")
    assert int(second[6:-1]) > 100_000
    cache.close()


def test_reading_ahead_on_a_full_disk_waits(files: tuple[FileServer, list[RemoteFile]], small_disk: Path):
    server, remote = files
    cache = Cache(CacheConfig(dir=small_disk / "cache", downloads=1))
    cache.want(remote)
    wait_until(lambda: cache.counters.files == 3)
    for number in range(5):
        assert read(cache, remote[number]) == expected(server, number)
    assert cache.counters.files == 5
    cache.close()


def test_a_disk_that_others_have_filled(files: tuple[FileServer, list[RemoteFile]], small_disk: Path):
    _, remote = files
    (small_disk / "other").write_bytes(bytes(900_000))
    cache = Cache(CacheConfig(dir=small_disk / "cache"))
    with pytest.raises(DataError) as caught:
        read(cache, remote[0])
    message = str(caught.value)
    assert f"data.cache.dir={small_disk}/cache: got a full disk" in message
    assert f"allowed: 300,000 bytes for {remote[0].url}" in message
    assert "another data.cache.dir or a smaller data.cache.bytes" in message
    assert not isinstance(caught.value, TarFileError)
    # It leaves nothing on a disk that others need.
    assert sum(path.stat().st_size for path in (small_disk / "cache").iterdir()) == 0
    cache.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 17 shards of training text."""
    folder = tmp_path_factory.mktemp("remote")
    prepare(
        PrepareConfig(
            source=(str(write_text(folder / "text.jsonl")),),
            output=folder / "corpus",
            tokenizer=TokenizerConfig(vocab_size=320),
            split=SplitConfig(validation=0.1, test=0.05),
            sample_tokens=500,
            shard_bytes=8000,
            workers=1,
        )
    )
    return folder / "corpus"


@pytest.fixture
def served(prepared: Path) -> Iterator[FileServer]:
    with FileServer(prepared.parent) as server:
        yield server


def shard(prepared: Path, number: int) -> str:
    """The path of a training shard below the server's folder."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    return f"corpus/{manifest['splits']['train']['shards'][number]['file']}"


def loader_of(path: str | Path, folder: Path, *overrides: str) -> Loader:
    settings = [*TINY_GPT, f"data.path={path}", "data.shuffle_shards=3"]
    cache = [f"data.cache.dir={folder}", "data.cache.timeout=1", "data.cache.retries=3"]
    found = open_loader(resolve(compose([*settings, *cache, *overrides])))
    assert isinstance(found, Loader)
    return found


def stream(loader: Loader, steps: int = STEPS) -> list[str]:
    """A hash of all that each step gives to a model."""
    found = []
    for _, batch in zip(range(steps), loader.steps(), strict=False):
        digest = hashlib.sha256()
        for micro_batch in batch.micro_batches:
            for name, tensor in sorted(micro_batch.batch.items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
        found.append(digest.hexdigest())
    return found


WAYS = {
    "well": Faults(),
    "cut": Faults(cut_every=10),
    "often cut": Faults(cut_every=2),
    "no ranges": Faults(cut_every=3, ignore_range=True),
    "no lengths": Faults(cut_every=10, length=False),
    "busy": Faults(unavailable=3),
    "busy and says so": Faults(unavailable=3, status=429, retry_after="0"),
    "slow": Faults(slow=0.01),
    "stalled": Faults(stall=3.0, stalls=2),
}


@pytest.mark.parametrize(("way", "packing"), [*((way, "concat") for way in WAYS), ("cut", "best_fit")])
def test_the_stream_is_the_local_one(
    prepared: Path, served: FileServer, tmp_path: Path, way: str, packing: str
):
    local = stream(loader_of(prepared, tmp_path, f"data.packing={packing}"))
    served.faults = Faults(**vars(WAYS[way]))
    # Room for 4 of 17 shards: the second epoch downloads again.
    options = [f"data.packing={packing}", "data.cache.bytes=45000"]
    assert stream(loader_of(f"{served.url}/corpus", tmp_path, *options)) == local
    assert sum(map(size_of, tmp_path.glob("*-*"))) <= 45_000


def size_of(path: Path) -> int:
    """A thread that reads ahead may evict the file at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


BAD = {
    "missing": lambda path: Faults(missing={path}),
    "truncated": lambda path: Faults(truncated={path: 5000}),
    "altered": lambda path: Faults(flipped={path: 5000}),
    "always busy": lambda path: Faults(broken={path}),
}
SAID = {
    "missing": "got no such file (HTTP 404)",
    "truncated": "got a truncated file of 5000 bytes; allowed: 10240 bytes",
    "altered": "got an altered file: its content has the checksum",
    "always busy": "got no answer that can be used in 4 attempts (HTTP 503)",
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_shard_is_refused_by_name(prepared: Path, served: FileServer, tmp_path: Path, fault: str):
    served.faults = BAD[fault](shard(prepared, 4))
    message = refusal(lambda: stream(loader_of(f"{served.url}/corpus", tmp_path)))
    assert f"{served.url}/{shard(prepared, 4)}: {SAID[fault]}" in message


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_shard_is_left_out(prepared: Path, served: FileServer, tmp_path: Path, fault: str):
    """All other samples are those of the whole corpus, at the same places."""
    path = shard(prepared, 4)
    served.faults = BAD[fault](path)
    loader = loader_of(f"{served.url}/corpus", tmp_path / "cache", "data.on_bad_shard=skip")
    whole = loader_of(prepared, tmp_path)
    skipped = rows = 0
    for _, found, wanted in zip(range(STEPS), loader.steps(), whole.steps(), strict=False):
        for ours, theirs in zip(found.micro_batches, wanted.micro_batches, strict=True):
            skipped += ours.num_skipped
            rows += len(ours.samples)
            good = ours.indices == theirs.indices
            assert (~good).sum() == ours.num_skipped
            for name, tensor in ours.batch.items():
                assert np.array_equal(tensor.numpy()[good], theirs.batch[name].numpy()[good])
    assert 0 < skipped < rows / 4


def test_no_manifest_and_no_access(served: FileServer, tmp_path: Path):
    assert "nothing/manifest.json: got no such file" in refusal(
        lambda: loader_of(f"{served.url}/nothing", tmp_path)
    )
    served.faults.password = "user:s3cret"
    message = refusal(lambda: loader_of(f"{served.url.replace('//', '//user:wr0ng@')}/corpus", tmp_path))
    assert "corpus/manifest.json: got access refused (HTTP 401)" in message
    assert "wr0ng" not in message
    assert stream(loader_of(f"{served.url.replace('//', '//user:s3cret@')}/corpus", tmp_path), 3)


@pytest.mark.parametrize("name", ["tokenizer.model", "train/index.npy"])
def test_an_altered_small_file(served: FileServer, tmp_path: Path, name: str):
    served.faults.flipped[f"corpus/{name}"] = 500
    message = refusal(lambda: loader_of(f"{served.url}/corpus", tmp_path))
    assert f"{served.url}/corpus/{name}: got an altered" in message


def test_a_shard_that_changes_under_a_running_job(prepared: Path, served: FileServer, tmp_path: Path):
    """What is in the cache is what the manifest said; what has to come again is refused."""
    path = shard(prepared, 4)
    other = (prepared.parent / shard(prepared, 5)).read_bytes()
    kept = loader_of(f"{served.url}/corpus", tmp_path / "large")
    assert len(stream(kept, 60)) == 60
    tight = loader_of(f"{served.url}/corpus", tmp_path / "small", "data.cache.bytes=45000")
    assert len(stream(tight, 60)) == 60
    served.faults.replaced[path] = other
    assert stream(kept) == stream(loader_of(prepared, tmp_path))
    fresh = loader_of(f"{served.url}/corpus", tmp_path / "small", "data.cache.bytes=45000")
    assert f"{served.url}/{path}: got an altered file" in refusal(lambda: stream(fresh))


def test_a_full_cache_disk(served: FileServer, small_disk: Path):
    (small_disk / "other").write_bytes(bytes(1_030_000))
    message = refusal(lambda: stream(loader_of(f"{served.url}/corpus", small_disk / "cache")))
    assert f"data.cache.dir={small_disk}/cache: got a full disk" in message


def train(path: str, run: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = [*TINY_GPT, "train.steps=12", "checkpoint.every=6", "evaluation.every=6"]
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
    options = [f"data.cache.dir={tmp_path}/cache", "data.shuffle_shards=17"]
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

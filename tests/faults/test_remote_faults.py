"""A corpus that comes over a network that goes wrong: the stream is that of the same corpus in a folder, bit
by bit, or refused in one line that names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.remote_streams import STEPS, loader_of, refusal, shard, stream
from tests.support.servers import Faults, FileServer

pytestmark = pytest.mark.usefixtures("short_waits")


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


@pytest.fixture(scope="module")
def local(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Packing → the stream of the corpus in its folder."""
    folder = tmp_path_factory.mktemp("local")
    return {
        name: stream(loader_of(prepared, folder, f"data.packing={name}")) for name in ("concat", "best_fit")
    }


@pytest.mark.parametrize(("way", "packing"), [*((way, "concat") for way in WAYS), ("cut", "best_fit")])
def test_the_stream_is_the_local_one(
    local: dict[str, list[str]], served: FileServer, tmp_path: Path, way: str, packing: str
):
    served.faults = Faults(**vars(WAYS[way]))
    # Room for 4 of 17 shards: the second epoch downloads again.
    options = [f"data.packing={packing}", "data.cache.bytes=45000"]
    assert stream(loader_of(f"{served.url}/corpus", tmp_path, *options)) == local[packing]
    assert sum(map(size_of, tmp_path.glob("*-*"))) <= 45_000


def size_of(path: Path) -> int:
    """A thread that reads ahead may evict the file at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
    loader = loader_of(f"{served.url}/corpus", tmp_path / "cache", "data.on_bad_tar=skip")
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

"""Unfinished work is its user's alone: nobody else's link waits behind a name in it."""

import os
import stat
from pathlib import Path

import pytest

from llmtrain.errors import DataError
from llmtrain.prepare import folder, phases
from llmtrain.prepare.config import PrepareConfig, SplitConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig

NAMES = (
    "read/.000000.tmp",
    "duplicates/000000.tmp",
    "encoded/.000000.json.tmp",
    "encoded/000000.tokens",
    "shards/.train-000000.json.tmp",
)
"""Written by earlier versions, through a link that waited there."""


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    (tmp_path / "a.txt").write_text("\n\n".join(f"some text {number}" * 300 for number in range(20)))
    return PrepareConfig(
        source=(str(tmp_path / "a.txt"),),
        output=tmp_path / "corpus",
        tokenizer=TokenizerConfig(vocab_size=277),
        split=SplitConfig(validation=0.0, test=0.0),
        workers=1,
    )


def plant(work: Path, victim: Path) -> None:
    """What somebody leaves in a folder in which all may write."""
    work.mkdir(parents=True)
    for name in NAMES:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).symlink_to(victim)
    for entry in (work, *(path for path in work.iterdir() if path.is_dir())):
        entry.chmod(0o777)


def test_links_in_work_that_others_may_write_to_are_not_followed(tmp_path: Path, config: PrepareConfig):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    plant(config.output / ".prepare", victim)
    assert prepare(config) is not None
    assert victim.read_text() == "mine"
    assert not (config.output / ".prepare").exists()


def test_a_link_in_place_of_the_work_is_refused(tmp_path: Path, config: PrepareConfig):
    (tmp_path / "elsewhere").mkdir()
    config.output.mkdir()
    (config.output / ".prepare").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"\.prepare: got a link; allowed: unfinished work of this user"):
        prepare(config)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder to another user")
def test_another_user_s_work_is_refused(config: PrepareConfig):
    (config.output / ".prepare").mkdir(parents=True)
    os.chown(config.output / ".prepare", 12345, 12345)
    with pytest.raises(DataError, match=r"\.prepare: got something that is not a folder of this user"):
        prepare(config)


def test_work_is_the_user_s_alone_and_that_of_earlier_versions_goes_on(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
):
    work = config.output / ".prepare"
    modes = []
    find_duplicates = phases.Phases.find_duplicates

    def stop(*arguments: object) -> None:
        modes.append(stat.S_IMODE(os.stat(work).st_mode))
        raise KeyboardInterrupt

    monkeypatch.setattr(phases.Phases, "find_duplicates", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    work.chmod(0o755)
    monkeypatch.setattr(phases.Phases, "find_duplicates", find_duplicates)
    inner = os.stat(work / "read" / "000000").st_ino
    commit = folder.commit

    def look(*arguments: Path) -> None:
        modes.append(stat.S_IMODE(os.stat(work).st_mode))
        assert os.stat(work / "read" / "000000").st_ino == inner
        commit(*arguments)

    monkeypatch.setattr("llmtrain.prepare.job.commit", look)
    assert prepare(config) is not None
    assert modes == [0o700, 0o700]
    assert stat.S_IMODE(os.stat(config.output / "train").st_mode) & 0o500 == 0o500

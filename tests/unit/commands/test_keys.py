"""`llmtrain keys`, and conf/README.md, which is what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmtrain.cli.explain import print_keys
from llmtrain.cli.verbs import CONFIGS, config_types
from llmtrain.commands.keys import type_words
from llmtrain.config import leaves
from tests.support.training import REPOSITORY

ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> str:
    return (REPOSITORY / "conf" / "README.md").read_text()


def test_the_page_is_what_the_command_prints(page: str, capsys: pytest.CaptureFixture[str]):
    assert print_keys([]) == 0
    assert capsys.readouterr().out == page, "run: llmtrain keys > conf/README.md"


def test_every_key_of_every_verb_has_a_row_with_a_meaning(page: str):
    meanings = {key: meaning for key, _, _, meaning in ROW.findall(page)}
    keys = {leaf.key for verb in CONFIGS for config in config_types(verb) for leaf in leaves(config)}
    # Below the names that a mapping leaves open are the keys of other sections.
    keys = {key.partition(".*")[0] for key in keys}
    assert keys <= set(meanings), sorted(keys - set(meanings))
    assert all(meanings.values()), [key for key, meaning in meanings.items() if not meaning]


def test_every_preset_is_described(page: str):
    described = dict(re.findall(r"^\| \[`[\w.]+`\]\(([\w./]+)\) \| (.*) \|$", page, re.MULTILINE))
    presets = {str(path.relative_to(REPOSITORY / "conf")) for path in (REPOSITORY / "conf").glob("*/*.yaml")}
    assert set(described) == presets
    assert all(described.values()), described


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("batch.global_size", "`32`"),  # what conf/train.yaml says
        ("run.dir", "`runs/${run.name}`"),
        ("schedule.min_ratio", "`0.1`"),  # what conf/schedule/cosine.yaml says
        ("track.wandb.project", "`llmtrain`"),  # the field's, though the tracker is off
        ("data.cache.dir", "`~/.cache/llmtrain/shards`"),  # of no one's home
        ("sequence_length", "`256`"),  # of `data show`: null stands for it
        ("source", "required"),
    ],
)
def test_defaults_are_those_of_a_command_without_overrides(page: str, key: str, default: str):
    assert default in [found for name, _, found, _ in ROW.findall(page) if name == key]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int | None, "whole number, or null"),
        (str | Path, "text or path"),
        (tuple[float, float], "list of 2: number"),
        (dict[str, float], "{name: number}"),
    ],
)
def test_types_in_words(hint: object, words: str):
    assert type_words(hint) == words


def test_a_word_behind_it_is_refused(capsys: pytest.CaptureFixture[str]):
    assert print_keys(["optimizer"]) == 2
    assert capsys.readouterr().err.startswith(
        "llmtrain: error: llmtrain keys: got 'optimizer'; allowed: nothing"
    )

"""Values arrive as typed, in every key that holds text, whatever Hydra's grammar makes of them."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from llmtrain.cli.explain import conf_folder
from llmtrain.cli.hydra_app import composed
from llmtrain.cli.overrides import TextKey, TextKeys, quote, text_keys, with_present_keys
from llmtrain.cli.verbs import CONFIGS, SECOND_VERBS, STANDS_ALONE, VERBS, config_types
from llmtrain.config import MAY_BE_EMPTY, leaves
from tests.support.training import compose

TEXTS = (
    *("2024_01", "1_000", "1.50", "1e3", "true", "null ", "???", "'quoted'", '"quoted"', "${oc.env:HOME}"),
    *("cost ${x}", r"\${x}", r"\\${x}'\ ", "${", "a, b", "it's", 'say "so"', "back\\slash", "ends\\", "\\'"),
    *("ü ★", "=", "/a=b", "a = b", "{a: 1}", "{", "(", "a)", "a[0]", "[a] [b]", ":", "50%", "wow!"),
    *("#1", "@x"),
    *("a & b; c | d", "~", "*", "choice(a,b)", " spaces ", "two\nlines", "-1", "a:b", "s3://x/y?z=1&w=2"),
)


KEYS = {**text_keys("prepare"), **text_keys("train"), **text_keys("generate")}


def text_of(verb: str) -> Iterator[tuple[str, TextKey]]:
    for key, kind in text_keys(verb).items():
        if not kind.is_mapping:
            yield key.replace("*", "web"), kind


@pytest.mark.parametrize("verb", CONFIGS)
def test_each_key_of_text_holds_it_as_typed(verb: str):
    keys, parser = text_keys(verb), OverridesParser.create()
    assert keys
    for key, kind in text_of(verb):
        for text in TEXTS:
            assert arrives(parser, quote(f"{key}={text}", keys)) == text, key
        assert arrives(parser, quote(f"{key}=null", keys)) == (None if kind.may_be_null else "null"), key
        several = ["/a=b.txt", "c d[1].txt", "it's"] if kind.is_list else f"[{', '.join(['/a=b.txt', 'x'])}]"
        given = f"[{', '.join(several)}]" if kind.is_list else several
        assert arrives(parser, quote(f"{key}={given}", keys)) == several, key


def arrives(parser: OverridesParser, override: str) -> Any:
    """What OmegaConf makes of the value of an override, as strings, lists and None."""
    from omegaconf import OmegaConf

    value = parser.parse_override(override).value()
    return OmegaConf.to_container(OmegaConf.create({"key": value}), resolve=True)["key"]  # type: ignore[index]


def test_the_keys_are_those_of_the_typed_configurations():
    assert set(text_keys("train")) >= {
        *("run.dir", "run.name", "data.path", "data.cache.dir", "data.sources.*", "checkpoint.resume"),
        *("track.wandb.project", "track.wandb.entity", "track.wandb.group", "track.wandb.notes"),
        *("track.wandb.tags", "model.path"),
    }
    assert set(text_keys("prepare")) >= {
        *("source", "output", "text_field", "target_field", "target_source", "tokenizer.model"),
        "filters.languages",
    }
    assert {*text_keys("import")} == {"source", "output", "tokenizer", "base"}
    assert {*text_keys("checkpoint_export")} >= {"path", "output"}
    assert {"run", "step", "data.path", "data.sources.*"} <= {*text_keys("data_show")}
    assert not {"optimizer.lr", "data.kind", "seed", "data.mixture.*"} & {*text_keys("train")}


@pytest.mark.parametrize("verb", CONFIGS)
def test_no_text_of_the_yaml_is_forgotten(verb: str):
    """A default that is text, and is none of a few given words, belongs to a key of text."""
    words = set(_words_of_literals(verb))

    def walk(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")
            elif isinstance(value, str) and value not in words:
                yield prefix + name

    renamed = {"checkpoint"} if verb == "checkpoint_export" else set()
    names = {key for key, _ in text_of(verb) if "." not in key} - {"device"} - renamed
    given = [f"{key}=x" for key in sorted(names)]
    given += ["track=[jsonl,wandb]", "model=pretrained"] if verb in ("train", "plan") else []
    found = set(walk(compose(given, verb)))
    assert found <= {*text_keys(verb), "model.family"}
    assert names <= found


def _words_of_literals(verb: str) -> Iterator[str]:
    for leaf in (leaf for config in config_types(verb) for leaf in leaves(config)):
        for part in (leaf.hint, *typing.get_args(leaf.hint)):
            if typing.get_origin(part) is typing.Literal:
                yield from map(str, typing.get_args(part))


def test_every_verb_has_its_configuration():
    verbs = {*VERBS} - {*SECOND_VERBS} | STANDS_ALONE
    verbs |= {f"{verb}_{second}" for verb, seconds in SECOND_VERBS.items() for second in seconds}
    assert set(CONFIGS) == verbs
    assert {path.stem for path in conf_folder().glob("*.yaml")} == verbs


def test_texts_that_may_be_empty_are_marked_beside_their_fields():
    may_be_empty = {key for verb in CONFIGS for key, kind in text_keys(verb).items() if kind.may_be_empty}
    assert may_be_empty == {"prompt", "track.wandb.notes"}


def test_keys_are_found_from_the_types_of_their_fields():
    """Text in each form that a field may give it; numbers and words of a few are left to Hydra's grammar."""
    found = _keys_of(Example)
    assert found == {
        "name": TextKey(),
        "folder": TextKey(may_be_null=True),
        "texts": TextKey(is_list=True),
        "paths": TextKey(may_be_null=True, is_list=True),
        "free": TextKey(may_be_empty=True),
        "section.name": TextKey(may_be_null=True),
        "named": TextKey(is_mapping=True),
        "named.*": TextKey(),
    }


@dataclass(frozen=True)
class Named:
    name: str | None


@dataclass(frozen=True)
class Numbered:
    name: str
    number: int


@dataclass(frozen=True)
class Example:
    name: str
    folder: Path | None
    texts: tuple[str, ...]
    paths: tuple[Path, ...] | None
    number: int | float
    word: Literal["a", "b"]
    numbers: tuple[int, ...]
    section: Named | Numbered
    named: Mapping[str, str]
    weights: Mapping[str, float]
    free: str = field(default="", metadata={MAY_BE_EMPTY: True})


def _keys_of(config: type) -> TextKeys:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmtrain.cli.overrides.config_types", lambda name: [config])
        return text_keys("example")


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ("prompt=The film, was (not) good", "prompt='The film, was (not) good'"),
        ("prompt='quoted'", r"prompt='\'quoted\''"),
        ("prompt=[INST] hello [/INST]", "prompt='[INST] hello [/INST]'"),
        ("output=2024_01", "output='2024_01'"),
        ("output=null", "output=null"),
        ("output=[a]", "output='[a]'"),
        ("source=[a b.txt, 2024_01,'c, d']", "source=['a b.txt','2024_01','c, d']"),
        ("source=[]", "source=[]"),
        ("source=[data/[ab].txt, /a=b]", "source=['data/[ab].txt','/a=b']"),
        ("data.sources={web: /a=b, books:s3://x}", "++data.sources={web:'/a=b',books:'s3://x'}"),
        ("data.sources.web=/a=b", "++data.sources.web='/a=b'"),
        ("data.mixture={web:0.7}", "++data.mixture={web:0.7}"),
        ("adapters={a: runs/a, b: 'x y'}", "++adapters={a:'runs/a',b:'x y'}"),
        ("+adapters={a: runs/a}", "+adapters={a:'runs/a'}"),
        ("track.wandb.notes=a = b", "++track.wandb.notes='a = b'"),
        ("optimizer=adam", "optimizer=adam"),
        ("prompt=it's", r"prompt='it\'s'"),
        ("prompt=", "prompt=''"),
        ("prompt=['one','two']", "prompt=['one','two']"),
        ("source=/data/*.txt", "source='/data/*.txt'"),
        ("run.dir=/tmp/run-1", "++run.dir='/tmp/run-1'"),
        ("optimizer.lr=1e-3", "++optimizer.lr=1e-3"),
        ("+optimizer.lr=1e-3", "+optimizer.lr=1e-3"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("~track", "~track"),
        ("--multirun", "--multirun"),
    ],
)
def test_free_text_is_quoted(given: str, quoted: str):
    assert quote(given, KEYS) == quoted


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        ("run.dir=ma,mb", "++run.dir='ma','mb'"),
        ("run.dir=2024_01, b c", "++run.dir='2024_01','b c'"),
        ("prompt='a, b',it's", r"prompt='a, b','it\'s'"),
        ('prompt="a, b"', 'prompt="a, b"'),
        ("source=[a,b],[c]", "source=['a','b'],['c']"),
        ("run.name=choice(a=1,b)", "++run.name=choice('a=1','b')"),
        ("run.name=sort(choice(a,b))", "++run.name=sort(choice(a,b))"),
        ("track.wandb.notes=a=1,b (c)", "++track.wandb.notes='a=1','b (c)'"),
        ("seed=1,2", "seed=1,2"),
    ],
)
def test_sweeps_part_free_text_at_commas(given: str, quoted: str):
    assert quote(given, KEYS, sweeps=True) == quoted


def test_null_stays_null_only_where_it_is_the_default():
    composed = compose(["prompt=null", "prompt_file=null", "checkpoint=null"], "generate")
    assert (composed["prompt"], composed["prompt_file"], composed["checkpoint"]) == ("null", None, "null")
    assert compose(["prompt=[one,two]"], "generate")["prompt"] == ["one", "two"]


def test_keys_of_earlier_versions_have_their_present_names():
    given = ["data.on_bad_shard=skip", "++data.shuffle_shards=4", "~shard_bytes", "run.name=shard_bytes"]
    present = ["data.on_bad_tar=skip", "++data.shuffle_tars=4", "~tar_bytes", "run.name=shard_bytes"]
    assert with_present_keys(given) == present
    assert composed("train", ["model=gpt_tiny", "data.on_bad_shard=skip"])["data"]["on_bad_tar"] == "skip"

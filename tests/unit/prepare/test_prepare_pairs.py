"""`prepare` of pairs: whatever they come in, a pair is one thing until it is stored as two documents."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config import decode
from llmtrain.corpus.config import TokenDataConfig
from llmtrain.corpus.corpora import open_corpora
from llmtrain.corpus.corpus import Corpus
from llmtrain.errors import ConfigError, DataError
from llmtrain.prepare.config import FiltersConfig, NearDuplicatesConfig, PrepareConfig
from llmtrain.prepare.job import prepare
from llmtrain.tokenizers.config import TokenizerConfig
from tests.support.preparing import config, documents_of, texts, tree

Pair = tuple[str, str]
FIELDS = {"text_field": "en", "target_field": "es"}


def pairs(count: int = 150, seed: int = 0) -> list[Pair]:
    return [*zip(texts(count, seed), texts(count, seed + 100), strict=True)]


def write_tsv(path: Path, rows: list[Pair]) -> None:
    path.write_text("es\tid\ten\n" + "".join(f"{target}\t0\t{source}\n" for source, target in rows))


def write_csv(path: Path, rows: list[Pair]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("en", "id", "es"), *((source, 0, target) for source, target in rows)])


def write_jsonl(path: Path, rows: list[Pair]) -> None:
    path.write_text("".join(json.dumps({"es": target, "en": source}) + "\n" for source, target in rows))


def write_parquet(path: Path, rows: list[Pair]) -> None:
    import pyarrow
    import pyarrow.parquet

    sources, targets = zip(*rows, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"es": targets, "en": sources}), path)


def write_lines(folder: Path, rows: list[Pair]) -> dict[str, tuple[str, ...]]:
    """Two files of lines, one of them packed."""
    (folder / "texts.en").write_text("".join(f"{source}\n" for source, _ in rows))
    with gzip.open(folder / "texts.es.gz", "wt") as file:
        file.write("\n".join(target for _, target in rows))
    return {"source": (f"{folder}/texts.en",), "target_source": (f"{folder}/texts.es.gz",)}


def pairs_of(output: Path) -> dict[str, list[Pair]]:
    found = documents_of(output)
    return {name: [*zip(sides[::2], sides[1::2], strict=True)] for name, sides in found.items()}


def test_every_form_gives_the_same_corpus(tmp_path: Path) -> None:
    rows = pairs()
    rows[7] = ('say "yes" twice', '"sí"')
    writers: dict[str, Callable[[Path, list[Pair]], None]] = {
        "tsv": write_tsv,
        "csv": write_csv,
        "jsonl": write_jsonl,
        "parquet": write_parquet,
    }
    found = {}
    for kind, write in writers.items():
        write(tmp_path / f"rows.{kind}", rows)
        prepare(config(tmp_path / kind, tmp_path / f"rows.{kind}", **FIELDS))
        found[kind] = pairs_of(tmp_path / kind)
    lines = write_lines(tmp_path, rows)
    prepare(config(tmp_path / "lines", **lines))
    found["lines"] = pairs_of(tmp_path / "lines")
    assert all(corpus == found["tsv"] for corpus in found.values())
    together = [pair for split in found["tsv"].values() for pair in split]
    assert sorted(together) == sorted(rows)
    order = {pair: number for number, pair in enumerate(rows)}
    for split in found["tsv"].values():
        assert [order[pair] for pair in split] == sorted(order[pair] for pair in split)
    prints = {Corpus.open(tmp_path / kind).manifest.fingerprint for kind in found}
    assert len(prints) == 1
    before = tree(tmp_path / "lines")
    report = prepare(config(tmp_path / "lines", **lines))
    assert report is not None
    assert report.reused
    assert tree(tmp_path / "lines") == before
    with pytest.raises(DataError, match="a corpus of other sources"):
        prepare(config(tmp_path / "lines", **write_lines(tmp_path, rows[:-1])))
    with pytest.raises(DataError, match='settings: target_field is "es" there and null here'):
        prepare(config(tmp_path / "tsv", tmp_path / "rows.tsv", text_field="en"))


@pytest.mark.parametrize("sample_tokens", [1, 37, 500])
def test_no_shard_parts_a_pair(tmp_path: Path, sample_tokens: int) -> None:
    write_tsv(tmp_path / "rows.tsv", pairs())
    settings = {**FIELDS, "sample_tokens": sample_tokens, "tar_bytes": 3000}
    prepare(config(tmp_path / "corpus", tmp_path / "rows.tsv", **settings))
    manifest = Corpus.open(tmp_path / "corpus").manifest
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    assert len(shards) > 5
    assert manifest.paired
    assert all(shard.num_documents % 2 == 0 for shard in shards)
    assert sorted(pair for split in pairs_of(tmp_path / "corpus").values() for pair in split) == sorted(
        pairs()
    )


def test_a_pair_is_dropped_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(60)
    source, target = rows[0]
    # A side that comes again with another one is no duplicate.
    more = [(source, "otra"), ("other", target), rows[1], ("", "sola"), ("alone", " "), ("", "")]
    write_tsv(tmp_path / "rows.tsv", rows + more)
    report = prepare(config(tmp_path / "corpus", tmp_path / "rows.tsv", **FIELDS))
    assert report is not None
    found = [pair for split in pairs_of(tmp_path / "corpus").values() for pair in split]
    assert sorted(found) == sorted([*rows, *more[:2]])
    assert "dropped    1 empty, 2 one-sided and 1 duplicate pairs" in capsys.readouterr().out
    # Where a pair goes depends on nothing but the pair.
    write_tsv(tmp_path / "fewer.tsv", rows[::2])
    prepare(config(tmp_path / "fewer", tmp_path / "fewer.tsv", **FIELDS))
    whole = pairs_of(tmp_path / "corpus")
    assert all(set(split) <= set(whole[name]) for name, split in pairs_of(tmp_path / "fewer").items())


def test_filters_and_near_duplicates_take_a_pair_as_one(tmp_path: Path) -> None:
    pytest.importorskip("rensa")
    text = " ".join(f"word{i}" for i in range(80))
    stop_words = " the be to of and that have with"
    good = [(f"{text} {i * 'x'}{stop_words}", f"{text} {i * 'y'} {stop_words} {i}") for i in range(2)]
    other = (" ".join(f"unlike{i}" for i in range(80)) + stop_words, " ".join(f"again{i}" for i in range(80)))
    short = (text + stop_words, "too short")
    write_tsv(tmp_path / "rows.tsv", [*good, (other[0], other[1] + stop_words), short])
    settings = {
        "near_duplicates": NearDuplicatesConfig(threshold=0.7),
        "tokenizer": TokenizerConfig(vocab_size=290),
        "filters": FiltersConfig(quality="gopher"),
    }
    report = prepare(config(tmp_path / "corpus", tmp_path / "rows.tsv", **FIELDS, **settings))
    assert report is not None
    assert report.cleaning.filtered == {"words": 1}
    assert report.near_duplicates_dropped == 1
    assert sum(split.documents for split in report.splits.values()) == 4


def test_what_gives_no_pairs_is_told(tmp_path: Path) -> None:
    rows = pairs(10)
    write_tsv(tmp_path / "rows.tsv", rows)
    output = tmp_path / "corpus"

    def mistake(**settings: object) -> str:
        with pytest.raises((DataError, ConfigError)) as error:
            prepare(
                decode(PrepareConfig, {"source": f"{tmp_path}/rows.tsv", "output": str(output), **settings})
            )
        return str(error.value)

    assert "no field fr; allowed: es, id, en; set target_field=…" in mistake(
        text_field="en", target_field="fr"
    )
    assert "no field text; allowed: es, id, en; set text_field=…" in mistake(target_field="es")
    assert "target_field: got 'en'; allowed: another name" in mistake(text_field="en", target_field="en")
    (tmp_path / "plain.txt").write_text("a text")
    assert "which have fields for both sides" in mistake(source=f"{tmp_path}/plain.txt", target_field="es")
    lines = {key: list(value) for key, value in write_lines(tmp_path, rows).items()}
    assert "target_source: got 1 files; allowed: 2" in mistake(**{**lines, "source": lines["source"] * 2})
    assert "target_field: got 'es'; allowed: null" in mistake(**lines, target_field="es")
    assert "not a local file" in mistake(**{**lines, "target_source": ["/no/such"]})
    with gzip.open(tmp_path / "texts.es.gz", "at") as file:
        file.write("\nmore\nand more")
    assert "texts.es.gz: got 12 lines; allowed: 10, one for each line of" in mistake(**lines)
    (tmp_path / "texts.es.gz").write_bytes(gzip.compress(b"a\xff\n" * 10))
    assert "texts.es.gz: got bytes that are not UTF-8: 0xff at byte 1" in mistake(**lines)
    assert not output.exists() or not (output / "manifest.json").exists()


def test_pairs_mix_with_pairs_alone(tmp_path: Path) -> None:
    write_tsv(tmp_path / "rows.tsv", pairs())
    prepare(config(tmp_path / "paired", tmp_path / "rows.tsv", **FIELDS))
    model = tmp_path / "paired" / "tokenizer.model"
    single = config(tmp_path / "single", tmp_path / "rows.tsv", text_field="en")
    prepare(
        decode(
            PrepareConfig,
            {
                "source": list(single.source),
                "output": str(single.output),
                "text_field": "en",
                "tokenizer": {"model": str(model)},
            },
        )
    )
    mixed = TokenDataConfig(path=str(tmp_path), mixture={"paired": 1.0, "single": 1.0})
    with pytest.raises(
        DataError, match="a corpus of single texts; allowed: what paired is, a corpus of pairs"
    ):
        open_corpora(mixed)
    lengths = np.load(tmp_path / "paired" / "train" / "lengths.npy")
    assert len(lengths) == Corpus.open(tmp_path / "paired").manifest.splits["train"].num_documents

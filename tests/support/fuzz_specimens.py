"""Small real files of every kind that is read, for the fuzzer to change; the same bytes at every call.

    corpus/ pairs/ mixture/    what prepare makes; cache/ the rows that best_fit was counted to make
    run/                       of two steps; import/ of another's model
    hf/NAME/                   Hugging Face folders; gguf/NAME.gguf; vocabularies/; tokenizers/
    sources/                   what prepare reads; images/

Paths in them are relative to the folder that holds them all, in which they are read.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.corpora import WORDS

SAVED_AT = "2026-01-01T00:00:00+00:00"
STEPS = 2
OVERRIDES = (
    *("model=gpt_tiny", "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2"),
    *("batch.global_size=4", "batch.micro_size=2", "batch.sequence_length=32", "data.path=corpus"),
    *("model.max_sequence_length=32", "data.packing=best_fit", "data.cache.dir=cache", "run.dir=run"),
    *("train.steps=4", "engine=local", "data.workers=0"),
)


def build(folder: Path) -> None:
    """Write all of them into `folder`, which becomes the working folder."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        _write_sources()
        _write_corpora()
        _write_run()
        _write_models()
        _write_images()
        # Times and numbers of files, which differ from copy to copy.
        stamps = json.loads(Path("corpus/.verified.json").read_text())
        Path("corpus/.verified.json").write_text(json.dumps({name: [1, 2, 3] for name in stamps}))


def texts(count: int = 60, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [f"{i}: " + " ".join(source.choices(WORDS, k=source.randint(3, 30))) + "." for i in range(count)]


# What prepare reads, and makes.


def _write_sources() -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder = Path("sources")
    folder.mkdir()
    lines = texts()
    (folder / "a.txt").write_text("\n\n".join(lines))
    (folder / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(lines).encode(), 6, mtime=0))
    objects = [json.dumps({"text": line, "number": i, "more": {"a": [1]}}) for i, line in enumerate(lines)]
    (folder / "a.jsonl").write_text("\n".join(objects) + "\n")
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(objects).encode(), 3))
    rows = [["number", "text"], *([str(i), f'{line}, "so"\nit goes'] for i, line in enumerate(lines))]
    with open(folder / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "a.tsv").write_text("en\tes\n" + "\n".join(f"{line}\t{line[::-1]}" for line in lines))
    table = {"text": pyarrow.array(lines), "number": pyarrow.array(range(len(lines)))}
    for name, options in {
        "plain": {"compression": "none", "use_dictionary": False},
        "packed": {"compression": "snappy", "row_group_size": 20},
    }.items():
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet", **options)
    members = {f"{i}.{e}": c for i, line in enumerate(lines[:5]) for e, c in _sample(line).items()}
    _write_tar(folder / "a.tar", members)


def _sample(line: str) -> dict[str, bytes]:
    return {"txt": line.encode(), "json": json.dumps({"text": line}).encode()}


def _write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _write_corpora() -> None:
    from llmtrain.prepare.config import PrepareConfig, SplitConfig
    from llmtrain.prepare.job import prepare
    from llmtrain.tokenizers.config import TokenizerConfig

    settings: dict[str, Any] = {
        "split": SplitConfig(0.2, 0.1),
        "workers": 1,
        "sample_tokens": 300,
        "tar_bytes": 4000,
    }
    for name, source, fields in (
        ("corpus", "a.jsonl", {}),
        ("pairs", "a.tsv", {"text_field": "en", "target_field": "es"}),
    ):
        tokenizer = TokenizerConfig(vocab_size=300)
        prepare(PrepareConfig((f"sources/{source}",), Path(name), tokenizer=tokenizer, **settings, **fields))
    tokens = np.array([5, 6, 7, 8], np.uint16)
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    _write_tar(Path("sources/tokens.tar"), {f"{i}.npy": buffer.getvalue() for i in range(4)})


# A run, and an import.


def _write_run() -> None:
    import yaml

    from llmtrain.checkpoint import store
    from llmtrain.config import encode
    from llmtrain.data.loader import Loader
    from llmtrain.data.streaming import open_stream, plan_timeline
    from llmtrain.data.trace import digest_of
    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.config import recorded
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose

    resolved = resolve(compose(OVERRIDES))
    config, corpora = resolved.config, resolved.corpora
    assert corpora is not None
    sources = config.objective.open(config.model, config.data, corpora, "train", config.batch.sequence_length)
    timeline = plan_timeline(config, sources, None, 0, print)
    stream = open_stream(config.data, sources, timeline, seed=config.seed)
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    engine = build_engine(config, resolved.layout, processes.pick_device("cpu"), objective, None)
    loader = Loader(stream, objective.collate, micro_size=2)
    for _, batch in zip(range(STEPS), loader.steps(0), strict=False):
        engine.train_step(batch.micro_batches, lr=0.001)
    data = {"kind": "tokens", "paths": {"": "corpus"}, "tokenizer_sha256": corpora.tokenizer_sha256}
    facts = {
        "model": encode(config.model),
        "config": recorded(config),
        "data": {**data, "train": stream.describe()},
        "timeline": timeline.encode(),
        "resumed_from": None,
        "started_from": None,
        "origin": None,
        "validation_loss": 5.5,
        "evaluation_owed": False,
        "trackers": {},
        "saved_at": SAVED_AT,
    }
    root = Path("run/checkpoints")
    for step in (1, STEPS):
        store.save(root, step, engine, facts, corpora.tokenizer_path)
    (root / "went_back.json").write_text(json.dumps({"to": "run/checkpoints/step-00000001"}))
    Path("run/config.yaml").write_text(yaml.safe_dump(recorded(config), sort_keys=False))
    Path("run/data.json").write_text(
        json.dumps({**data, "train": stream.describe(), "timeline": timeline.encode()}, indent=2)
    )
    # Never changed: what a user gives who resumes.
    Path("good").mkdir()
    shutil.copy("run/config.yaml", "good")
    told = {"command": ["llmtrain", "train"], "folder": ".", "python": "3.11", "packages": {"torch": "2.13"}}
    Path("run/environment.json").write_text(json.dumps(told, indent=2))
    lines = [
        {"step": step, "loss": 5.5 / step, "lr": 0.001, "data_digest": digest_of(stream, step)}
        for step in range(1, STEPS + 1)
    ]
    Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# Models of others.


def _write_models() -> None:
    import torch
    from safetensors.torch import load_file

    from llmtrain.commands import import_
    from llmtrain.interchange.huggingface import export_folder
    from llmtrain.models.bert.config import BertConfig
    from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
    from llmtrain.models.gpt.config import GPTConfig
    from llmtrain.models.registry import family_of
    from llmtrain.models.xlnet.config import XLNetConfig
    from llmtrain.nn.initialize import initialize
    from llmtrain.tokenizers.folder import load_tokenizer

    shape: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    gpt2 = GPTConfig(**shape, max_sequence_length=32)
    llama = replace(
        gpt2,
        **{"num_kv_heads": 1, "mlp_hidden_size": 32, "positions": "rope", "norm": "rmsnorm", "bias": False},
        **{"gated_mlp": True, "activation": "silu", "tie_embeddings": False},
    )
    t5 = Seq2SeqConfig(
        **shape,
        **{"norm": "rmsnorm", "norm_first": True, "positions": "relative", "bias": False, "start_id": 0},
        **{"scale_embedding": False, "scale_attention": False, "scale_logits": True, "eos_id": 1},
        **{"label_smoothing": 0.0, "activation": "relu", "mlp_hidden_size": 32},
    )
    bert = BertConfig(**shape, max_sequence_length=32)
    xlnet = XLNetConfig(**shape)
    for name, config in {"gpt2": gpt2, "llama": llama, "t5": t5, "bert": bert, "xlnet": xlnet}.items():
        model = family_of(config).build(config)
        initialize(model, 0)
        weights = {key: p.detach() for key, p in model.named_parameters()}
        many = {"file_bytes": 20_000} if name == "gpt2" else {}
        tokenizer = Path("corpus/tokenizer.model") if name in ("gpt2", "llama") else None
        export_folder(config, weights, tokenizer, Path("hf", name), dtype=torch.float32, **many)
        # As others' folders are: they do not say that we wrote them.
        settings = json.loads(Path("hf", name, "config.json").read_text())
        settings.pop("exported_by", None)
        Path("hf", name, "config.json").write_text(json.dumps(settings, indent=2))
    for name in ("gpt2", "llama"):
        Path("hf", name, "tokenizer.model").unlink()
    _write_tokenizers()
    for name, kind in {"bert": "wordpiece", "t5": "byte_level"}.items():
        for file in Path("tokenizers", kind).iterdir():
            shutil.copy(file, Path("hf", name))
    _write_gguf(load_file("hf/llama/model.safetensors"))
    import_.run({"source": "hf/llama", "output": "import", "tokenizer": None, "overwrite": False})
    manifest = Path("import/checkpoints/step-00000000/manifest.json")
    content = json.loads(manifest.read_text())
    content |= {"saved_at": SAVED_AT, "imported_from": "hf/llama"}
    manifest.write_text(json.dumps(content))
    fix_checkpoint(manifest.parent)
    bundle = load_tokenizer("hf/llama")
    bundle.save(Path("tokenizers"))


def fix_checkpoint(folder: Path) -> None:
    """Make manifest.json vouch for the files as they are."""
    from llmtrain import files

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        file = folder / entry["file"]
        if file.is_file():
            entry |= {"bytes": file.stat().st_size, "xxh3_128": files.checksum(file)}
    path.write_text(json.dumps({**manifest, "checksum": files.checksum_of_json(manifest)}))


def fix_corpus(changed: Path) -> None:
    """Have manifest.json vouch for the file that was changed, and for itself."""
    import xxhash

    from llmtrain.corpus.manifest import fingerprint_of
    from llmtrain.files import checksum_of_json

    folder = Path(changed.parts[0] if changed.parts[0] in ("corpus", "pairs") else "corpus")
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    if changed.name != "manifest.json":
        content = changed.read_bytes()
        xxh3, name = xxhash.xxh3_128_hexdigest(content), str(changed.relative_to(folder))
        if name == manifest["tokenizer"]["file"]:
            manifest["tokenizer"]["sha256"] = hashlib.sha256(content).hexdigest()
        for split in manifest["splits"].values():
            for key in ("index", "lengths"):
                if split.get(key) == name:
                    split[f"{key}_xxh3_128"] = xxh3
            for shard in split["shards"]:
                if shard["file"] == name:
                    shard |= {"xxh3_128": xxh3, "bytes": len(content)}
    shards = [shard["xxh3_128"] for split in manifest["splits"].values() for shard in split["shards"]]
    manifest["fingerprint"] = fingerprint_of(shards, manifest["tokenizer"]["sha256"])
    manifest["checksum"] = checksum_of_json(manifest)
    path.write_text(json.dumps(manifest))


def _write_tokenizers() -> None:
    """By hand: the library's trainers break ties anew in each process."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = Path("tokenizers")
    (folder / "wordpiece").mkdir(parents=True)
    (folder / "byte_level").mkdir()
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), *WORDS]
    (folder / "wordpiece/vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    (folder / "wordpiece/tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    )
    merges = ["t h", "th e", "Ġ the", "i n", "a n"]
    names = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (folder / "byte_level/vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "byte_level/merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "byte_level/tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 32})
    )


def _write_gguf(weights: Mapping[str, Any]) -> None:
    from tokenizers import Tokenizer

    from llmtrain.tokenizers.folder import load_tokenizer
    from tests.support.gguf_files import write_gguf

    Path("gguf").mkdir()
    settings = json.loads(Path("hf/llama/config.json").read_text())
    settings = {"head_dim": None, **settings, "rope_parameters": {"rope_theta": 10000.0}}
    model: Any = SimpleNamespace(config=SimpleNamespace(**settings), state_dict=lambda: weights)
    sentences = load_tokenizer("corpus/tokenizer.model").pieces()
    types = [2, 3, 3, 3, *(6 if piece.startswith("<0x") else 1 for piece in sentences[4:])]
    scores = [-float(i) for i in range(len(sentences))]
    write_gguf(Path("gguf/sentences.gguf"), model, "Q8_0", tokenizer=(sentences, scores, types))
    bpe = Tokenizer.from_str(load_tokenizer("tokenizers/byte_level").files["tokenizer.json"])
    write_gguf(Path("gguf/bytes.gguf"), model, "F16", tokenizer=bpe)


def _write_images() -> None:
    from PIL import Image

    folder = Path("images")
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    rows = "\n".join(
        ",".join(map(str, [*image.reshape(-1).tolist(), i % 10])) for i, image in enumerate(pixels)
    )
    (folder / "a.csv").write_text(rows + "\n")
    (folder / "a.csv.gz").write_bytes(gzip.compress(rows.encode(), 6, mtime=0))
    members: dict[str, bytes] = {}
    for i, image in enumerate(pixels):
        name, extension = [("PNG", "png"), ("JPEG", "jpg"), ("", "npy")][i % 3]
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, name) if name else np.save(buffer, image)
        members |= {f"{i}.{extension}": buffer.getvalue(), f"{i}.cls": str(i % 10).encode()}
    _write_tar(folder / "a.tar", members)

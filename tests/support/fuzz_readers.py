"""What the fuzzer reads: name → the files that it changes, and what llmtrain's verbs do with them.

All paths are relative to a working folder that holds a copy of what fuzz_specimens.py makes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.errors import UserError
from tests.support.clean_text import check_refusal
from tests.support.fuzz_specimens import fix_checkpoint, fix_corpus


@dataclass(frozen=True)
class Reader:
    files: Mapping[str, str]
    """What is changed: path → kind of mutation."""
    read: Callable[[Path], None]
    """Read all there is, given the path of what was changed. UserError is what a bad file deserves."""
    needs: tuple[str, ...] = ()
    """Specimens beside the top folders of `files`."""
    fix_up: Callable[[Path], None] = lambda path: None
    """Have the checksums of the folder vouch for what was changed, as an attacker would."""


SEQUENCE = 32
FEW_ROWS = 32


# Corpora.


def read_corpus(changed: Path) -> None:
    """As training, evaluation and `data show` do."""
    from llmtrain.corpus.config import CacheConfig, TokenDataConfig
    from llmtrain.corpus.corpora import open_corpora
    from llmtrain.corpus.corpus import Corpus
    from llmtrain.tokenizers.folder import load_tokenizer

    folder = changed.parts[0] if changed.parts[0] in ("corpus", "pairs") else "corpus"
    cache = Path("cache")
    _each(
        partial(_show, folder, "concat", {}),
        partial(_show, folder, "best_fit", {"kind": "span_corruption"}),
        lambda: load_tokenizer(Corpus.open(folder).tokenizer_path),
        lambda: Corpus.open(folder, "checksum"),
        lambda: [
            _read_split(corpus.split(name), cache)
            for corpus in [Corpus.open(folder)]
            for name in corpus.manifest.splits
        ],
        lambda: [
            _read_split(split, cache)
            for corpora in [
                open_corpora(TokenDataConfig(path=folder, on_bad_tar="skip", cache=CacheConfig(dir=cache)))
            ]
            for split in corpora.splits("train").values()
        ],
    )


def _each(*works: Callable[[], object]) -> None:
    """Do all of these, whatever is refused; raise the first refusal."""
    first: UserError | None = None
    for work in works:
        try:
            work()
        except UserError as error:
            check_refusal(error)
            first = first or error
    if first is not None:
        raise first


def _read_split(split: Any, cache: Path) -> None:
    from llmtrain.data.datasets.base import TokenSequences

    def rows(packing: Any) -> None:
        dataset = TokenSequences(
            split, SEQUENCE, packing=packing, overlap=4 * (packing != "concat"), cache=cache
        )
        count = len(dataset)
        chosen = np.unique([*range(min(FEW_ROWS, count)), *range(max(0, count - FEW_ROWS), count)])
        dataset.get(chosen)
        for row in chosen[:4].tolist():
            dataset.where(row)
        dataset.describe()

    _each(
        lambda: rows("concat"),
        lambda: rows("best_fit"),
        lambda: split.read(0, min(split.num_tokens, 5000)),
        split.document_lengths,
        lambda: [split.lengths_of(shard) for shard in range(min(8, len(split.tar_names)))],
        lambda: split.find_bad(range(min(8, len(split.tar_names)))),
    )


def _show(path: str, packing: str, objective: Mapping[str, Any]) -> None:
    from llmtrain.commands import data_show

    if path == "pairs":
        objective, packing = {"kind": "seq2seq"}, "concat"
    data = {"kind": "tokens", "path": path, "packing": packing, "workers": 0, "cache": {"dir": "cache"}}
    data_show.show(
        {
            "run": None,
            "step": None,
            "data": data,
            "sequence_length": 64,
            "seed": 0,
            "max_samples": 2,
            "objective": objective or None,
        }
    )


def read_rows_cache(changed: Path) -> None:
    from llmtrain.corpus.corpus import Corpus
    from llmtrain.data.datasets.base import TokenSequences

    split = Corpus.open("corpus").split("train")
    rows = TokenSequences(split, SEQUENCE, packing="best_fit", cache=Path("cache"))
    assert len(rows) == len(TokenSequences(split, SEQUENCE, packing="best_fit")), "other rows"
    rows.get(np.arange(min(len(rows), FEW_ROWS)))
    rows.get(np.arange(max(0, len(rows) - FEW_ROWS), len(rows)))


# Runs and checkpoints.


def read_checkpoint(changed: Path) -> None:
    """As `checkpoint verify` and `show`, evaluation, resuming and `train model=pretrained` do."""
    from llmtrain.commands import checkpoint as verbs
    from llmtrain.interchange.trained import load_trained

    folder = changed.parent

    def use() -> None:
        import torch

        trained = load_trained(folder)
        trained.build(torch.device("cpu"))
        trained.tokenizer().encode("the film")

    _each(
        lambda: verbs.verify({"path": str(folder)}),
        lambda: verbs.show({"path": str(folder)}),
        lambda: verbs.diff({"path": str(folder), "other": "run/checkpoints/step-00000001"}),
        use,
        *([] if folder.parts[0] == "import" else [partial(_resume, "auto"), partial(_restore, folder)]),
    )


def _restore(folder: Path) -> None:
    """Weights and optimizer state into what an engine holds."""
    import torch

    from llmtrain.checkpoint.reader import Checkpoint
    from tests.support.owners import Owner

    good = Checkpoint.open(Path("run/checkpoints/step-00000001"))
    owner = Owner({name: torch.zeros(weight.shape) for name, weight in good.weights().items()})
    owner.load_scaler_state = lambda state: None  # type: ignore[method-assign]
    Checkpoint.open(folder).restore(owner)  # type: ignore[arg-type]


def _resume(resume: str) -> None:
    import yaml

    from llmtrain.config import decode
    from llmtrain.corpus.manifest import parse_manifest
    from llmtrain.data.streaming import plan_timeline
    from llmtrain.objectives.reading import open_data
    from llmtrain.train.config import TrainConfig
    from llmtrain.train.resolve import VARIANTS
    from llmtrain.train.resume import find_resume

    mapping = yaml.safe_load(GOOD_CONFIG.read_text())
    mapping["checkpoint"]["resume"] = resume
    config: Any = decode(TrainConfig, mapping, VARIANTS)
    manifest = parse_manifest(Path("corpus/manifest.json").read_bytes(), "corpus")
    facts = {"tokenizer_sha256": manifest.tokenizer.sha256}
    resumed = find_resume(config, facts, _say)
    if resumed is not None:
        corpora = open_data(config.objective, config.data)
        sources = config.objective.open(config.model, config.data, corpora, "train", SEQUENCE)
        plan_timeline(config, sources, resumed.timeline, resumed.checkpoint.step, _say)
        resumed.note_evaluation({"validation_loss": 1.0})


def _say(text: str) -> None:
    print(text, file=sys.stderr)


GOOD_CONFIG = Path("good/config.yaml")
"""That of the run, never changed."""


def read_run(changed: Path) -> None:
    """As `data trace`, `data digest`, `data show` and resuming do."""
    from llmtrain.commands import data, data_show
    from llmtrain.track.jsonl import JsonlTracker

    def show() -> None:
        section = {"kind": "tokens", "path": None, "sources": {}}
        data_show.show({"run": "run", "step": "1:2", "data": section, "max_samples": 3})

    _each(
        lambda: data.trace({"run": "run", "step": "1:2"}),
        lambda: data.digest({"run": "run"}),
        show,
        lambda: JsonlTracker(Path("run/metrics.jsonl"), 1).close(False),
    )


def read_went_back(changed: Path) -> None:
    _each(partial(_resume, "auto"), partial(_resume, "run/checkpoints/step-00000001"))


# Models of others.


def read_foreign(changed: Path) -> None:
    """As `import`, and `evaluate` and `generate` on the folder itself."""
    from llmtrain.commands import import_
    from llmtrain.generation.config import GenerateConfig
    from llmtrain.generation.settings import resolved_for
    from llmtrain.interchange.trained import load_trained

    source = changed if changed.suffix == ".gguf" else changed.parent

    def use() -> None:
        trained = load_trained(source)
        resolved_for(trained, GenerateConfig(), 4)
        if trained.tokenizer_path is not None:
            _use_tokenizer(trained.tokenizer())

    works: list[Callable[[], object]] = [
        lambda: import_.run({"source": str(source), "output": "out", "tokenizer": None, "overwrite": False})
    ]
    _each(*works, *([use] if source.is_dir() else []))


def read_tokenizer(changed: Path) -> None:
    from llmtrain.interchange.huggingface_tokenizer import tokenizer_files
    from llmtrain.tokenizers.folder import load_tokenizer

    tokenizer = load_tokenizer(changed if changed.suffix == ".model" else changed.parent)
    _use_tokenizer(tokenizer)
    tokenizer_files(tokenizer, 32, str(changed))


def _use_tokenizer(tokenizer: Any) -> None:
    ids = tokenizer.encode("The film — 東京, don't.\n")
    check = [tokenizer.decode(ids), tokenizer.pieces(), tokenizer.typed_specials(), tokenizer.is_lossless]
    assert check
    tokenizer.encode_arrays(["a b", "", "the film"])
    for facts in (tokenizer.word_starts, tokenizer.token_byte_lengths, tokenizer.sentence_ends):
        facts()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))


# What prepare reads.


def read_source(changed: Path) -> None:
    """As prepare's first stage does; what comes behind it sees clean text alone."""
    from llmtrain.prepare import tasks
    from llmtrain.prepare.config import FiltersConfig
    from llmtrain.prepare.decompress import refuse_long_windows
    from llmtrain.prepare.sources import find_files, plan_units
    from llmtrain.prepare.tars import Vocabulary

    fields = ("en", "es") if changed.suffix == ".tsv" else ("text",)
    vocabulary = Vocabulary(300, 2) if changed.name == "tokens.tar" else None
    files, _ = find_files([str(changed)])
    refuse_long_windows(files, 1)
    settings = (fields, "auto", "auto", "nfc", vocabulary, FiltersConfig())
    with tempfile.TemporaryDirectory() as folder:
        for number, unit in enumerate(plan_units(files, "auto")):
            tasks.read_unit(number, unit, Path(folder), *settings)
            assert tasks.finished_unit(Path(folder, f"{number:06d}")) is not None


def read_images(changed: Path) -> None:
    from llmtrain.data.datasets.images import Images

    images = Images.open(str(changed), "train")
    images.get(np.arange(len(images)))


# The table.

_TAR = "train/train-000001.tar"
_MODELS = ("gpt2", "llama", "t5", "bert", "xlnet")
_CHECKPOINTS = ("run/checkpoints/step-00000002", "import/checkpoints/step-00000000")
_TENSORS = ("rank-00000.safetensors", "weights-00001.safetensors")
_RUN_NEEDS = ("run", "corpus", "cache", "good")


def _of_corpora(name: str, kind: str) -> Reader:
    files = {f"{corpus}/{name}": kind for corpus in ("corpus", "pairs")}
    return Reader(files, read_corpus, ("cache",), fix_corpus)


def _of_checkpoints(files: Mapping[str, str]) -> Reader:
    return Reader(files, read_checkpoint, _RUN_NEEDS, lambda path: fix_checkpoint(path.parent))


def _of_models(files: Mapping[str, str]) -> Reader:
    return Reader({f"hf/{name}": kind for name, kind in files.items()}, read_foreign)


def _of_sources(**files: str) -> Reader:
    return Reader({f"sources/{name.replace('_', '.')}": kind for name, kind in files.items()}, read_source)


READERS: dict[str, Reader] = {
    "corpus_manifest": _of_corpora("manifest.json", "json"),
    "corpus_index": _of_corpora("train/index.npy", "npy"),
    "corpus_lengths": _of_corpora("train/lengths.npy", "npy"),
    "corpus_shard": _of_corpora(_TAR, "tar"),
    "corpus_tokenizer": _of_corpora("tokenizer.model", "sentencepiece"),
    "corpus_stamps": Reader({"corpus/.verified.json": "json"}, read_corpus, ("cache",)),
    "rows_cache": Reader({"cache/rows/*.counts": "bytes"}, read_rows_cache, ("corpus",)),
    "checkpoint_manifest": _of_checkpoints({f"{folder}/manifest.json": "json" for folder in _CHECKPOINTS}),
    "checkpoint_tensors": _of_checkpoints(
        {f"{f}/{name}": "safetensors" for f, name in zip(_CHECKPOINTS, _TENSORS, strict=True)}
    ),
    "checkpoint_tokenizer": _of_checkpoints(
        {
            f"{_CHECKPOINTS[0]}/tokenizer.model": "sentencepiece",
            f"{_CHECKPOINTS[1]}/tokenizer.bundle.json": "json",
        }
    ),
    "run_metrics": Reader({"run/metrics.jsonl": "jsonl"}, read_run, _RUN_NEEDS),
    "run_config": Reader({"run/config.yaml": "yaml"}, read_run, _RUN_NEEDS),
    "run_data": Reader({"run/data.json": "json"}, read_run, _RUN_NEEDS),
    "run_environment": Reader({"run/environment.json": "json"}, read_run, _RUN_NEEDS),
    "run_went_back": Reader({"run/checkpoints/went_back.json": "json"}, read_went_back, _RUN_NEEDS),
    "model_config": _of_models({f"{name}/config.json": "json" for name in _MODELS}),
    "model_generation": _of_models({f"{name}/generation_config.json": "json" for name in ("gpt2", "t5")}),
    "model_tokenizer": _of_models({"gpt2/tokenizer.json": "json", "llama/tokenizer.json": "json"}),
    "model_tokenizer_config": _of_models(
        {"gpt2/tokenizer_config.json": "json", "t5/tokenizer_config.json": "json"}
    ),
    "model_index": _of_models({"gpt2/model.safetensors.index.json": "json"}),
    "model_tensors": _of_models(
        {f"{name}/model.safetensors": "safetensors" for name in _MODELS[1:]}
        | {"gpt2/model-00003-of-00005.safetensors": "safetensors"}
    ),
    "gguf": Reader({"gguf/sentences.gguf": "bytes", "gguf/bytes.gguf": "bytes"}, read_foreign),
    "sentencepiece": Reader({"corpus/tokenizer.model": "sentencepiece"}, read_tokenizer),
    "bundle": Reader({"tokenizers/tokenizer.bundle.json": "json"}, read_tokenizer),
    "wordpiece": Reader(
        {
            f"tokenizers/wordpiece/{n}": k
            for n, k in {"vocab.txt": "bytes", "tokenizer_config.json": "json"}.items()
        },
        read_tokenizer,
    ),
    "byte_level": Reader(
        {"tokenizers/byte_level/vocab.json": "json", "tokenizers/byte_level/merges.txt": "bytes"},
        read_tokenizer,
    ),
    "source_text": _of_sources(a_txt="bytes", a_txt_gz="gz"),
    "source_json": _of_sources(a_jsonl="jsonl", a_jsonl_zst="zst"),
    "source_table": _of_sources(a_csv="bytes", a_tsv="bytes"),
    "source_parquet": _of_sources(plain_parquet="bytes", packed_parquet="bytes"),
    "source_tar": _of_sources(a_tar="tar", tokens_tar="tar"),
    "images_table": Reader({"images/a.csv": "bytes", "images/a.csv.gz": "gz"}, read_images),
    "images_tar": Reader({"images/a.tar": "tar"}, read_images),
}

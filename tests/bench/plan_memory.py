"""The plan's forecast of each rank's memory against the measured peak, over cells of the parity matrix's
axes.

    python -m tests.bench.plan_memory [--only WORD] [--results FILE.json] [--phases]

Each cell is a real run of gloo ranks on the CPU: its first two steps, with models large enough that tensors
outweigh all else. tests/support/peak_memory.py says how it is measured. Exits with 1 where the median error
is over 5 % or the worst over 15 %. `--results` keeps what was measured, and goes on from there; `--phases`
prints when a rank held how much.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from tests.support import ranks
from tests.support.corpora import prepare_small_corpus
from tests.support.peak_memory import Held, forecasts, keep_no_freed_blocks, measure, warm_up
from tests.support.training import compose, train

MEDIAN, WORST = 0.05, 0.15
MIB = 2**20


class Cell(NamedTuple):
    """A run."""

    name: str
    size: int
    """Processes."""
    overrides: tuple[str, ...]


_BATCH = (
    "batch.global_size=4 batch.micro_size=2 batch.sequence_length=128 data.document_mask=false "
    "checkpoint.asynchronous=false"
)
_SIZE = "model.hidden_size=512 model.num_layers=4 model.num_heads=8 model.vocab_size=8192"
FAMILIES = {
    "GPT": f"model=gpt_tiny {_SIZE}",
    "Llama": f"model=llama_tiny {_SIZE} model.num_kv_heads=4 model.mlp_hidden_size=1408",
    "BERT": f"model=bert_tiny objective=mlm {_SIZE}",
    "XLNet": f"model=xlnet_tiny {_SIZE}",
    "T5": f"model=t5_tiny {_SIZE} model.head_dim=64 model.mlp_hidden_size=2048 objective.num_sentinels=20",
    "BART": f"model=bart_tiny {_SIZE} model.mlp_hidden_size=2048",
}
AXES = """
1 GPT
1 GPT       batch.micro_size=4
1 GPT       batch.micro_size=4 recompute=full
1 GPT       batch.micro_size=4 recompute=selective
1 GPT       batch.micro_size=1 batch.global_size=4
1 GPT       model.dropout=0.1
1 GPT       precision=bf16
1 GPT       precision=bf16 batch.micro_size=4
1 GPT       engine=deepspeed
1 GPT       engine=deepspeed parallel.zero=1 precision=bf16
1 GPT       model.tie_embeddings=false
1 GPT       model.vocab_size=32768
1 GPT       optimizer=sgd
1 GPT       checkpoint.asynchronous=true
1 GPT       method=lora
1 GPT       train.freeze=[embedding.*,blocks.0.*,blocks.1.*]
1 Llama
1 Llama     precision=bf16
1 BERT
1 BERT      recompute=full batch.micro_size=4
1 XLNet
1 XLNet     recompute=full batch.micro_size=4
1 T5
1 T5        recompute=full batch.micro_size=4
1 BART
2 GPT       batch.global_size=4
2 GPT       batch.global_size=8
2 GPT       parallel.zero=1
2 GPT       parallel.zero=1 batch.global_size=8
2 GPT       parallel.zero=2
2 GPT       parallel.zero=3
2 GPT       parallel.zero=1 precision=bf16
2 GPT       parallel.zero=2 precision=bf16
2 GPT       parallel.zero=2 checkpoint.asynchronous=true
2 GPT       parallel.zero=3 precision=bf16
2 GPT       parallel.zero=2 precision=bf16 batch.global_size=8
2 GPT       parallel.zero=3 precision=bf16 recompute=full
2 GPT       parallel.zero=2 parallel.offload_optimizer=cpu
2 GPT       parallel.zero=3 parallel.offload_optimizer=cpu
2 GPT       parallel.tensor=2
2 GPT       parallel.tensor=2 precision=bf16
2 GPT       parallel.tensor=2 parallel.tensor_sequence=true recompute=selective
2 GPT       parallel.tensor=2 parallel.zero=1
2 GPT       parallel.pipeline=2 parallel.zero=1
2 GPT       parallel.pipeline=2 optimizer.max_grad_norm=0
2 GPT       parallel.pipeline=2 parallel.zero=1 precision=bf16 batch.micro_size=1
2 GPT       parallel.sequence=2
2 GPT       parallel.sequence=2 parallel.zero=2 precision=bf16
2 GPT       parallel.sequence=2 parallel.zero=3
2 GPT       method=lora parallel.zero=2
2 GPT       train.freeze=[embedding.*,blocks.0.*,blocks.1.*] parallel.zero=3
2 Llama     parallel.tensor=2
2 Llama     parallel.zero=3 precision=bf16
2 BERT      parallel.zero=2
2 BERT      parallel.tensor=2
2 BERT      parallel.pipeline=2 parallel.zero=1
2 XLNet     parallel.zero=3
2 XLNet     parallel.tensor=2
2 XLNet     parallel.pipeline=2 parallel.zero=1
2 T5
2 T5        parallel.zero=3 precision=bf16
2 T5        parallel.tensor=2
2 T5        parallel.pipeline=2 parallel.zero=1
2 BART      parallel.tensor=2
2 BART      parallel.zero=1
4 GPT       parallel.tensor=2 parallel.zero=2
4 GPT       parallel.tensor=2 parallel.pipeline=2 parallel.zero=1
4 GPT       parallel.zero=3 batch.micro_size=1
4 GPT       parallel.tensor=2 parallel.sequence=2 parallel.zero=1
"""


def cells() -> Iterator[Cell]:
    """The table's rows; a key given twice has its last value."""
    for line in AXES.strip().splitlines():
        size, family, *own = line.split()
        words = dict(w.split("=", 1) for w in [*FAMILIES[family].split(), *_BATCH.split(), *own])
        yield Cell(" ".join((family, *own)), int(size), tuple(f"{k}={v}" for k, v in words.items()))


def on_corpus(overrides: tuple[str, ...], corpus: Path) -> tuple[str, ...]:
    """The overrides with the corpus, and, where an adaptation needs one, a model that was trained for a
    step."""
    found = (*overrides, f"data.path={corpus}")
    if not any(word.startswith("method=") for word in overrides):
        return found
    trained = corpus / "trained"
    of_model = tuple(word for word in found if word.startswith(("model", "batch", "data")))
    if not trained.exists():
        ranks.run(1, keep_no_freed_blocks)
        train(1, of_model, 1, save_to=trained)
    others = (word for word in found if not word.startswith("model"))
    return ("model=pretrained", f"model.path={trained / 'step-00000001'}", *others)


def row(key: str, rank: int, forecast: int, most: int) -> str:
    return f"{key:<74} {rank:>4} {forecast / MIB:>9.1f} {most / MIB:>9.1f} {forecast / most - 1:>+7.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="cells whose line has this text")
    parser.add_argument("--results", type=Path, help="file of what was measured, by cell")
    parser.add_argument("--phases", action="store_true")
    options = parser.parse_args()
    known = json.loads(options.results.read_text()) if options.results and options.results.exists() else {}
    errors: list[float] = []
    warm = 0
    print(f"{'ranks, cell':<74} {'rank':>4} {'forecast':>9} {'measured':>9} {'error':>7}   MiB")
    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare_small_corpus(Path(folder))
        chosen = [
            cell for cell in cells() if options.only is None or options.only in f"{cell.size} {cell.name}"
        ]
        for cell in chosen:
            key = f"{cell.size} {cell.name}"
            if key not in known and warm != cell.size:
                ranks.run(cell.size, warm_up, str(corpus))
                warm = cell.size
            mapping = compose(on_corpus(cell.overrides, corpus))
            if key in known:
                held = [Held(*fields) for fields in known[key]]
            else:
                held = ranks.run(cell.size, measure, mapping, options.phases)
            if options.results:
                known[key] = held
                options.results.write_text(json.dumps(known))
            for rank, (terms, own) in enumerate(zip(forecasts(mapping, cell.size), held, strict=True)):
                forecast = sum(terms.values())
                errors.append(abs(forecast / own.most - 1))
                print(row(key, rank, forecast, own.most), flush=True)
                if options.phases:
                    for sizes in (terms, own.phases):
                        print("    " + ", ".join(f"{n} {s / MIB:.1f}" for n, s in sizes.items()), flush=True)
    middle, worst = median(errors), max(errors)
    print(f"{len(chosen)} cells, {len(errors)} ranks: median error {middle:.1%}, worst {worst:.1%}")
    sys.exit(middle > MEDIAN or worst > WORST)


if __name__ == "__main__":
    main()

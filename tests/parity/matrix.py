"""The parity matrix: what is run, and what it is held to; README.md beside it shows its table.

    python -m tests.parity.matrix           # run every cell and print the table
    python -m tests.parity.matrix --write   # and put it into README.md

The suite runs about a quarter of it, another part after each commit (see part_of_matrix); all of it with
`pytest --whole-matrix tests/parity/test_matrix.py`.

Each cell trains the same tiny model on the same samples as one plain fp32 process does, and compares the
losses and gradient norms of every step, the validation loss, and the weights after the last one.

Tolerances. In fp32 the same numbers are added in another order: a loss near 6 moves by some 1e-7 relative,
and a few steps let that drift. 1e-5 for losses and 1e-4 for gradient norms leave a hundredfold room, and yet
show small mistakes: weight decay left out of matrices moved the losses by 2e-5, dropout left on in
evaluation by 2e-4, parts of a sequence taken for copies by 4e-3. Weights are held to 1 % of the way that
training moved them, as a whole: single parameters whose gradient is zero but for rounding (a key's bias) go
where rounding leads
them. bf16 keeps three digits, so only nearness is asked of it there.

ReLU bounds how long fp32 can hold this: a unit whose input is 0 but for rounding learns in one run and not
in the other, on one processor and not on the next. One such unit moved the norm of T5's first step by 5e-4,
where GELU stayed within 1e-7. T5 and the Transformer have GELU here, and ReLU in cells with a tolerance of
their own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np

from tests.support.corpora import prepare_small_corpus, prepare_small_pairs
from tests.support.training import TINY_GPT, Trace, train

STEPS = 4
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- parity table: begin -->", "<!-- parity table: end -->"

_SIZE = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "batch.global_size=8",
    "batch.micro_size=2",
    "batch.sequence_length=32",
)
_HEADS = (*_SIZE, "model.num_heads=4")
_LLAMA = ("model=llama_tiny", *_HEADS, "model.num_kv_heads=2", "model.mlp_hidden_size=48")
FAMILIES = {
    "GPT-2 form": TINY_GPT,
    "Llama form": _LLAMA,
    "Qwen 3 form": (
        *_LLAMA,
        "model.head_dim=16",
        "model.qk_norm=true",
        "model.qkv_bias=true",
        "model.sliding_window=12",
        "model.no_rope_layers=[1]",
    ),
    "Llama form, dynamic": (
        *_LLAMA,
        "model.head_dim=16",
        "model.partial_rotary_factor=0.5",
        "model.rope_scaling.kind=dynamic",
        "model.rope_scaling.original_max_sequence_length=8",
        "model.qkv_bias=true",
        "model.output_bias=true",
    ),
    "Gemma form": (
        *_LLAMA,
        "model.head_dim=16",
        "model.norm_place=both",
        "model.norm_adds_one=true",
        "model.qk_norm=true",
        "model.scale_embedding=true",
        "model.sliding_window=12",
        "model.full_attention_layers=[1]",
        "model.local_rope_theta=1000",
        "model.query_pre_attn_scalar=24",
        "model.attention_softcap=5",
        "model.logit_softcap=8",
        "model.tie_embeddings=true",
    ),
    "OLMo 2 form": (*_LLAMA, "model.norm_place=after", "model.qk_norm=true", "model.qk_norm_over=all_heads"),
    "BERT": ("model=bert_tiny", *_HEADS),
    "XLNet": ("model=xlnet_tiny", *_HEADS),
    "Transformer": (
        "model=transformer_tiny",
        *_HEADS,
        "model.mlp_hidden_size=48",
        "batch.sequence_length=48",
        "objective.target_length=40",
        "model.activation=gelu",
    ),
    "T5": (
        "model=t5_tiny",
        *_HEADS,
        "model.head_dim=16",
        "model.mlp_hidden_size=48",
        "objective.num_sentinels=20",
        "model.activation=gelu",
    ),
    "BART": ("model=bart_tiny", *_HEADS, "model.mlp_hidden_size=48"),
    "LSTM": ("model=lstm", *_SIZE),
}


@dataclass(frozen=True)
class Tolerance:
    loss: float
    """Relative, of each step's loss and of the validation loss."""
    norm: float
    """Relative, of each step's gradient norm."""
    update: float
    """Distance of the weights, as a share of the way that training moved them."""


TOLERANCES = {
    "fp32": Tolerance(1e-5, 1e-4, 0.01),
    "fp32, ReLU": Tolerance(1e-4, 1e-2, 0.05),
    "bf16": Tolerance(5e-3, 5e-2, 0.25),
}
RELU = ("model.activation=relu",)


@dataclass(frozen=True)
class Cell:
    """One combination; every process that other axes leave is data-parallel."""

    ranks: int
    family: str = "GPT-2 form"
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1
    zero: int = 0
    engine: str = "auto"
    tensor_sequence: bool = False
    recompute: str = "none"
    precision: str = "fp32"
    micro: int = 2
    clip: float = 1.0
    dropout: float = 0.1
    model: tuple[str, ...] = ()
    """Changes of the model, which the plain process makes too."""
    balance: str = "parameters"

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES["fp32, ReLU" if self.model == RELU else self.precision]

    @property
    def data(self) -> int:
        return self.ranks // (self.tensor * self.pipeline * self.sequence)

    def plain(self, corpus: Path) -> tuple[str, ...]:
        """What one plain process is told."""
        return (
            *FAMILIES[self.family],
            f"data.path={corpus}",
            "train.steps=20",
            "optimizer.lr=3e-3",
            "seed=7",
            f"optimizer.max_grad_norm={self.clip}",
            f"model.dropout={self.dropout}",
            *self.model,
        )

    def overrides(self, corpus: Path) -> tuple[str, ...]:
        """What the cell's processes are told."""
        return (
            *self.plain(corpus),
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={self.sequence}",
            f"parallel.zero={self.zero}",
            f"parallel.tensor_sequence={str(self.tensor_sequence).lower()}",
            f"parallel.balance={self.balance}",
            f"recompute={self.recompute}",
            f"precision={self.precision}",
            f"engine={self.engine}",
            f"batch.micro_size={self.micro}",
        )

    @property
    def id(self) -> str:
        return "-".join(str(part) for part in self.row()).replace(" ", "")

    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        others = [change.removeprefix("model.") for change in self.model]
        others += ["tensor_sequence"] if self.tensor_sequence else []
        others += [f"balance={self.balance}"] if self.balance != "parameters" else []
        others += [f"engine={self.engine}"] if self.engine != "auto" else []
        others += ["no clipping"] if self.clip == 0 else []
        others += ["no dropout"] if self.dropout == 0 else []
        return (
            self.family,
            str(self.ranks),
            f"{self.data} · {self.tensor} · {self.pipeline} · {self.sequence}",
            str(self.zero),
            self.recompute,
            str(8 // (self.data * self.micro)),
            self.precision,
            ", ".join(others),
        )


LLAMA, QWEN3, BERT, XLNET, LSTM = "Llama form", "Qwen 3 form", "BERT", "XLNet", "LSTM"
GEMMA, OLMO2, DYNAMIC = "Gemma form", "OLMo 2 form", "Llama form, dynamic"
TRANSFORMER, T5, BART = "Transformer", "T5", "BART"
PACKED, SEGMENTS = ("objective=mlm",), ("model.has_segments=true",)
UNEVEN, UNTIED = ("model.vocab_size=323",), ("model.tie_embeddings=false",)
CELLS = (
    *[Cell(1, zero=zero, engine="deepspeed") for zero in (0, 1, 2, 3)],
    *[Cell(1, recompute=mode) for mode in ("selective", "full", "offload")],
    Cell(1, LLAMA, recompute="selective"),
    *[Cell(1, BERT, recompute=mode) for mode in ("selective", "full", "offload")],
    *[Cell(1, XLNET, recompute=mode) for mode in ("selective", "full", "offload")],
    *[Cell(1, T5, recompute=mode) for mode in ("selective", "full", "offload")],
    *[Cell(1, BART, recompute=mode) for mode in ("selective", "offload")],
    Cell(1, TRANSFORMER, recompute="full"),
    Cell(1, LSTM, micro=4),
    # two ranks
    Cell(2),
    *[Cell(2, zero=zero) for zero in (1, 2, 3)],
    Cell(2, zero=3, recompute="full"),
    Cell(2, zero=2, clip=0.0, micro=4),
    Cell(2, tensor=2),
    Cell(2, tensor=2, model=UNEVEN),
    Cell(2, tensor=2, model=UNTIED, clip=0.0),
    Cell(2, tensor=2, tensor_sequence=True, model=UNEVEN),
    Cell(2, tensor=2, zero=1),
    Cell(2, tensor=2, recompute="selective"),
    Cell(2, pipeline=2, zero=1),
    Cell(2, pipeline=2, clip=0.0),
    Cell(2, pipeline=2, zero=1, model=UNTIED, balance="time"),
    Cell(2, pipeline=2, zero=1, recompute="offload", micro=1),
    Cell(2, sequence=2),
    *[Cell(2, sequence=2, zero=zero) for zero in (1, 2, 3)],
    Cell(2, sequence=2, recompute="full"),
    Cell(2, LLAMA, zero=3),
    Cell(2, LLAMA, tensor=2, model=UNEVEN),
    Cell(2, LLAMA, tensor=2, tensor_sequence=True, recompute="full"),
    Cell(2, LLAMA, pipeline=2, zero=1),
    Cell(2, LLAMA, sequence=2, zero=2),
    Cell(2, QWEN3, zero=3),
    Cell(2, QWEN3, tensor=2),
    Cell(2, QWEN3, tensor=2, tensor_sequence=True, recompute="selective"),
    Cell(2, QWEN3, pipeline=2, zero=1),
    Cell(2, QWEN3, sequence=2, zero=2),
    Cell(2, DYNAMIC, zero=3),
    Cell(2, DYNAMIC, tensor=2),
    Cell(2, DYNAMIC, tensor=2, tensor_sequence=True, recompute="selective"),
    Cell(2, DYNAMIC, pipeline=2, zero=1),
    Cell(2, GEMMA, zero=3, recompute="full"),
    Cell(2, GEMMA, tensor=2, model=UNEVEN),
    Cell(2, GEMMA, tensor=2, tensor_sequence=True, recompute="selective", dropout=0.0),
    Cell(2, GEMMA, pipeline=2, zero=1),
    Cell(2, GEMMA, sequence=2, zero=2),
    Cell(2, OLMO2, zero=3),
    Cell(2, OLMO2, tensor=2),
    Cell(2, OLMO2, tensor=2, tensor_sequence=True, recompute="selective"),
    Cell(2, OLMO2, sequence=2, zero=2),
    *[Cell(2, BERT, zero=zero) for zero in (0, 1, 2, 3)],
    Cell(2, BERT, tensor=2),
    Cell(2, BERT, tensor=2, model=PACKED, recompute="selective"),
    Cell(2, BERT, pipeline=2, zero=1),
    Cell(2, BERT, pipeline=2, zero=1, model=PACKED, micro=1),
    Cell(2, BERT, zero=3, model=PACKED, recompute="full"),
    *[Cell(2, XLNET, zero=zero) for zero in (0, 3)],
    Cell(2, XLNET, tensor=2),
    Cell(2, XLNET, tensor=2, model=SEGMENTS, recompute="selective"),
    Cell(2, XLNET, pipeline=2, zero=1),
    Cell(2, XLNET, pipeline=2, zero=1, model=SEGMENTS, recompute="offload", micro=1),
    Cell(2, XLNET, zero=3, model=SEGMENTS, recompute="full"),
    *[Cell(2, TRANSFORMER, zero=zero) for zero in (0, 3)],
    Cell(2, TRANSFORMER, tensor=2),
    Cell(2, TRANSFORMER, pipeline=2, zero=1),
    *[Cell(2, family, tensor=2, model=RELU) for family in (TRANSFORMER, T5)],
    *[Cell(2, T5, zero=zero) for zero in (0, 1, 2, 3)],
    Cell(2, T5, tensor=2, model=("model.vocab_size=343",)),
    Cell(2, T5, tensor=2, model=UNTIED, recompute="selective"),
    Cell(2, T5, pipeline=2, zero=1, balance="time"),
    Cell(2, T5, pipeline=2, zero=1, recompute="offload", micro=1),
    Cell(2, BART, zero=3, recompute="full"),
    Cell(2, BART, tensor=2),
    Cell(2, BART, pipeline=2, zero=1),
    *[Cell(2, LSTM, zero=zero) for zero in (0, 1, 2, 3)],
    *[Cell(2, zero=zero, precision="bf16") for zero in (0, 1, 2, 3)],
    Cell(2, tensor=2, zero=1, precision="bf16"),
    Cell(2, pipeline=2, zero=1, precision="bf16"),
    Cell(2, sequence=2, zero=2, precision="bf16"),
    # four ranks
    Cell(4, micro=1),
    Cell(4, zero=3, micro=1, dropout=0.0),
    *[Cell(4, tensor=2, zero=zero) for zero in (0, 1, 2, 3)],
    Cell(4, tensor=4, model=UNEVEN),
    Cell(4, tensor=2, pipeline=2, zero=1),
    Cell(4, tensor=2, pipeline=2, zero=1, tensor_sequence=True, recompute="selective"),
    Cell(4, tensor=2, pipeline=2, clip=0.0, model=UNTIED),
    Cell(4, pipeline=2, zero=1, micro=1),
    Cell(4, pipeline=4, zero=1, micro=1, model=("model.num_layers=4",)),
    Cell(4, sequence=2, zero=3),
    Cell(4, sequence=4, zero=1),
    Cell(4, tensor=2, sequence=2, zero=2),
    Cell(4, tensor=2, sequence=2, tensor_sequence=True, zero=3, recompute="full"),
    Cell(4, LLAMA, tensor=2, pipeline=2, zero=1, model=UNEVEN),
    Cell(4, LLAMA, sequence=2, zero=3),
    *[Cell(4, family, tensor=2, pipeline=2, zero=1) for family in (GEMMA, OLMO2)],
    Cell(4, BERT, tensor=2, pipeline=2, zero=1),
    Cell(4, BERT, tensor=2, zero=3),
    Cell(4, XLNET, tensor=2, pipeline=2, zero=1),
    *[Cell(4, family, tensor=2, pipeline=2, zero=1) for family in (TRANSFORMER, T5, BART)],
    Cell(4, T5, tensor=2, zero=3),
    Cell(4, T5, pipeline=4, zero=1, micro=1),
    Cell(4, T5, pipeline=4, micro=1, clip=0.0),
    Cell(4, LSTM, zero=3),
    # eight ranks
    Cell(8, tensor=2, pipeline=2, zero=1, recompute="full"),
    Cell(8, tensor=2, pipeline=2, zero=1, tensor_sequence=True, model=UNEVEN),
    Cell(8, tensor=2, pipeline=2, zero=1, precision="bf16"),
    Cell(8, LLAMA, tensor=2, pipeline=2, zero=1),
    Cell(8, tensor=2, sequence=2, zero=3),
    Cell(8, zero=3, micro=1),
)


TURNS = 8
"""Commits in a row within which each cell is run at least once."""
CROSSED = ("tensor", "pipeline", "sequence", "zero")
"""Axes of which every pair of values that some cell has is in each part of the matrix."""


def part_of_matrix(turn: int) -> list[Cell]:
    """The cells whose turn it is (every TURNS-th), and as few others as it takes to have every value of each
    axis, and every pair of values of two CROSSED axes, that the whole matrix has."""
    chosen = [cell for number, cell in enumerate(CELLS) if number % TURNS == turn % TURNS]
    missing = set().union(*map(covered, CELLS)) - set().union(*map(covered, chosen))
    while missing:
        # A cell costs as many processes as it has ranks.
        best = max(CELLS, key=lambda cell: len(covered(cell) & missing) / cell.ranks)
        chosen.append(best)
        missing -= covered(best)
    return [cell for cell in CELLS if cell in chosen]


def covered(cell: Cell) -> set[tuple[tuple[str, object], ...]]:
    """Every value of an axis, and every pair of values of two CROSSED axes, that a cell has."""
    values = {axis.name: getattr(cell, axis.name) for axis in fields(cell)}
    crossed = [(axis, values[axis]) for axis in CROSSED]
    return {*combinations(crossed, 2), *((value,) for value in values.items())}


@dataclass(frozen=True)
class Deviation:
    """The largest of all ranks."""

    loss: float
    norm: float
    update: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.loss <= tolerance.loss and self.norm <= tolerance.norm and self.update <= tolerance.update


BF16_ROUNDING = 2.0**-8
"""Largest relative error of a number that is rounded to bf16."""


def deviation(trace: Trace, reference: Trace, *, holds_bf16: bool = False) -> Deviation:
    """How far a run is from the reference; raises AssertionError for other names or shapes of weights.

    holds_bf16: the run may hold weights that do not train in bf16, as DeepSpeed does. They must be the
    reference's up to that rounding, which is no part of the update.
    """

    def relative(ours: list[float], theirs: list[float]) -> float:
        assert len(ours) == len(theirs)
        return float(np.max(np.abs(np.array(ours) / np.array(theirs) - 1)))

    assert set(trace.weights) == set(reference.weights)
    distance, moved = 0.0, 0.0
    for name, expected in reference.weights.items():
        assert trace.weights[name].shape == expected.shape
        if holds_bf16 and np.array_equal(expected, reference.initial_weights[name]):
            np.testing.assert_allclose(
                trace.weights[name], expected, rtol=BF16_ROUNDING, atol=0, err_msg=name
            )
            continue
        distance += float(np.square(trace.weights[name] - expected).sum())
        moved += float(np.square(expected - reference.initial_weights[name]).sum())
    assert moved > 0
    return Deviation(
        loss=relative([*trace.losses, trace.validation_loss], [*reference.losses, reference.validation_loss]),
        norm=relative(trace.grad_norms, reference.grad_norms),
        update=(distance / moved) ** 0.5,
    )


class Matrix:
    """Cells and what they are compared with, run on demand, each once."""

    def __init__(self, corpus: Path, paired_corpus: Path, cells: Sequence[Cell] = CELLS) -> None:
        self._corpus, self._paired_corpus, self._cells = corpus, paired_corpus, cells
        self._references: dict[tuple[str, ...], Trace] = {}
        self._results: dict[Cell, Deviation] = {}

    def result(self, cell: Cell) -> Deviation:
        if cell not in self._results:
            plain = cell.plain(self._corpus_of(cell))
            if plain not in self._references:
                self._references[plain] = train(1, plain, STEPS)[0]
            reference = self._references[plain]
            traces = train(cell.ranks, cell.overrides(self._corpus_of(cell)), STEPS)
            found = [deviation(trace, reference) for trace in traces]
            self._results[cell] = Deviation(
                max(d.loss for d in found), max(d.norm for d in found), max(d.update for d in found)
            )
        return self._results[cell]

    def _corpus_of(self, cell: Cell) -> Path:
        return self._paired_corpus if cell.family == TRANSFORMER else self._corpus

    def table(self) -> str:
        """The support table as Markdown, from what was found; a cell that is not run here counts as good."""
        header = (
            "model",
            "processes",
            "data · tensor · pipeline · sequence",
            "ZeRO",
            "recompute",
            "micro-batches",
            "precision",
            "besides",
            "equals one process",
        )
        lines = [header, tuple("---" for _ in header)]
        for cell in CELLS:
            good = cell not in self._cells or self.result(cell).within(cell.tolerance)
            lines.append((*cell.row(), "yes" if good else "NO"))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def readme_table() -> str:
    """The table that README.md shows."""
    text = README.read_text()
    return text.split(BEGIN)[1].split(END)[0].strip()


def _main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        matrix = Matrix(prepare_small_corpus(path), prepare_small_pairs(path))
        for cell in CELLS:
            found = matrix.result(cell)
            figures = f"loss {found.loss:.1e}  norm {found.norm:.1e}  update {found.update:.1e}"
            print(f"{' | '.join(cell.row()):<90} {figures}", flush=True)
        table = matrix.table()
    print(table)
    if "--write" in arguments:
        before, _, rest = README.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    _main(sys.argv[1:])

"""LoRA, adapters and bitfit in every layout equal one process; tolerances as in matrix.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.checkpoint.reader import Checkpoint
from tests.parity.matrix import TOLERANCES, deviation
from tests.support import ranks
from tests.support.tables import rows
from tests.support.training import Trace, composed, open_loader, train

pytestmark = pytest.mark.slow

__all__ = ["rows"]
STEPS = 4
SIZE = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.dropout=0.1")
MODELS = {
    "GPT": ("model=gpt_tiny", *SIZE),
    "GPT over texts": ("model=gpt_tiny", *SIZE),
    "BERT over words": ("model=bert_tiny", *SIZE),
    "Llama": ("model=llama_tiny", *SIZE, "model.num_kv_heads=2", "model.mlp_hidden_size=48"),
    "BERT": ("model=bert_tiny", *SIZE),
    "T5": ("model=t5_tiny", *SIZE, "model.head_dim=8", "model.num_decoder_layers=2"),
}
METHODS = {
    "lora": ("method=lora", "lora.dropout=0.1"),
    "lora of parts": ("method=lora", "lora.targets=[query,value,mlp.up]", "lora.rank_stabilized=true"),
    "lora of packed": ("method=lora", "lora.targets=[qkv,mlp.down]", "lora.start=normal"),
    "adapter": ("method=adapter", "adapter.kind=houlsby", "adapter.width=6"),
    "prefix": ("method=prefix", "prefix.length=5"),
    "prompt": ("method=prompt", "prompt.length=5"),
    "bitfit": ("method=bitfit",),
}
LAYOUTS = {
    "DDP": (2, ()),
    "ZeRO 1": (2, ("parallel.zero=1",)),
    "ZeRO 2": (2, ("parallel.zero=2",)),
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "tensor, shared tokens": (2, ("parallel.tensor=2", "parallel.tensor_sequence=true")),
    "sequence": (2, ("parallel.sequence=2",)),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.zero=1")),
    "recompute": (1, ("recompute=full",)),
    "ZeRO 2, bf16": (2, ("parallel.zero=2", "precision=bf16")),
    "tensor, bf16": (2, ("parallel.tensor=2", "precision=bf16")),
}
CASES = [
    *(("GPT", method) for method in METHODS if method not in ("prefix", "prompt")),
    *((model, method) for model in ("GPT over texts", "BERT") for method in ("prefix", "prompt")),
    ("BERT over words", "prompt"),
    ("Llama", "lora"),
    ("Llama", "adapter"),
    ("BERT", "lora"),
    ("BERT", "lora of parts"),
    ("BERT", "bitfit"),
    ("T5", "lora"),
    ("T5", "adapter"),
]
READ_WHOLE = ("sequence", "tensor, shared tokens")
"""Layouts that models of tasks, which read whole rows, cannot have."""
TASKS = {
    "GPT over texts": "classification",
    "BERT": "classification",
    "BERT over words": "tagging",
    "T5": "seq2seq",
}
FIELDS = {
    "classification": (),
    "tagging": ("data.text_field=words", "data.label_field=tags"),
    "seq2seq": ("data.label_field=short", "objective.target_length=40"),
}


@pytest.fixture(scope="module")
def settings(
    rows: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, ...]]:
    """Model → what continues a checkpoint of it, which was trained for one step."""
    found = {}
    for model, size in MODELS.items():
        folder = tmp_path_factory.mktemp(model)
        batch = ("batch.global_size=8", "batch.micro_size=2", "batch.sequence_length=48", "seed=7")
        data: tuple[str, ...] = (f"data.path={corpus}",)
        if model in TASKS:
            fields = FIELDS[TASKS[model]]
            table = (f"data.path={rows}", f"data.tokenizer={corpus}", f"data.cache.dir={folder / 'cache'}")
            data = (f"objective={TASKS[model]}", "data=table", *table, "data.split.validation=0.2", *fields)
        train(1, (*size, *data, *batch), 1, save_to=folder)
        path = f"model.path={folder / 'step-00000001'}"
        found[model] = ("model=pretrained", path, *data, *batch, "train.steps=20", "optimizer.lr=3e-3")
    return found


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], Trace]:
    return {}


@pytest.mark.in_turns(6)
@pytest.mark.parametrize(
    ("layout", "model", "method"),
    [
        (layout, *case)
        for layout in LAYOUTS
        for case in CASES
        if case[0] not in TASKS or layout not in READ_WHOLE
    ],
)
def test_equals_one_process(
    layout: str,
    model: str,
    method: str,
    settings: dict[str, tuple[str, ...]],
    references: dict[tuple[str, str], Trace],
) -> None:
    plain = (*settings[model], *METHODS[method])
    if (model, method) not in references:
        [references[model, method]] = train(1, plain, STEPS)
    size, more = LAYOUTS[layout]
    is_bf16 = "precision=bf16" in more
    for trace in train(size, (*plain, *more), STEPS):
        found = deviation(trace, references[model, method], holds_bf16=is_bf16)
        assert found.within(TOLERANCES["bf16" if is_bf16 else "fp32"]), found


@pytest.mark.parametrize(
    ("model", "method", "trained"),
    [
        ("GPT", "lora", ("lora.",)),
        ("GPT", "lora of parts", ("qkv.lora.", "mlp.up.lora.")),
        ("GPT", "adapter", ("adapter.",)),
        ("GPT", "bitfit", (".bias",)),
        ("BERT", "lora", ("lora.", "head.")),
        ("BERT", "bitfit", (".bias", "head.")),
        ("BERT", "prefix", (".prefix.", "head.")),
        ("BERT", "prompt", (".prompt.", "head.")),
    ],
)
def test_what_trains(
    model: str, method: str, trained: tuple[str, ...], settings: dict[str, tuple[str, ...]]
) -> None:
    [trace] = train(1, (*settings[model], *METHODS[method]), STEPS)
    for name, weight in trace.weights.items():
        moved = not np.array_equal(weight, trace.initial_weights[name])
        # Biases of keys have no gradient: a softmax does not see them.
        assert moved == any(part in name for part in trained), name


def test_a_resume_is_bit_exact_at_another_layout(
    settings: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    words = (*settings["GPT"], *METHODS["lora"])
    [whole] = train(1, words, STEPS, save_to=tmp_path / "saved", save_at=2)
    [step] = (tmp_path / "saved").glob("step-*2")
    [rest] = train(1, words, STEPS, resume_from=step)
    assert rest.losses == whole.losses[2:]
    assert all(np.array_equal(rest.weights[name], whole.weights[name]) for name in whole.weights)
    for trace in train(2, (*words, "parallel.zero=3"), STEPS, resume_from=step):
        assert np.allclose(trace.losses, whole.losses[2:], atol=1e-5)
    assert Checkpoint.open(step).frozen


def gathered_after_a_step(mapping: dict[str, Any]) -> tuple[int, int]:
    """→ how many elements of frozen weights this rank holds as whole ones and as its shares, after a step."""
    import torch

    from llmtrain.distributed import processes
    from llmtrain.engine.build import build_engine
    from llmtrain.train.pretrained import open_weights
    from llmtrain.train.resolve import resolve

    resolved = resolve(mapping)
    config, device = resolved.config, torch.device("cpu")
    processes.start(device, single_process_group=True)
    assert resolved.pretrained is not None
    objective = config.objective.build(config.model, config.data, resolved.corpora)
    source = open_weights(resolved.pretrained, config.model).source(config.seed)
    engine = build_engine(config, resolved.layout, device, objective, None, source)
    for _, step in zip(range(2), open_loader(resolved).steps(0), strict=False):
        engine.train_step(step.micro_batches, lr=1e-3)
    frozen: list[Any] = [parameter for _, parameter in engine.frozen]
    # Parameters of under 100,000 elements stay gathered; of the others an empty tensor is left.
    large = [parameter for parameter in frozen if parameter.ds_numel >= 10**5]
    assert large
    return sum(p.data.numel() for p in large), sum(p.ds_tensor.numel() for p in large)


def test_zero_3_lets_go_of_frozen_weights(corpus: Path, tmp_path: Path) -> None:
    """Releases of DeepSpeed after 0.19.2 were said to keep them gathered."""
    size = ("model=gpt_tiny", "model.num_layers=2", "model.hidden_size=256", "model.num_heads=4")
    batch = ("batch.global_size=2", "batch.micro_size=1", "batch.sequence_length=16")
    train(1, (*size, f"data.path={corpus}", *batch), 1, save_to=tmp_path)
    path = f"model.path={tmp_path / 'step-00000001'}"
    words = ("model=pretrained", path, f"data.path={corpus}", *batch, "method=lora", "parallel.zero=3")
    for whole, shares in ranks.run(2, gathered_after_a_step, composed(words)):
        assert whole <= 16
        assert shares > 10**5

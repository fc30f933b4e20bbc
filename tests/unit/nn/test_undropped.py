"""Where nothing is dropped, keys of dropout's masks cost nothing: no mask is drawn, attention stays fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.models.registry import family_of
from llmtrain.nn.dropout import sample_keys
from llmtrain.objectives.base import DROPOUT_KEYS
from llmtrain.train.resolve import resolve
from tests.parity.matrix import FAMILIES, TRANSFORMER
from tests.support.training import compose, open_loader


class Operators(TorchDispatchMode):
    """Counts what torch is asked to compute, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_is_mkldnn" not in str(func):  # what the processor has is asked once a process
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators_of(run: Callable[[], Any]) -> Counter[str]:
    with Operators() as operators:
        run()
    return operators.calls


@pytest.mark.in_turns(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_change_no_operator(family: str, precision: str, request: pytest.FixtureRequest) -> None:
    """As many products and kernels of attention of each kind with exact_dropout as without."""
    corpus = request.getfixturevalue("paired_corpus" if family == TRANSFORMER else "corpus")
    resolved = resolve(compose([*FAMILIES[family], f"data.path={corpus}", "device=cpu"]), world_size=1)
    micro = next(open_loader(resolved).steps(0)).micro_batches[0]

    def operators(dropout: float, with_keys: bool, training: bool) -> Counter[str]:
        model_config = replace(resolved.config.model, dropout=dropout)  # type: ignore[call-arg]
        objective: Any = resolved.config.objective.build(model_config, resolved.config.data, resolved.corpora)
        model = family_of(model_config).build(model_config).train(training)
        keys = {DROPOUT_KEYS: sample_keys(0, list(micro.samples))} if with_keys else {}
        batch = {**micro.batch, **keys}

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                objective(model, batch).loss_sum.backward()

        return operators_of(step)

    plain = operators(0.0, with_keys=False, training=True)
    assert operators(0.0, with_keys=True, training=True) == plain
    assert operators(0.5, with_keys=True, training=False) == operators(0.0, with_keys=False, training=False)
    # A mask of keys is made by integers' arithmetic, one of torch's generator by an operator of its own.
    assert "aten.bitwise_xor_.Tensor" not in plain
    assert "aten.bitwise_xor_.Tensor" in operators(0.5, with_keys=True, training=True)

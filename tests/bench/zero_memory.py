"""Bytes that one of N ranks holds for weights, gradients and optimizer under ZeRO, against the share that
arithmetic gives it (arXiv:1910.02054, figure 1).

    python -m tests.bench.zero_memory [--ranks 2 4]

Counted are the tensors alive right before an optimizer step. Weights and optimizer are the engine's own
tensors; gradients are all else. ZeRO 3 keeps a bucket for gradients on their way: it is made small for this,
as it is beside a large model. Two things that fade in large models are not: the gradient of a parameter that
lies in two ranks' shares is held whole, and ZeRO 3 gathers parameters of under 100,000 elements for good.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from tests.support import ranks

MODEL = (
    "model=gpt_tiny",
    "model.vocab_size=1024",
    "model.num_layers=32",
    "model.hidden_size=384",
    "model.max_sequence_length=32",
    "batch.global_size=8",
    "batch.micro_size=1",
    "batch.sequence_length=16",
)


def held_bytes(overrides: tuple[str, ...]) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, parameters of the model) of this rank, bytes but for the last."""
    import gc

    import numpy as np
    import torch

    from llmtrain.data.loader import MicroBatch
    from llmtrain.engine import deepspeed
    from llmtrain.engine.build import build_engine
    from llmtrain.objectives.causal_lm import CausalLM
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose

    def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    def alive() -> list[torch.Tensor]:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
        tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
        return [tensor for tensor in tensors if tensor.device.type != "meta"]

    deepspeed.MAX_BUCKET_ELEMENTS = 2**12 if "parallel.zero=3" in overrides else 200_000_000
    earlier = alive()  # kept, so that no new tensor takes an old place
    before = storages(earlier)
    resolved = resolve(compose([*MODEL, *overrides]), data_optional=True)
    engine = build_engine(resolved.config, resolved.layout, torch.device("cpu"), CausalLM(), None)
    update, found = engine._update, {}

    def measured_update(*arguments: Any) -> tuple[float, bool]:
        weights = storages([getattr(p, "ds_tensor", p).detach() for _, p in engine.setup.parameters.items()])
        holders = [fragment.holder for fragment in engine.held_fragments()]
        state = [v for s in engine.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        masters = {k: v for k, v in storages([h.detach() for h in holders]).items() if k not in weights}
        optimizer = {**masters, **storages(state)}
        everything = {k: v for k, v in storages(alive()).items() if k not in before}
        rest = sum(everything.values()) - sum(weights.values()) - sum(optimizer.values())
        found.update(weights=sum(weights.values()), optimizer=sum(optimizer.values()), gradients=rest)
        return update(*arguments)

    engine._update = measured_update  # type: ignore[method-assign]
    tokens = torch.zeros(1, 16, dtype=torch.long)
    micro = MicroBatch({"tokens": tokens, "labels": tokens}, range(1), np.array([0]))
    for _ in range(2):
        engine.train_step([micro] * resolved.layout.accumulation, lr=1e-3)
    parameters = resolved.config.model.parameter_count()
    return found["weights"], found["gradients"], found["optimizer"], parameters


def theory(zero: int, count: int, parameters: int, precision: str) -> tuple[float, float, float]:
    """Bytes of (weights, gradients, optimizer) right before a step: fp32 masters and two moments, fp32
    gradients. ZeRO 1 holds whole gradients during the backward pass; by the time of the step it has let go
    of other ranks' in fp32, and not in bf16, where DeepSpeed keeps them in both types."""
    low = precision == "bf16"
    weights = (2 if low else 4) * parameters / (count if zero == 3 else 1)
    gradients = 6 * parameters if low and zero == 1 else 4 * parameters / count
    return weights, gradients, 12 * parameters / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    options = parser.parse_args()
    print(f"{'ranks':<18}{'weights':>22}{'gradients':>22}{'optimizer':>22}   MB held (of the share)")
    for count in options.ranks:
        for precision, zero in product(("fp32", "bf16"), (1, 2, 3)):
            overrides = (f"parallel.zero={zero}", f"precision={precision}")
            *held, parameters = max(ranks.run(count, held_bytes, overrides))
            shares = theory(zero, count, parameters, precision)
            cells = [f"{h / 1e6:.2f} ({h / s:.3f})" for h, s in zip(held, shares, strict=True)]
            print(
                f"{f'{count}, {precision}, ZeRO {zero}':<18}{''.join(f'{c:>22}' for c in cells)}", flush=True
            )


if __name__ == "__main__":
    main()

"""DeepSpeed: ZeRO stages 0 to 3 over data-parallel replicas (arXiv:1910.02054)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmtrain.engine.base import Engine, Fragment
from llmtrain.engine.modules import ObjectiveModule, autocast
from llmtrain.objectives.base import Batch, Objective, Terms
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.parallel import distributed, launcher
from llmtrain.parallel.layout import Layout, Precision

MAX_BUCKET_ELEMENTS = 200_000_000


def import_deepspeed() -> Any:
    """DeepSpeed, with its banner and per-rank logs turned down; takes seconds the first time."""
    os.environ.setdefault("LOCAL_RANK", str(launcher.local_rank()))  # DeepSpeed insists on it
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # torch deprecates names that DeepSpeed still calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # An all-reduce over shared memory for CPU ranks, compiled at first use for up to a minute; gloo serves,
    # and its sums do not depend on which hosts the ranks are on.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def deepspeed_config(
    layout: Layout, precision: Precision, optimizer: OptimizerConfig, num_parameters: int, device_type: str
) -> dict[str, Any]:
    """DeepSpeed's own configuration, every value that changes a result stated.

    With ZeRO 0 there is nothing to shard: bf16 is then autocast over fp32 weights, as in the local
    engine, and clipping is done here, since DeepSpeed reports no gradient norm in that case.
    """
    low_precision = precision if layout.zero > 0 else "fp32"
    bucket = min(MAX_BUCKET_ELEMENTS, max(num_parameters, 2**16))
    config: dict[str, Any] = {
        "train_batch_size": layout.global_size,
        "train_micro_batch_size_per_gpu": layout.micro_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": optimizer.max_grad_norm if layout.zero > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": layout.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "overlap_comm": device_type == "cuda",
        },
    }
    if layout.zero == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            "stage3_max_live_parameters": 10**9,
            "stage3_param_persistence_threshold": 10**5,
        }
    if low_precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif low_precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return config


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine behind the house contract."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        layout: Layout,
        device: torch.device,
        seed: int,
        precision: Precision,
        optimizer: OptimizerConfig,
    ) -> None:
        super().__init__(model, objective, layout, device, seed)
        deepspeed = import_deepspeed()
        autocast_precision = precision if layout.zero == 0 else "fp32"
        wrapped = ObjectiveModule(model, objective, autocast(autocast_precision, device))
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._shapes = {name: tuple(p.shape) for name, p in self._named}
        self._max_grad_norm = optimizer.max_grad_norm
        num_parameters = sum(p.numel() for _, p in self._named)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory figures whatever the log level
            self._engine, *_ = deepspeed.initialize(
                model=wrapped,
                optimizer=build_optimizer(optimizer, self._named, device.type),
                config=deepspeed_config(layout, precision, optimizer, num_parameters, device.type),
                dist_init_required=False,
            )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer if self.layout.zero > 0 else self._engine.optimizer

    def _module(self) -> nn.Module:
        return self._engine

    def _forward_backward(self, batch: Batch, scale: float, is_last: bool) -> Terms:
        self._engine.set_gradient_accumulation_boundary(is_last)
        terms = Terms(*self._engine(batch))
        self._engine.backward(terms.loss_sum * scale, scale_wrt_gas=False)
        if not is_last:
            self._engine.step()  # counts the micro-batch; updates nothing before the boundary
        return terms

    def _update(self, lr: float) -> tuple[float, bool]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self.layout.zero == 0:
            parameters = [p for _, p in self._named]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if self._max_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float(norm), not self._engine.was_step_applied()

    def fragments(self) -> list[Fragment]:
        if self.layout.zero == 0:
            return self.held_fragments()[distributed.rank() :: distributed.world_size()]
        return list(self._zero_3_fragments() if self.layout.zero == 3 else self._zero_1_2_fragments())

    def held_fragments(self) -> list[Fragment]:
        if self.layout.zero == 0:
            return [Fragment(name, tuple(p.shape), 0, p.numel(), p, 0) for name, p in self._named]
        return self.fragments()

    def _zero_1_2_fragments(self) -> Iterator[Fragment]:
        zero = self._engine.optimizer
        # ZeRO 1 in bf16 runs under another DeepSpeed class than the rest, with other names inside.
        flats = getattr(zero, "fp32_groups_flat_partition", None) or zero.single_partition_of_fp32_groups
        for name, parameter in self._named:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            yield Fragment(
                name,
                self._shapes[name],
                start,
                start + length,
                flats[mapping.param_group_index],
                mapping.hp_fragment_address.start,
            )

    def _zero_3_fragments(self) -> Iterator[Fragment]:
        zero = self._engine.optimizer
        for name, parameter in self._named:
            group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
            numel, share = parameter.ds_numel, parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
            start = distributed.rank() * share
            stop = min(numel, start + share)
            if start < stop:
                holder = zero.fp32_partitioned_groups_flat[group]
                yield Fragment(name, self._shapes[name], start, stop, holder, offset)

    def refresh_weights(self) -> None:
        zero = self._engine.optimizer
        if self.layout.zero == 3:
            for group in range(len(zero.fp16_groups)):
                zero.fp16_partitioned_groups_flat[group].data.copy_(
                    zero.fp32_partitioned_groups_flat[group].data
                )
                zero._unflatten_partitioned_parameters(group)
        # Below ZeRO 3 the module got its whole weights before this engine was built.

    def scaler_state(self) -> dict[str, float]:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is None or not hasattr(scaler, "cur_iter"):
            return {}
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {name: float(getattr(scaler, name)) for name in names}

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        for name, value in state.items():
            setattr(scaler, name, value if name == "cur_scale" else int(value))

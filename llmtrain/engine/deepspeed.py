"""DeepSpeed: ZeRO stages 0 to 3 over data-parallel replicas (arXiv:1910.02054)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from llmtrain.engine.base import Engine, Fragment, Setup
from llmtrain.engine.gate import Gate
from llmtrain.engine.modules import ObjectiveModule, autocast
from llmtrain.objectives.base import Batch, Terms
from llmtrain.optim.config import OptimizerConfig
from llmtrain.optim.optimizers import set_lr
from llmtrain.parallel import upstream
from llmtrain.parallel.config import Precision
from llmtrain.parallel.layout import Layout
from llmtrain.parallel.mesh import Mesh
from llmtrain.tensor_boxes import Shard
from llmtrain.watch import phases

MAX_BUCKET_ELEMENTS = 200_000_000


def deepspeed_config(
    layout: Layout, precision: Precision, optimizer: OptimizerConfig, num_parameters: int, device_type: str
) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every value that affects results set explicitly.

    With ZeRO 0 nothing is sharded: bf16 is then autocast over fp32 weights, as in the local engine, and
    clipping is done in this module, since DeepSpeed reports no gradient norm in that case.
    """
    low_precision = precision if layout.zero > 0 else "fp32"
    bucket = min(MAX_BUCKET_ELEMENTS, max(num_parameters, 2**16))
    bucket += bucket % 2  # DeepSpeed requires an even number
    config: dict[str, Any] = {
        # DeepSpeed treats ranks that share a sequence as replicas.
        "train_batch_size": layout.global_size * layout.sequence,
        "train_micro_batch_size_per_gpu": layout.micro_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": optimizer.max_grad_norm if layout.zero > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # also run torch's optimizers in host memory
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": layout.zero,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "contiguous_gradients": True,
            "overlap_comm": device_type == "cuda",
        },
    }
    if layout.tensor_sequence:
        # Hidden states between stages are already divided; DeepSpeed would take them for copies and divide
        # them again.
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if layout.zero == 3:
        config["zero_optimization"] |= {
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            "stage3_max_live_parameters": 10**9,
            "stage3_param_persistence_threshold": 10**5,
        }
    config["zero_optimization"] |= _offload_config(layout, device_type)
    if low_precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif low_precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return config


def _offload_config(layout: Layout, device_type: str) -> dict[str, Any]:
    """Return ZeRO's settings for offloading and for low-precision communication."""
    devices = {"offload_optimizer": layout.offload_optimizer, "offload_param": layout.offload_parameters}
    settings: dict[str, Any] = {}
    for name, device in devices.items():
        if device != "none":
            settings[name] = {"device": device, "pin_memory": device_type == "cuda"}
    if layout.zero == 3:
        settings |= {
            "zero_quantized_weights": layout.quantized_weights,
            "zero_quantized_gradients": layout.quantized_gradients,
            "zero_hpz_partition_size": layout.hierarchical_partition,
        }
    return settings


def config_of(
    layout: Layout,
    precision: Precision,
    optimizer: OptimizerConfig,
    shards: Mapping[str, Shard],
    device: torch.device,
) -> dict[str, Any]:
    """Return `deepspeed_config` for a rank that holds these shards."""
    num_parameters = sum(shard.numel for shard in shards.values())
    return deepspeed_config(layout, precision, optimizer, num_parameters, device.type)


def zero_3_partitioner(
    config: dict[str, Any], mesh: Mesh, dtype: torch.dtype
) -> Callable[[nn.Parameter], None]:
    """Return a function that replaces a whole parameter by this rank's share, as DeepSpeed's `zero.Init`
    does, so that building a model needs little memory."""
    deepspeed = upstream.import_deepspeed()
    upstream.forget_hierarchical_groups()
    init = deepspeed.zero.Init(
        module=nn.Module(),
        data_parallel_group=mesh.replica_group,
        dtype=dtype,
        config_dict_or_path=config,
        mpu=mesh,
    )
    return upstream.partitioner(init)


class DeepSpeedEngine(Engine):
    """DeepSpeed's engine behind the Engine interface."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        autocast_precision = setup.precision if self.layout.zero == 0 else "fp32"
        wrapped = ObjectiveModule(self.model, self.objective, autocast(autocast_precision, self.device))
        self._engine = self._initialize(wrapped, self.mesh)

    def _initialize(self, module: nn.Module, mpu: Any) -> Any:
        setup = self.setup
        config = config_of(setup.layout, setup.precision, setup.optimizer, setup.shards, self.device)
        deepspeed = upstream.import_deepspeed()
        if setup.layout.quantized_weights or setup.layout.quantized_gradients:
            upstream.free_kernels()  # ZeRO++ compiles kernels
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory figures at any log level
            engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self._make_optimizer(),
                config=config,
                mpu=mpu,
                dist_init_required=False,
            )
        return engine

    def _make_optimizer(self) -> torch.optim.Optimizer:
        if self.setup.optimizer.implementation == "torch":
            return super()._make_optimizer()
        from llmtrain.engine.cpu_adam import build_cpu_adam

        return build_cpu_adam(self.setup.optimizer, *self._optimized())

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        own = self._engine.optimizer
        return upstream.torch_optimizer(own) if self.layout.zero > 0 else own

    def _module(self) -> nn.Module:
        return self._engine

    def _accumulate(self, count: int, batch: Callable[[int], Batch], scale: float) -> list[Terms]:
        all_terms = []
        for i in range(count):
            is_last = i == count - 1
            self._engine.set_gradient_accumulation_boundary(is_last)
            with phases.FORWARD:
                terms = Terms(*self._engine(batch(i)))
            with phases.BACKWARD:
                self._engine.backward(terms.loss_sum * scale, scale_wrt_gas=False)
            if not is_last:
                self._engine.step()  # counts the micro-batch; updates only at the boundary
            all_terms.append(terms)
        return all_terms

    def _update(self, lr: float, gate: Gate | None) -> tuple[float, bool]:
        set_lr(self.optimizer, lr)
        if self.layout.zero == 0:
            # Without ZeRO, DeepSpeed reports no norm, so clip here.
            norm = self._clip(self.setup.optimizer.max_grad_norm)
            if gate is not None and not gate(norm):
                self._drop()
                return norm, True
            self._step()
        else:
            with upstream.asking_before_step(self._engine.optimizer, gate):
                self._step()
            norm = self._engine.get_global_grad_norm()
        return float(norm), not self._engine.was_step_applied()

    def _step(self) -> None:
        self._engine.step()

    def _drop(self) -> None:
        """Drop the gradients of a step that is not taken, without ZeRO."""
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()  # counts the micro-batch
        self._engine.zero_grad()

    def held_fragments(self) -> list[Fragment]:
        if self.layout.zero == 0:
            return self._whole_fragments(self.setup.parameters.items())
        if self.layout.zero == 3:
            return list(self._zero_3_fragments())
        return [*self._zero_1_2_fragments(), *self._whole_fragments(self.frozen)]

    def fragments(self) -> list[Fragment]:
        if self.layout.zero == 0:
            return self._each_replicas_share(self._whole_fragments(self.setup.parameters.items()))
        if self.layout.zero == 3:
            return [fragment for fragment in self._zero_3_fragments() if self._answers_for(fragment.name)]
        masters = [fragment for fragment in self._zero_1_2_fragments() if self._answers_for(fragment.name)]
        # All replicas hold all frozen weights.
        return [*masters, *self._each_replicas_share(self._whole_fragments(self.frozen))]

    def _zero_1_2_fragments(self) -> Iterator[Fragment]:
        for name, parameter in self.trainable:
            held = upstream.master_below_zero_3(self._engine.optimizer, parameter)
            if held is not None:
                yield self._fragment(name, held, trains=True)

    def _zero_3_fragments(self) -> Iterator[Fragment]:
        replica = self.mesh.replica
        for name, parameter in self.setup.parameters.items():
            trains = parameter.requires_grad
            held = (
                upstream.master_of_zero_3(self._engine.optimizer, parameter, replica)
                if trains
                else upstream.frozen_of_zero_3(parameter, replica)
            )
            if held is not None:
                yield self._fragment(name, held, trains)

    def _fragment(self, name: str, held: upstream.Held, trains: bool) -> Fragment:
        return Fragment(
            name, self.setup.shards[name], held.start, held.stop, held.holder, held.offset, trains
        )

    def release(self) -> None:
        self._engine.destroy()

    def refresh_weights(self) -> None:
        if self.layout.zero == 3:
            upstream.refresh_zero_3(self._engine.optimizer, [p for _, p in self.frozen])
        # Below ZeRO 3 the module received its weights before this engine was built.

    def scaler_state(self) -> dict[str, float]:
        return upstream.scaler_state(self._engine.optimizer)

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        upstream.load_scaler_state(self._engine.optimizer, state)

"""The names of DeepSpeed's that it does not document and `parallel/upstream.py` needs, by where they are."""

from __future__ import annotations

VERSION = "0.19.8"
UNDOCUMENTED = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.utils.groups": ("_ZERO_PARAM_INTRA_PARALLEL_GROUP",),
    "deepspeed.runtime.zero.partition_parameters.Init": (
        "_convert_to_deepspeed_param",
        "partition",
        "ds_numel",
        "ds_tensor",
        "ds_secondary_tensor",
    ),
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "optimizer",
        "grad_position",
        "get_param_id",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "_unflatten_partitioned_parameters",
        "_get_norm_groups",
        "invalidate_secondary_tensor",
    ),
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "optimizer",
        "single_partition_of_fp32_groups",
        "scaled_global_norm",
        "loss_scale",
    ),
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": (
        "optimizer",
        "fp32_groups_flat_partition",
        "get_grads_for_norm",
        "norm_type",
    ),
    "deepspeed.utils.tensor_fragment.tensor_fragment": (
        "lp_fragment_address",
        "hp_fragment_address",
        "param_group_index",
    ),
    "deepspeed.utils.mixed_precision_linkage": ("_hp_mapping",),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": (
        "cur_scale",
        "cur_iter",
        "last_overflow_iter",
        "cur_hysteresis",
    ),
    "deepspeed.runtime.pipe.module.PipelineModule": ("tied_modules", "tied_comms", "weight_attr"),
    "deepspeed.runtime.pipe.topology.PipelineParallelGrid": ("_build_p2p_groups", "_topo"),
    "deepspeed.runtime.pipe.engine.PipelineEngine": (
        "_train_schedule",
        "_exec_optimizer_step",
        "micro_batches",
        "num_stages",
        "stage_id",
        "is_pipe_partitioned",
        "pipe_recv_buf",
        "pipe_partition_input_meta_cache",
        "grad_partition_grad_layer_meta_cache",
        "_allocate_or_extend_buffers",
    ),
    "deepspeed.runtime.zero.partitioned_param_coordinator": ("assert_ints_same_as_other_ranks",),
    "deepspeed.runtime.utils": (
        "ds_pipe_replicated",
        "combine_grad_norm_groups",
        "get_global_norm_of_tensors",
        "is_invalid_grad_norm",
    ),
    "deepspeed.ops.adam.DeepSpeedCPUAdam": ("ds_opt_adam", "opt_id"),
}
"""Module or class → names that stand in its source."""

"""Allocate and fill this process' shard of a model on the meta device, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from llmtrain.nn.state import named_statistics
from llmtrain.tensor_boxes import Shard

Source = Callable[[Tensor, str, Shard, int], None]
"""(out, name, shard, start): writes elements of the flattened shard, from `start` on, to `out` (1-D)."""


def materialize(
    model: nn.Module,
    held: Iterable[nn.Module],
    shards: Mapping[str, Shard],
    *,
    device: torch.device,
    dtype: torch.dtype,
    source: Source | None,
    then: Callable[[nn.Parameter], None] | None = None,
) -> tuple[dict[str, nn.Parameter], dict[str, Shard]]:
    """Allocate and fill the parameters and statistics of the modules `held`, which are parts of `model`.

    shards: shards of the divided parameters; others are whole. source: None leaves the values uninitialized.
    then: called with each parameter as soon as it is created, so that memory held elsewhere can be freed.
    Return parameters and shards by canonical name, which is the first name for a tied weight.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    statistics = {id(buffer): name for name, buffer in named_statistics(model).items()}
    made: dict[nn.Parameter, nn.Parameter] = {}  # by the parameter on the meta device
    parameters: dict[str, nn.Parameter] = {}
    all_shards: dict[str, Shard] = {}
    for module in held:
        for part in module.modules():
            for key, parameter in part.named_parameters(recurse=False):
                if parameter.device.type != "meta":
                    continue
                if parameter not in made:
                    name = names[parameter]
                    shard = shards.get(name, Shard(tuple(parameter.shape)))
                    values = torch.empty(parameter.shape, dtype=dtype, device=device)
                    if source is not None:
                        source(values.view(-1), name, shard, 0)
                    made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                    if then is not None:
                        then(made[parameter])
                    parameters[name], all_shards[name] = made[parameter], shard
                part.register_parameter(key, made[parameter])
            for key, buffer in part.named_buffers(recurse=False):
                if buffer.device.type == "meta":
                    # Statistics keep fp32: they change by less than a step of a shorter format.
                    held_values = torch.empty(buffer.shape, device=device)
                    if source is not None:
                        source(held_values.view(-1), statistics[id(buffer)], Shard(tuple(buffer.shape)), 0)
                    part.register_buffer(key, held_values)
    return parameters, all_shards

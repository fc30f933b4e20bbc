"""Requirements of the interleaved schedule of `assume.virtual_stages` (arXiv:2104.04473, section 2.2)."""

from __future__ import annotations

from llmtrain.errors import Problem
from llmtrain.nn.model_config import ModelConfig
from llmtrain.parallel.layout import Layout


def interleaving_problem(model: ModelConfig, layout: Layout, chunks: int) -> Problem | None:
    """Return why the stages of a layout cannot have `chunks` runs of layers each; None if they can."""
    if chunks == 1:
        return None
    layers, stages = len(model.step_parameter_counts()) - 2, layout.pipeline
    if layers < 1:
        return Problem("assume.virtual_stages", str(chunks), "1 with a model without layers")
    if chunks * stages > layers:
        allowed = f"1 to {max(1, layers // stages)}: {layers} layers in {stages} pipeline stages"
        return Problem("assume.virtual_stages", str(chunks), allowed)
    if stages > 1 and layout.accumulation % stages:
        got = f"{chunks} with {layout.accumulation} micro-batches a step"
        allowed = f"1, or micro-batches in a multiple of the {stages} pipeline stages"
        return Problem("assume.virtual_stages", got, allowed, "give another batch.micro_size or global_size")
    return None

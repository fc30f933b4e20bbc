"""From a resolved configuration to an engine with weights."""

def build_engine(
    config: TrainConfig, layout: Layout, device: Any, objective: Any, checkpoint: Checkpoint | None
) -> Engine:
    """The engine that `config` names, at the checkpoint's state, or freshly initialized from the seed."""
    from llmtrain.commands.loading import build_module, load_weights
    from llmtrain.models.initialize import initialize

    module = build_module(config.model, device)
    if checkpoint is None:
        initialize(module, config.seed)
    else:
        load_weights(module, checkpoint.weights())
    module.train()
    arguments = (module, objective, layout, device, config.seed, config.precision, config.optimizer)
    engine: Engine
    if config.engine == "deepspeed":
        from llmtrain.engine.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(*arguments)
    else:
        from llmtrain.engine.local import LocalEngine

        engine = LocalEngine(*arguments)
    if checkpoint is not None:
        checkpoint.restore(engine)
    elif layout.zero > 0 and config.precision != "fp32":
        # DeepSpeed makes its fp32 masters from weights already rounded.
        fill_masters(engine, config.seed)
    return engine


def fill_masters(engine: Engine, seed: int) -> None:
    """Put the seed's exact weights into the fragments that this rank owns."""
    import torch

    from llmtrain.models.initialize import fill_slice, match_initializers

    fragments = engine.fragments()
    names = [name for name, _ in engine.model.named_parameters()]
    table = match_initializers(engine.model.initializers(), names)  # type: ignore[operator]
    with torch.no_grad():
        for fragment in fragments:
            exact = fill_slice(fragment.name, table[fragment.name], seed, fragment.start, fragment.stop)
            fragment.view_of(fragment.holder).copy_(exact)



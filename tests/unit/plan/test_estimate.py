import resource
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmtrain.checkpoint.config import MemoryConfig
from llmtrain.config import decode
from llmtrain.errors import ConfigError
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.recurrent.config import LSTMConfig
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.causal_lm import CausalLMConfig
from llmtrain.optim.config import OptimizerConfig
from llmtrain.parallel.config import BatchConfig, ParallelConfig, Precision
from llmtrain.parallel.planning import plan_layout
from llmtrain.plan import machine
from llmtrain.plan.config import ClusterConfig
from llmtrain.plan.estimate import Plan, estimate
from llmtrain.plan.fit import changes, refuse_if_too_large, warnings
from llmtrain.plan.report import summary, table
from llmtrain.plan.units import duration, gib, quantity
from llmtrain.train.transfer_config import TransferConfig
from tests.support.presets import preset, usual_objective

CONF = Path(__file__).parents[3] / "conf"
LLAMA_8B = preset(CONF / "model/llama3_8b.yaml")
H100 = decode(ClusterConfig, yaml.safe_load((CONF / "cluster/h100_80g.yaml").read_text()))


@dataclass(frozen=True)
class Steps:
    steps: int = 1000


@dataclass(frozen=True)
class Data:
    document_mask: bool = True


@dataclass(frozen=True)
class Checkpoints:
    asynchronous: bool = True
    every: int | None = None
    memory: MemoryConfig = field(default_factory=MemoryConfig)


@dataclass(frozen=True)
class Settings:
    objective: ObjectiveConfig = field(default_factory=CausalLMConfig)
    precision: Precision = "bf16"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    cluster: ClusterConfig = H100
    device: str = "auto"
    train: Steps = Steps()
    data: Data = field(default_factory=Data)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    exact_dropout: bool = True
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    transfer: TransferConfig = field(default_factory=TransferConfig)


def planned(
    model: GPTConfig | LSTMConfig | SimpleCNNConfig,
    batch: BatchConfig,
    *,
    world_size: int = 1,
    settings: Settings | None = None,
    **parallel: Any,
) -> Plan:
    settings = settings or Settings()
    layout = plan_layout(
        ParallelConfig(**parallel),
        batch,
        engine="deepspeed",
        precision=settings.precision,
        world_size=world_size,
        device="cuda",
    )
    return estimate(model, layout, replace(settings, objective=usual_objective(model)))


def test_what_fits() -> None:
    plan = planned(LLAMA_8B, BatchConfig(64, 1, 8192), world_size=64, zero=3)
    assert plan.parameters == 8_030_261_248
    assert plan.tokens_per_step == 64 * 8192
    assert plan.total_tokens == 64 * 8192 * 1000
    assert not plan.is_too_large
    assert not warnings(plan)
    refuse_if_too_large(plan)
    text = table(plan)
    assert "8,030,261,248 parameters" in text
    assert "h100_80g: fits" in text
    assert plan.time is not None
    assert plan.seconds == plan.steps * plan.time.seconds
    assert plan.utilization is not None
    assert 0.2 < plan.utilization < 0.6
    assert plan.seconds == pytest.approx(plan.total_flops / (plan.utilization * 989e12 * 64))


def test_what_does_not_fit_is_refused_in_one_line_with_settings_that_fit() -> None:
    plan = planned(LLAMA_8B, BatchConfig(128, 4, 4096), world_size=8)
    with pytest.raises(ConfigError) as caught:
        refuse_if_too_large(plan)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith("memory: got ")
    assert (
        " of it activations; allowed: 79.16 GiB, what one process has on h100_80g; try parallel.zero=2"
        in text
    )
    assert "does not fit" in table(plan)
    assert "warning" not in table(plan) + summary(plan), "the refusal says it"
    follows = planned(LLAMA_8B, BatchConfig(128, 1, 4096), world_size=8, zero=2)
    assert not follows.is_too_large
    assert text.endswith(f"which needs {gib(follows.memory.total)}")


def test_more_processes_are_named_when_nothing_less_helps() -> None:
    plan = planned(LLAMA_8B, BatchConfig(128, 1, 4096), world_size=1)
    with pytest.raises(ConfigError, match=r"try \d+ processes parallel.zero=3 engine=deepspeed") as caught:
        refuse_if_too_large(plan)
    count = int(str(caught.value).split("try ")[1].split()[0])
    assert not planned(LLAMA_8B, BatchConfig(128, 1, 4096), world_size=count, zero=3).is_too_large


def test_nothing_fits() -> None:
    small = replace(H100, memory_bytes=4_000_000_000)
    gpt3 = preset(CONF / "model/gpt3_175b.yaml")
    with pytest.raises(ConfigError, match=r"or use a smaller model$"):
        refuse_if_too_large(
            planned(gpt3, BatchConfig(8, 1, 2048), world_size=8, settings=Settings(cluster=small))
        )


@pytest.mark.parametrize(
    ("parallel", "batch", "memory_gb", "remedy"),
    [
        # Blocks of one sequence take more than all else: only recomputing them helps.
        ({"zero": 3}, BatchConfig(8, 1, 8192), 66, "recompute=full"),
        ({"zero": 3}, BatchConfig(8, 1, 8192), 35, "parallel.tensor=2 recompute=full"),
        (
            {"pipeline": 2},
            BatchConfig(32, 2, 4096),
            90,
            "parallel.zero=1 engine=deepspeed batch.micro_size=1",
        ),
    ],
)
def test_remedies_from_the_least_change_on(
    parallel: dict[str, Any], batch: BatchConfig, memory_gb: int, remedy: str
) -> None:
    settings = Settings(cluster=replace(H100, memory_bytes=memory_gb * 10**9))
    with pytest.raises(ConfigError) as caught:
        refuse_if_too_large(planned(LLAMA_8B, batch, world_size=8, settings=settings, **parallel))
    assert f"; try {remedy}, which needs " in str(caught.value), str(caught.value)


def test_a_pipeline_is_told_with_its_bubble() -> None:
    settings = Settings(recompute=RecomputeConfig("full", 2))
    plan = planned(
        LLAMA_8B,
        BatchConfig(64, 1, 8192),
        world_size=64,
        settings=settings,
        tensor=4,
        pipeline=4,
        zero=1,
        tensor_sequence=True,
    )
    assert plan.time is not None
    # Equal stages idle for 3 of 19 turns of the schedule; what comes once a step is no part of it.
    assert plan.bubble == plan.time.parts["pipeline bubble"] / plan.time.seconds
    assert 0.8 * 3 / (16 + 3) < plan.bubble < 3 / (16 + 3)
    assert replace(plan, cluster=ClusterConfig()).bubble == 3 / (16 + 3)
    text = table(plan)
    assert "data 4 · tensor 4 · pipeline 4 · sequence 1; ZeRO 1, bf16; tokens shared in the tensor" in text
    assert "recompute         full, one layer in 2" in text
    assert f"4 stages, 16 micro-batches a step: {plan.bubble:.1%} of it idle" in text
    assert "memory of one process of the stage that holds most" in text


def test_searching_a_large_space_is_quick() -> None:
    """Counted in calls, not in seconds."""
    gpt3 = preset(CONF / "model/gpt3_175b.yaml")
    plan = planned(gpt3, BatchConfig(1536, 6, 2048), world_size=64, tensor=2, pipeline=8, zero=1)
    assert sum(1 for _ in changes(plan)) < 2000


LOCAL = Settings(cluster=ClusterConfig(), device="cpu", precision="fp32")


@pytest.mark.parametrize(
    ("share", "warned", "refused"), [(1.1, False, False), (0.8, True, False), (0.5, False, True)]
)
def test_this_machine_refuses_only_what_is_clearly_over(
    share: float, warned: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    model, batch = GPTConfig(vocab_size=50257), BatchConfig(4, 2, 64)
    needed = planned(model, batch, settings=LOCAL).memory.total
    monkeypatch.setattr(machine, "memory_bytes", lambda: int(share * needed))
    plan = planned(model, batch, settings=LOCAL)
    assert bool(warnings(plan)) == warned
    assert ("warning: memory: got" in summary(plan)) == ("warning: memory: got" in table(plan)) == warned
    if refused:
        with pytest.raises(ConfigError, match="what one process has on this machine"):
            refuse_if_too_large(plan)
    else:
        refuse_if_too_large(plan)


def test_processes_share_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = GPTConfig(vocab_size=512), BatchConfig(8, 1, 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert planned(model, batch, world_size=4, settings=LOCAL).available_bytes == machine.memory_bytes() // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert planned(model, batch, world_size=4, settings=LOCAL).available_bytes == machine.memory_bytes() // 2


def test_memory_of_a_gpu_that_is_not_known_is_not_judged() -> None:
    plan = planned(LLAMA_8B, BatchConfig(4, 4, 8192), settings=replace(LOCAL, device="cuda"))
    assert plan.available_bytes is None
    refuse_if_too_large(plan)
    assert " GiB of " not in summary(plan)


def test_other_families() -> None:
    lstm = planned(LSTMConfig(vocab_size=8192), BatchConfig(8, 2, 64), settings=LOCAL)
    assert "tokens per step" in table(lstm)
    cnn = planned(SimpleCNNConfig(), BatchConfig(64, 32, 1), settings=LOCAL)
    assert cnn.tokens_per_step == 64
    assert "64 images per step" in table(cnn)
    assert cnn.memory.logits == 0


def test_an_unknown_vocabulary_is_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(GPTConfig(), BatchConfig(1, 1, 64))
    assert [p.where for p in caught.value.problems] == ["model.vocab_size"]


@pytest.mark.parametrize("path", sorted((CONF / "cluster").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_decode(path: Path) -> None:
    config = decode(ClusterConfig, yaml.safe_load(path.read_text()))
    assert config.name == path.stem
    assert config.is_local == (path.stem == "local")


def test_neither_torch_nor_deepspeed_is_imported_and_it_is_quick() -> None:
    code = (
        "import sys, llmtrain.plan.estimate, llmtrain.parallel.planning, llmtrain.optim.config, "
        "llmtrain.track.config, llmtrain.optim.schedules\n"
        "print([m for m in ('torch', 'deepspeed', 'transformers', 'wandb', 'numpy') if m in sys.modules])"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_figures() -> None:
    assert [gib(2**30), gib(2**20)] == ["1.00 GiB", "1.0 MiB"]
    assert [quantity(5.229e16, "FLOP"), quantity(12, "FLOP")] == ["52.29 PFLOP", "12 FLOP"]
    assert [duration(30), duration(600), duration(3 * 86400)] == ["30 seconds", "10 minutes", "3 days"]

"""The configuration of a training run, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmtrain.adapt.config import AdapterConfig, LoraConfig, PrefixConfig, PromptConfig
from llmtrain.checkpoint.config import CheckpointConfig
from llmtrain.config import encode, require, require_utf8
from llmtrain.data.config import DataConfig
from llmtrain.errors import Problem
from llmtrain.features.config import FeaturesConfig
from llmtrain.harness.config import HarnessConfig
from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import ModelConfig
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.registry import OBJECTIVES
from llmtrain.optim.config import OptimizerConfig, ScheduleConfig
from llmtrain.parallel.config import BatchConfig, ParallelConfig, Precision
from llmtrain.plan.config import ClusterConfig
from llmtrain.track.config import TrackConfig
from llmtrain.train.early_stopping import EarlyStoppingConfig
from llmtrain.train.embeddings_config import EmbeddingsConfig
from llmtrain.train.method_config import GradualConfig, Method
from llmtrain.train.profile_config import ProfileConfig
from llmtrain.train.spikes_config import OnSpike, SpikesConfig
from llmtrain.train.time_limit import ALLOWED as TIME_ALLOWED
from llmtrain.train.time_limit import seconds_of
from llmtrain.train.transfer_config import TransferConfig
from llmtrain.urls import without_credentials_in
from llmtrain.watch.config import DebugConfig, WatchConfig


@dataclass(frozen=True)
class RunConfig:
    """Name and folder of the run."""

    name: str
    """Name of the run: part of its default folder, and its name in trackers."""
    dir: Path
    """Folder of checkpoints, metrics and the resolved config; created when missing."""

    def problems(self) -> Iterator[Problem]:
        yield from require_utf8("dir", self.dir)


@dataclass(frozen=True)
class StepsConfig:
    """Length of the run, frozen parameters, and how often progress is printed."""

    steps: int = 1000
    """Optimizer steps of the whole run, including those before a resume."""
    epochs: float | None = None
    """Times that the run goes over its data, in place of `steps`; null: `steps` counts."""
    log_every: int = 10
    """Steps between progress lines when the output is not a terminal; metrics are recorded every step."""
    time_limit: str | None = None
    """Time from the start of the job, HH:MM:SS or seconds, before whose end the run saves and stops with exit
    code 75; null: the job's own under Slurm, else none."""
    freeze: tuple[str, ...] = ()
    """fnmatch patterns of the names of parameters that are not trained, such as `blocks.*`. Under ZeRO in
    bf16 or fp16 they are held and saved in that type."""
    on_spike: OnSpike | None = None
    """Action on a step whose loss or gradient norm is not finite, or far above those before. skip:
    the step is left out; rollback: so it is, but after several in a row the run goes back to the last
    checkpoint before them and leaves out the samples since; stop: the run stops before it. null: it stops
    where they are not finite."""
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    """Which steps count as such."""

    def problems(self) -> Iterator[Problem]:
        yield from require(self.steps >= 1, "steps", self.steps, "1 or more")
        epochs = self.epochs
        yield from require(epochs is None or 0 < epochs < 1e6, "epochs", epochs, "more than 0, or null")
        yield from require(self.log_every >= 1, "log_every", self.log_every, "1 or more")
        limit = self.time_limit
        yield from require(limit is None or (seconds_of(limit) or 0) > 0, "time_limit", limit, TIME_ALLOWED)


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out data during training."""

    every: int | None = 500
    """Steps between evaluations; null: never. Otherwise the last step is always followed by one."""
    at_start: bool = True
    """Also evaluate before the first step: the loss of an untrained model should be near ln(vocabulary)."""
    max_samples: int | None = 512
    """Number of sequences of the validation split to evaluate; null: all."""
    written: int | None = None
    """Rows of the validation split whose targets an encoder–decoder over a table writes, for ROUGE, BLEU and
    chrF; null: 32 if the layout allows it."""
    texts: int = 0
    """Beginnings of the validation split, or prompts or sources of a table, after which each evaluation
    writes 32 tokens at most, as samples for the trackers and in samples/ of the run folder; 0 to 64."""

    def problems(self) -> Iterator[Problem]:
        written = self.written
        yield from require(written is None or written >= 0, "written", written, "0 or more, or null")
        yield from require(0 <= self.texts <= 64, "texts", self.texts, "0 to 64")
        yield from require(self.every is None or self.every >= 1, "every", self.every, "1 or more, or null")
        yield from require(
            self.max_samples is None or self.max_samples >= 1,
            "max_samples",
            self.max_samples,
            "1 or more, or null",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of `llmtrain train`, composed by Hydra from conf/train.yaml."""

    run: RunConfig
    model: ModelConfig
    objective: ObjectiveConfig
    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    train: StepsConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    track: TrackConfig
    cluster: ClusterConfig
    method: Method = "full"
    """How a model that has learned is fine-tuned. full: all parameters train, but for those of
    freeze; features: the head is solved over the vectors of the frozen rest; gradual: the head alone trains
    at first, then layer after layer from the top. Of the others small parameters train, and with them the
    head of a task: lora: products of low rank beside the matrices of the layers; adapter: bottlenecks behind
    sublayers; prefix: keys and values before those of each layer; prompt: vectors before the embeddings;
    bitfit: the biases (arXiv:2106.10199)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    gradual: GradualConfig = field(default_factory=GradualConfig)
    embeddings: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    freeze: int = 0
    """Layers, from the bottom, that keep their values, and with them the embeddings; 0: none."""
    precision: Precision = "fp32"
    """Number format of matrix products."""
    engine: Literal["auto", "local", "deepspeed"] = "auto"
    """The engine that runs the steps; auto: deepspeed with ZeRO or a pipeline, else local."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, and dropout."""
    exact_dropout: bool = True
    """Dropout masks are a function of (seed, sample, layer, position), the same in every layout; false: they
    come from a generator, and fused attention kernels can be used."""
    device: str = "auto"
    """auto, cpu or cuda; auto: a GPU if there is one."""

    @property
    def carried_rows(self) -> int | None:
        """Return the rows whose states go on from step to step; None: each begins from zeros."""
        return self.batch.global_size if self.data.continued else None

    def problems(self) -> Iterator[Problem]:
        yield from require(self.device in ("auto", "cpu", "cuda"), "device", self.device, "auto, cpu, cuda")
        yield from require(self.seed >= 0, "seed", self.seed, "0 or more")
        yield from require(self.freeze >= 0, "freeze", self.freeze, "0 or more")
        yield from require(
            self.data.overlap < self.batch.sequence_length,
            "data.overlap",
            self.data.overlap,
            f"less than batch.sequence_length={self.batch.sequence_length}",
        )
        if not self.objective.divides_sequences:
            parallel, allowed = self.parallel, f"with objective={self.objective.kind}, which reads whole rows"
            yield from require(parallel.sequence == 1, "parallel.sequence", parallel.sequence, f"1 {allowed}")
            yield from require(
                not parallel.tensor_sequence, "parallel.tensor_sequence", "true", f"false {allowed}"
            )
        if not self.objective.has_stages:
            stages, allowed = self.parallel.pipeline, f"1 with objective={self.objective.kind}"
            yield from require(stages == 1, "parallel.pipeline", stages, allowed)
        if self.data.continued:
            model, objective = self.model.family, self.objective.kind
            fits = self.model.carries_states and self.objective.continues
            allowed = f"false with model.family={model} and objective={objective}, which carry no state"
            yield from require(fits, "data.continued", True, allowed)
        positions = self.model.max_sequence_length
        yield from require(
            positions is None or self.batch.sequence_length <= positions,
            "batch.sequence_length",
            self.batch.sequence_length,
            f"1 to model.max_sequence_length={positions}",
            f"shorten it or set model.max_sequence_length={self.batch.sequence_length}",
        )
        kind = family_of(self.model).kind
        if self.objective.trains(kind):
            if self.objective.takes_turns:
                allowed = f"with objective={self.objective.kind}, whose parts take turns"
                is_local = self.engine != "deepspeed" and self.parallel.zero == 0
                got = str(self.parallel.zero or self.engine)
                yield from require(is_local, "parallel.zero", got, f"0 and engine=local {allowed}")
                yield from require(self.precision != "fp16", "precision", "fp16", f"fp32, bf16 {allowed}")
            yield from self.objective.length_problems(self.batch.sequence_length, self.model)
            if not self.objective.has_task_head:
                yield from (problem.within("model") for problem in self.model.token_head_problems())
            return
        got = f"{self.objective.kind} with model.family={self.model.family}"
        allowed = ", ".join(name for name, config in OBJECTIVES.items() if config.trains(kind))
        remedy = f"choose another objective=…, or a model of kind {' or '.join(self.objective.teaches)}"
        yield Problem("objective", got, allowed, remedy)


def recorded(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as it is stored, compared and sent: encoded, its URLs without credentials."""
    plain: dict[str, Any] = without_credentials_in(encode(config))
    return plain


def model_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two encoded model configs describe different models, each as `model.key=…`."""
    keys = sorted((set(ours) | set(theirs)) - {"dropout", "init_std"})
    return [
        f"model.{key}={ours.get(key)} here, {theirs.get(key)} there"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]

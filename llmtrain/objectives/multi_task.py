"""Several tasks at once: a head for each over one trunk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from llmtrain.config import require
from llmtrain.errors import Problem
from llmtrain.models.registry import family_of
from llmtrain.nn.model_config import Row
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.base import ObjectiveConfig, SharesTrunk, SpecialIds
from llmtrain.objectives.task import TaskConfig, trunk_ids, trunk_names
from llmtrain.tables.config import SPLITS

if TYPE_CHECKING:
    from llmtrain.data.datasets.base import Dataset
    from llmtrain.objectives.multi_task_loss import MultiTask
    from llmtrain.tokenizers.base import Tokenizer

_NAME = re.compile("[A-Za-z][A-Za-z0-9_]*")
TAKEN = frozenset(
    [
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "clear",
        "compile",
        "cpu",
        "cuda",
        "double",
        "dump_patches",
        "eval",
        "extra_repr",
        "float",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "items",
        "keys",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "pop",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "update",
        "values",
        "xpu",
        "zero_grad",
        "T_destination",
    ]
)
"""Names that torch's modules have themselves, so that no task can."""


@dataclass(frozen=True)
class MultiTaskConfig(ObjectiveConfig):
    """Learn several tasks at once, each with a head and a table of its own, and masked words of unlabelled
    text (data=tasks)."""

    teaches: ClassVar = TaskConfig.teaches
    data: ClassVar = "tasks"
    has_task_head: ClassVar = True
    divides_sequences: ClassVar = False
    has_stages: ClassVar = False

    kind: Literal["multi_task"] = "multi_task"
    tasks: Mapping[str, SharesTrunk] = field(default_factory=dict)
    """Task → its section, with `kind` and the other keys of that objective. One of them may be mlm, which
    reads data.corpora and goes on with the model's own head."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Task → factor of its loss, which is the mean over its targets in the global batch; 1 if it is not
    named."""
    balance: Literal["given", "uncertainty"] = "given"
    """given: by `weights` alone; uncertainty: each task also has a learned variance (Kendall et al.,
    arXiv:1705.07115)."""
    new_head: bool = False
    """Start with new heads where the model has those of these tasks already."""

    def problems(self) -> Iterator[Problem]:
        remedy = "give objective.tasks.NAME.kind=classification"
        yield from require(bool(self.tasks), "tasks", "{}", "a task or more", remedy)
        of_text = [name for name, task in self if not task.has_task_head]
        yield from require(len(of_text) <= 1, "tasks", of_text, "one task of kind mlm at most")
        if self.tasks and len(of_text) == len(self.tasks):
            yield Problem("tasks", "no task with labels", "one at least", "or give objective=mlm")
        lower: dict[str, str] = {}
        for name in self.tasks:
            if not _NAME.fullmatch(name) or name in TAKEN:
                allowed = "letters, digits and _, beginning with a letter, and no word of torch's modules"
                yield Problem("tasks", repr(name), allowed, "name the task otherwise")
            elif (before := lower.setdefault(name.lower(), name)) != name:
                yield Problem("tasks", f"the name {name} beside {before}", "a name of its own for each task")
        for name, weight in self.weights.items():
            if name not in self.tasks:
                yield Problem(f"weights.{name}", "no task", ", ".join(self.tasks), "check the name")
            yield from require(0.0 < weight < float("inf"), f"weights.{name}", weight, "a positive number")

    def measures(self) -> tuple[str, ...]:
        found = [f"{name}/{measure}" for name, task in self.tasks.items() for measure in task.measures()]
        return (*found, *(f"{name}/loss" for name in self.tasks))

    def row(self, sequence_length: int) -> Row:
        rows = [task.row(sequence_length) for task in self.tasks.values()]
        return max(rows, key=lambda row: row.predicted, default=Row(sequence_length, predicted=1))

    def of_task(self, name: str) -> ObjectiveConfig:
        return self.tasks[name]

    def following(self, model: Any) -> ObjectiveConfig:
        return self._with({name: task.following(self._alone(model, name)) for name, task in self})

    def with_labels(self, tables: Any) -> ObjectiveConfig:
        return self._with({name: task.with_labels(tables.by_name[name]) for name, task in self})

    def fitted(self, model: Any) -> Any:
        """Return the model's config with the heads of the tasks."""
        if model.task is not None and self.keeps_head(model):
            return model
        own = {name: task.fitted(replace(model, task=None)) for name, task in self}
        for fitted in own.values():
            model = model if fitted.task is not None else fitted
        heads = tuple(fitted.task or TaskHeadConfig("tokens") for fitted in own.values())
        return replace(
            model,
            task=TaskHeadConfig(
                "several",
                names=tuple(self.tasks),
                heads=heads,
                encoder_only=any(head.encoder_only for head in heads),
                uncertain=self.balance == "uncertainty",
            ),
        )

    def keeps_head(self, model: Any) -> bool:
        before = model.task
        if before is None:
            return True
        is_same = before.names == tuple(self.tasks) and before.uncertain == (self.balance == "uncertainty")
        if self.new_head or not before.heads or not is_same:
            return False
        kinds = before.by_name
        return all(
            task.keeps_head(self._alone(model, name)) and (kinds[name].kind != "tokens") == task.has_task_head
            for name, task in self
        )

    def length_problems(self, sequence_length: int, model: Any) -> Iterator[Problem]:
        sides = {}
        family = family_of(model)
        for name, task in self:
            if family.kind not in task.teaches:
                got, allowed = f"{task.kind} with model.family={family.name}", " or ".join(task.teaches)
                yield Problem(f"objective.tasks.{name}.kind", got, f"a model of kind {allowed}")
                continue
            if not task.has_task_head:
                continue
            alone = self._alone(model, name)
            for problem in task.length_problems(sequence_length, alone):
                where = problem.where.removeprefix("objective.")
                is_own = where != problem.where
                yield replace(problem, where=f"objective.tasks.{name}.{where}" if is_own else problem.where)
            sides[name] = task.fitted(alone).task.encoder_only
        if len(set(sides.values())) > 1:
            read = {True: "the encoder", False: "both sides"}
            got = ", ".join(f"{name} reads {read[side]}" for name, side in sides.items())
            allowed = "the same for all tasks"
            remedy = "give objective.tasks.NAME.trunk=encoder to each"
            yield Problem("objective.tasks", got, allowed, remedy)

    def data_problems(self, data: Any) -> Iterator[Problem]:
        for section, given, has_head in (("tasks", data.tasks, True), ("corpora", data.corpora, False)):
            wanted = [name for name, task in self if task.has_task_head == has_head]
            if set(given) != set(wanted):
                got = ", ".join(given) or "none"
                which = "with labels" if has_head else "of kind mlm"
                allowed = f"{', '.join(wanted) or 'none'}: the tasks of objective.tasks {which}"
                yield Problem(f"data.{section}", got, allowed, f"give data.{section}.NAME.path=… to each")
                return
        for name, task in self:
            section = "tasks" if task.has_task_head else "corpora"
            for problem in task.data_problems(data.of_task(name)):
                yield replace(problem, where=problem.where.replace("data.", f"data.{section}.{name}.", 1))

    def special_ids(self, model: Any, corpora: Any) -> SpecialIds:
        found = trunk_ids(model, corpora)
        heads = found.model.task.by_name
        known = tuple(
            task.head_of(heads[name], corpora.by_name[name]) if isinstance(task, TaskConfig) else heads[name]
            for name, task in self
        )
        return found._replace(model=replace(found.model, task=replace(found.model.task, heads=known)))

    def special_names(self, model: Any, tokenizer: Tokenizer) -> dict[int, str]:
        return trunk_names(model, tokenizer)

    def open(
        self, model: Any, data: Any, corpora: Any, split: str, sequence_length: int
    ) -> dict[str, Dataset]:
        """Return task → its rows of the split, for the tasks that have some."""
        from llmtrain.data.datasets.several import rows_of_tasks
        from llmtrain.errors import DataError

        def opened(name: str, of_split: str) -> Dataset:
            arguments = self._alone(model, name), data.of_task(name), corpora.by_name[name]
            return self.tasks[name].open(*arguments, of_split, sequence_length)[""]

        found = {name: opened(name, split) for name in self.tasks if name not in corpora.without(split)}
        if not found or (split == "train" and len(found) < len(self.tasks)):
            lacking = next(name for name in self.tasks if name not in found)
            where, remedy = corpora.by_name[lacking].where, f"give data.tasks.{lacking}.{split}=…"
            raise DataError(Problem(where, f"no split {split!r}", f"one for the task {lacking}", remedy))
        others = {
            name: found[name] if name in found else opened(name, _a_split(corpora.by_name[name]))
            for name in self.tasks
        }
        return rows_of_tasks(found, others)

    def build(self, model: Any, data: Any, corpora: Any = None) -> MultiTask:
        from llmtrain.objectives.multi_task_loss import MultiTask

        tasks = {
            name: task.build(self._alone(model, name), data.of_task(name), corpora and corpora.by_name[name])
            for name, task in self
        }
        weights = [self.weights.get(name, 1.0) for name in self.tasks]
        return MultiTask(model, tasks, weights)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[str, SharesTrunk]]:
        return iter(self.tasks.items())

    def _with(self, tasks: Mapping[str, ObjectiveConfig]) -> MultiTaskConfig:
        return replace(self, tasks=tasks)  # type: ignore[arg-type]

    def _alone(self, model: Any, name: str) -> Any:
        """Return the model's config with the head of one task, if it has that."""
        several = model.task
        return replace(model, task=None if several is None else several.by_name.get(name))


def _a_split(source: Any) -> str:
    """Return a split that a table or corpus has."""
    return next(split for split in SPLITS if not source.without(split))

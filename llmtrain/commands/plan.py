"""`llmtrain plan`: what a run will need, without starting it; `llmtrain plan search`: the best layout;
`llmtrain plan calibrate`: this machine as a cluster."""

from __future__ import annotations

import json
import shlex
import socket
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeVar

from llmtrain import files
from llmtrain.config import decode
from llmtrain.distributed import launcher
from llmtrain.dry_run import report as dry_run_report
from llmtrain.dry_run.ranks import ranks_of, rehearse_each
from llmtrain.errors import ConfigError
from llmtrain.files import expand_home
from llmtrain.output import check_new_output, write_output
from llmtrain.plan import budget as budgets
from llmtrain.plan import report, search_report
from llmtrain.plan.advice import best_change, compared
from llmtrain.plan.estimate import Plan, available_bytes, estimate
from llmtrain.plan.fit import refuse_if_too_large
from llmtrain.plan.interleaving import interleaving_problem
from llmtrain.plan.keys import PlanKeys, SearchKeys
from llmtrain.plan.search import search as search_space
from llmtrain.plan.space import Choice
from llmtrain.preflight.config import CalibrateConfig
from llmtrain.standard_streams import print_note
from llmtrain.train.auto_layout import choice_of, space_of
from llmtrain.train.resolve import Resolved, resolve
from llmtrain.train.vectors_config import refuse_word_vectors

Keys = TypeVar("Keys", bound=PlanKeys)

CHOSEN = ("parallel=", "parallel.", "batch.micro_size=", "recompute=", "recompute.", "world_size=")
"""Beginnings of overrides that a search chooses anew."""
OF_SEARCH = ("rank_by=", "objective=time", "objective=memory", "objective=cost", "top=", "format=")


def run(mapping: Mapping[str, Any]) -> None:
    """Print the plan. Raise ConfigError when the run would be refused; as text, also when it does not fit."""
    refuse_word_vectors(mapping, "plan")
    keys, settings = _divided(mapping, PlanKeys)
    resolved = resolve(settings, keys.world_size, data_optional=True)
    plan = _plan(resolved, keys)
    bought = budgets.budgeted(keys.budget, plan) if keys.budget.is_given else None
    ranks = ranks_of(keys.rank, resolved.layout.world_size) if keys.dry_run else []
    rehearsals = rehearse_each(resolved, ranks) if ranks else iter(())
    if keys.format == "json":
        found = report.as_json(plan)
        if bought is not None:
            found["budget"] = asdict(bought)
        of_ranks = [dry_run_report.as_json(rehearsal, plan) for rehearsal in rehearsals]
        if len(ranks) == 1:
            [found["dry_run"]] = of_ranks
        elif ranks:
            found["dry_runs"] = of_ranks
        print(json.dumps(found, indent=2))
        return
    print(report.table(plan))
    if resolved.config.parallel.auto:
        print(f"parallel=auto chose {' '.join(own_choice(resolved).overrides())}")
    done = []
    for rehearsal in rehearsals:
        print("\n".join(dry_run_report.lines(rehearsal, plan)), flush=True)
        done.append(rehearsal)
    if len(ranks) > 1:
        print("\n".join(dry_run_report.summary(done, plan)))
    if bought is not None:
        print("\n".join(budgets.lines(bought, plan)))
    if plan.time is not None and (
        help_ := best_change(space_of(plan, resolved.config, settings["engine"]), own_choice(resolved))
    ):
        print(f"what helps most: {help_}")
    refuse_if_too_large(plan)


def calibrate(mapping: Mapping[str, Any]) -> None:
    """Measure this machine and write it as a cluster file."""
    config = decode(CalibrateConfig, mapping)
    output = expand_home(config.output)
    check_new_output(output, config.overwrite)

    from llmtrain.preflight.calibrate import calibrate as measured
    from llmtrain.preflight.cluster_file import text_of

    text = text_of(measured(config), f"Measured by llmtrain plan calibrate on {socket.gethostname()}.")
    write_output(output, lambda path: files.write_atomically(path, text))
    print(text, end="")
    chosen = f"--config-dir {output.absolute().parent.parent} cluster={output.stem}"
    if output.absolute().parent.name != "cluster":
        chosen = f"--config-dir FOLDER cluster={output.stem} once it lies in FOLDER/cluster"
    print_note(f"wrote {output}; choose it by {chosen}")


def search(mapping: Mapping[str, Any]) -> None:
    """Print the best layouts. Raise ConfigError when there is none, or none that fits."""
    refuse_word_vectors(mapping, "plan search")
    keys, settings = _divided(mapping, SearchKeys)
    world_size = keys.world_size or launcher.world_size()
    own: Choice | None = None
    why: str | None = None
    whose = "your own choice" if _chooses() else "the default layout"
    try:
        resolved = resolve(settings, world_size, data_optional=True)
        own = own_choice(resolved)
        plan = _plan(resolved, keys)
    except ConfigError as error:
        # The settings may be right but for the layout, which is what is sought.
        own = None
        resolved = _on_one_process(settings)
        plan = _estimate(resolved, keys)
        why = f"{whose} cannot run: {str(error).splitlines()[0]}"
    available = available_bytes(plan.cluster, plan.conditions.device, world_size)
    plan = replace(plan, available_bytes=available)
    is_here = resolved.config.cluster.is_local
    space = space_of(plan, resolved.config, settings["engine"], on_this_machine=is_here)
    found = search_space(space, world_size, keys.rank_by, keys.top, own)
    if found.own is not None:
        fits = available is None or found.own.memory_bytes <= available
        why = compared(space, found.own, found.best[0], keys.rank_by, whose) if fits else None
        why = why or f"{whose} does not fit into memory"
    first = _with_choice(plan, found.best[0].choice)
    bought = budgets.budgeted(keys.budget, first) if keys.budget.is_given else None
    command = _command()
    if keys.format == "json":
        as_json = search_report.as_json(found, command, why)
        if bought is not None:
            as_json["budget"] = asdict(bought)
        print(json.dumps(as_json, indent=2))
    else:
        print("\n".join(search_report.lines(found, command, why)))
        if bought is not None:
            print("\n".join(budgets.lines(bought, first)))


def _with_choice(plan: Plan, choice: Choice) -> Plan:
    conditions = replace(plan.conditions, recompute=choice.recompute)
    return replace(plan, layout=choice.layout, conditions=conditions)


def _on_one_process(settings: Mapping[str, Any]) -> Resolved:
    """Resolve the run on one process, in the layout that every run has."""
    batch = {**settings["batch"], "micro_size": 1}
    return resolve(
        {**settings, "parallel": {}, "recompute": {}, "batch": batch, "engine": "auto"}, 1, data_optional=True
    )


def own_choice(resolved: Resolved) -> Choice:
    """Return the choice that the user made."""
    return choice_of(resolved.config, resolved.layout)


def _plan(resolved: Resolved, keys: PlanKeys) -> Plan:
    """Return the plan. Raise ConfigError where the assumed schedule does not suit the layout."""
    chunks = keys.assume.virtual_stages
    if problem := interleaving_problem(resolved.config.model, resolved.layout, chunks):
        raise ConfigError(problem)
    return _estimate(resolved, keys)


def _estimate(resolved: Resolved, keys: PlanKeys) -> Plan:
    """Return the plan of a run with the assumptions of the keys."""
    return estimate(resolved.config.model, resolved.layout, resolved.config, resolved.trainable, keys.assume)


def _divided(mapping: Mapping[str, Any], cls: type[Keys]) -> tuple[Keys, dict[str, Any]]:
    """Return the keys of the verb, and the settings of the run."""
    names = {field.name for field in fields(cls)}
    keys = decode(cls, {name: value for name, value in mapping.items() if name in names})
    return keys, {name: value for name, value in mapping.items() if name not in names}


def _words() -> list[str]:
    """Return the overrides of this command."""
    words = launcher.command()[2:]  # without the program and the verb
    return words[1:] if words[:1] == ["search"] else words


def _chooses() -> bool:
    """Return whether an override says something of the layout."""
    return any(word.lstrip("+").startswith(CHOSEN[:-1]) for word in _words())


def _command() -> list[str]:
    """Return `llmtrain plan` with the overrides of this command that a search does not choose."""
    kept = [
        word
        for word in _words()
        if word.startswith("parallel.elastic=") or not word.lstrip("+").startswith((*CHOSEN, *OF_SEARCH))
    ]
    return ["llmtrain", "plan", *map(shlex.quote, kept)]

"""Compose a verb's configuration by Hydra and run the verb on it: once, or once for each job of a sweep."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain import standard_streams
from llmtrain.cli import experiments, sweep_table, verbs
from llmtrain.cli.explain import conf_folder, explain, plain_help, print_problems, second_help
from llmtrain.cli.overrides import (
    OVERRIDE,
    quote,
    quote_text,
    refuse_unreadable,
    refuse_unusable,
    swept_keys,
    text_keys,
    with_present_keys,
)
from llmtrain.cli.repeated import refuse_repeated
from llmtrain.cli.sweep_table import SweptJob
from llmtrain.config import short
from llmtrain.distributed import launcher
from llmtrain.errors import INTERRUPTED_EXIT_CODE, ConfigError, Problem, UserError
from llmtrain.files import expand_home
from llmtrain.standard_streams import print_note
from llmtrain.sweeps import job_folder

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

HYDRA_SETTINGS = (
    # llmtrain keeps its own run folder and logs.
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)
TRAINS = ("train", "finetune")
"""Verbs whose jobs leave figures."""
HYDRA_OVERRIDE = re.compile(r"^[+~]*hydra[./=@]|\$\{hydra:")
"""An override of Hydra's own settings, or one that refers to them."""


class _SweepInterrupted(BaseException):
    """A job was asked to stop, which ends the sweep. Not an Exception: Hydra would keep it until the end."""


def run(name: str, arguments: list[str]) -> int:
    """Run the verb whose configuration is `name` with flags and overrides as typed; return the exit code.

    Raises UserError for mistakes of the user, in a sweep one error with the problems of all jobs. The first
    crash of a job is raised after the other jobs have run.
    """
    overrides = with_present_keys([argument for argument in arguments if OVERRIDE.match(argument)])
    flags = [argument for argument in arguments if not OVERRIDE.match(argument)]
    sweeps = "hydra.mode=MULTIRUN" in overrides or any(
        flag == "-m" or (len(flag) > 3 and "--multirun".startswith(flag)) for flag in flags
    )
    if verbs.has_model_group(name):
        from llmtrain.cli import search_path

        search_path.extend()
    keys = text_keys(name) if overrides else {}
    refuse_unusable(flags, overrides, keys)
    refuse_repeated(overrides)
    quoted = [quote(override, keys, sweeps=sweeps) for override in overrides]
    refuse_unreadable(quoted)
    of_experiment = experiments.swept_keys(quoted)
    swept = swept_keys(quoted) | of_experiment
    sweeps = sweeps or bool(of_experiment)
    jobs = _Jobs(name, swept if sweeps else set())
    if flags or swept or any(HYDRA_OVERRIDE.search(override) for override in overrides):
        try:
            _run_by_hydra(name, [*flags, *_hydra_settings(name)], quoted, jobs)
        except _SweepInterrupted:
            print_problems(jobs.problems)
            return INTERRUPTED_EXIT_CODE
    else:
        jobs.run(_compose(name, quoted))
    jobs.print_table()
    return jobs.exit_code()


def composed(name: str, overrides: list[str]) -> dict[str, Any]:
    """Return the configuration `name` with overrides as typed. Raise UserError for mistakes of the user."""
    if verbs.has_model_group(name):
        from llmtrain.cli import search_path

        search_path.extend()
    keys = text_keys(name)
    overrides = with_present_keys(overrides)
    refuse_unusable([], overrides, keys)
    refuse_repeated(overrides)
    quoted = [quote(override, keys) for override in overrides]
    refuse_unreadable(quoted)
    return _Jobs(name, set()).plain(_compose(name, quoted))


def _compose(name: str, quoted: list[str]) -> DictConfig:
    """Return the configuration `name` with overrides. Raises ConfigError for what Hydra refuses.

    In half the time that Hydra's application takes, which composes it twice: once to find out its mode.
    """
    from hydra import compose, initialize_config_dir

    with _explained(name), initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return compose(config_name=name, overrides=quoted)


def _run_by_hydra(name: str, settings: list[str], quoted: list[str], jobs: _Jobs) -> None:
    """Run Hydra's application, with its flags and settings: a sweep, its help, a shown configuration."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    def job(config: DictConfig) -> None:  # a function, since Hydra looks at its name and file
        hydra_config: Any = HydraConfig.get()
        jobs.run(config, hydra_config if str(hydra_config.mode).endswith("MULTIRUN") else None)

    # Makes Hydra raise errors instead of printing a summary and ending the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    app = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=name)(job)
    with tempfile.TemporaryDirectory() as sweep:  # Hydra leaves a file there for each sweep
        # argparse takes overrides only in one sequence, after the flags.
        sys.argv = [f"llmtrain {name.replace('_', ' ')}", *settings, f"hydra.sweep.dir='{sweep}'", *quoted]
        with _explained(name):
            app()


def _hydra_settings(name: str) -> list[str]:
    settings = list(HYDRA_SETTINGS)
    verb, _, second = name.partition("_")
    if second in verbs.SECOND_VERBS.get(verb, {}):
        settings.append(f"hydra.help.template={quote_text(second_help(name))}")
    if name in verbs.PLAIN_WORDS:
        settings.append(f"hydra.help.template={quote_text(plain_help(name))}")
    return settings


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raise ConfigError for what Hydra or OmegaConf refuses of the configuration `name`."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, name)) from error


@dataclass
class _Jobs:
    """The jobs of one command and how they ended."""

    name: str
    """Name of the configuration."""
    swept: set[str]
    """Keys that have several values in the sweep."""
    codes: list[int] = field(default_factory=lambda: [0])
    failures: list[UserError] = field(default_factory=list)
    """Kept from Hydra, which would print lines of its own about them."""
    crashes: list[Exception] = field(default_factory=list)
    ended: list[SweptJob] = field(default_factory=list)
    """Jobs of a sweep that train."""
    folders: list[Path] = field(default_factory=list)
    """The run folder of each of them, without the part that is its own."""

    @property
    def problems(self) -> list[Problem]:
        """The problems of all failed jobs."""
        return [problem for failure in self.failures for problem in failure.problems]

    def run(self, config: DictConfig, sweep: HydraConf | None = None) -> None:
        """Run one job on its composed configuration; keep its exit code, its failure or its crash.

        sweep: what Hydra says of the job, if it is one of a sweep.
        """
        folder: Path | None = None
        before = len(self.codes)
        try:
            composed = self.plain(config)
            if sweep is not None and isinstance(composed.get("run"), dict):
                # The jobs of a sweep must neither share a run folder nor resume a run of other values.
                base = Path(composed["run"]["dir"])
                folder = base / job_folder(list(sweep.overrides.task), self.swept - {"run.dir"})
                composed["run"]["dir"] = str(folder)
                self.folders.append(base)
            if self.name in verbs.DOES_MORE_THAN_PRINT:
                standard_streams.tolerate_lost_output()
            self.codes.append(_run_verb(self.name, composed))
            if sweep is not None and self.codes[-1] == INTERRUPTED_EXIT_CODE:
                raise _SweepInterrupted
        except UserError as error:
            if sweep is not None:
                prefix = f"job {sweep.job.num}: "
                error.problems = tuple(replace(p, where=prefix + p.where) for p in error.problems)
            self.failures.append(error)
        except Exception as error:
            self.crashes.append(error)
        if sweep is not None and folder is not None and self.name in TRAINS:
            is_complete = len(self.codes) > before
            overrides = list(sweep.overrides.task)
            self.ended.append(SweptJob.of(overrides, self.swept, expand_home(folder), is_complete))

    def print_table(self) -> None:
        """Print the figures of the jobs of a sweep that trained, and write them beside their folders."""
        if not self.ended or launcher.rank() != 0:
            return
        try:
            folders = [expand_home(folder) for folder in self.folders]
            for line in sweep_table.report(self.ended, folders):
                print(line, flush=True)
            if (drawn := sweep_table.draw_curves(self.ended, folders)) is not None:
                print(f"curves drawn in {drawn}", flush=True)
        except OSError as error:
            print_note(f"warning: the table of the sweep could not be written: {error}")

    def plain(self, config: DictConfig) -> dict[str, Any]:
        """Return the configuration as dicts and lists. Raises ConfigError for one that cannot be resolved."""
        from omegaconf import OmegaConf

        with _explained(self.name):
            mapping = OmegaConf.to_container(config, resolve=True)
        assert isinstance(mapping, dict)
        composed: dict[str, Any] = {str(key): value for key, value in mapping.items()}
        composed.pop("experiment", None)
        return composed

    def exit_code(self) -> int:
        """Return the largest exit code; raise the first crash, or else the failures of all jobs as one."""
        if self.crashes:
            print_problems(self.problems)
            raise self.crashes[0]
        if len(self.failures) == 1:
            raise self.failures[0]
        if self.failures:
            together = type(self.failures[0])(self.problems)
            together.everywhere = all(failure.everywhere for failure in self.failures) or None
            raise together
        return max(self.codes)


def _run_verb(name: str, composed: dict[str, Any]) -> int:
    """Run the verb and return its exit code. Raises ConfigError for a path too long for the file system."""
    try:
        return verbs.runner(name)(composed) or 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        allowed = "at most 255 bytes between two slashes"
        raise ConfigError(Problem(short(str(error.filename)), "a name that is too long", allowed)) from error

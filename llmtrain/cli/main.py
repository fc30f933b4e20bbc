"""The command line: `llmtrain VERB key=value …`, each verb a Hydra app over conf/VERB.yaml.

Hydra is imported here alone, and only once a verb is known, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtrain import standard_streams
from llmtrain.cli.overrides import (
    OVERRIDE,
    quote,
    quote_text,
    refuse_unreadable,
    refuse_unusable,
    swept_keys,
    text_keys,
)
from llmtrain.config import short
from llmtrain.distributed import launcher, stopping
from llmtrain.errors import EXIT_CODE, INTERRUPTED_EXIT_CODE, ConfigError, Problem, UserError, nearest
from llmtrain.orphans import end_with_launcher
from llmtrain.sweeps import job_folder

VERBS: dict[str, tuple[str, str]] = {
    "prepare": ("llmtrain.commands.prepare", "raw text → tokenizer and sharded corpus"),
    "plan": ("llmtrain.commands.plan", "will it run, will it fit, how large is a step; no GPU needed"),
    "train": ("llmtrain.commands.train", "corpus → trained model; resumes by itself"),
    "evaluate": ("llmtrain.commands.evaluate", "loss, perplexity and bits per byte of a trained model"),
    "generate": ("llmtrain.commands.generate", "text from a trained language model"),
    "import": ("llmtrain.commands.import_", "Hugging Face folder or GGUF file → checkpoint"),
    "export": ("llmtrain.commands.export", "trained model → Hugging Face folder"),
    "checkpoint": ("llmtrain.commands.checkpoint", "verify, show, compare, export or prune checkpoints"),
    "data": ("llmtrain.commands.data", "which documents made a step, what they say, one hash over a run's"),
}
"""Verb → module with `run(mapping)`, and what it does."""

SECOND_VERBS: dict[str, dict[str, tuple[str, str]]] = {
    "checkpoint": {
        "verify": ("PATH", "files by size and checksum, tensors whole; exits with 2 when one is damaged"),
        "show": ("PATH", "step, model, layout it was saved under, files, tensors"),
        "diff": ("PATH OTHER", "how far two are apart, tensor by tensor; exits with 1 when they differ"),
        "export": ("PATH", "→ Hugging Face folder output=…"),
        "prune": ("PATH", "delete what keep_last, keep_best and keep_every do not keep"),
    },
    "data": {
        "trace": ("RUN", "the documents of step=…; exits with 1 when the data have changed since"),
        "show": ("[RUN]", "samples of step=…, or the first of data.path=…, as text"),
        "digest": ("RUN", "one hash over what the first steps=… consumed"),
    },
}
"""Verb → verb after it → the keys whose values stand before the overrides (in brackets: or nowhere), and
what it does. Each has a function in the module and conf/VERB_VERB.yaml."""

FOLDERS = {
    "path": "a run folder or a checkpoint folder",
    "other": "a run folder or a checkpoint folder",
    "run": "a run folder",
}
"""Key of a value that stands before the overrides → what it may be."""

HYDRA_SETTINGS = (
    # llmtrain keeps its own run folder and logs.
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

DOES_MORE_THAN_PRINT = {"prepare", "train", "import", "export", "checkpoint_export", "checkpoint_prune"}
"""Verbs whose work goes on where nothing can be printed of it."""

SILENCE_SECONDS = 5.0
"""How long a rank that leaves the message to another waits before it ends: a launcher ends all ranks as
soon as one has, and could cut the message off."""

LOST_SECONDS = 3.0
"""How long a rank that lost another waits before it says so: the one that ended tells the cause, and a
launcher that noticed asks this rank to end meanwhile."""


class _SweepInterrupted(BaseException):
    """A job was asked to stop, and so is the sweep: no Exception, which Hydra would keep until its end."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with the verb's exit code."""
    standard_streams.replace_streams()
    try:
        try:
            code = _answer(sys.argv[1:] if arguments is None else arguments)
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
    except standard_streams.OutputLost as lost:
        print_problems(lost.problems)
        code = lost.exit_code
    finish(code)


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from importlib import metadata

        print(f"llmtrain {metadata.version('llmtrain')}")
        return 0
    launcher.set_command([sys.argv[0], *arguments])
    end_with_launcher()
    verb = arguments[0]
    if verb not in VERBS:
        print_problems([Problem("llmtrain", repr(verb), nearest(verb, list(VERBS)), "see llmtrain --help")])
        return EXIT_CODE
    # A job may be asked to stop while its configuration is still composed.
    with stopping.request.listening() if verb == "train" else nullcontext():
        return run_verb(verb, arguments[1:])


def usage() -> str:
    """What `llmtrain --help` prints."""
    lines = ["llmtrain trains large models.", "", "usage: llmtrain VERB [key=value …]", ""]
    lines += [f"  {verb:<10}{purpose}" for verb, (_, purpose) in VERBS.items()]
    lines += [
        "",
        "llmtrain VERB --help lists a verb's keys; --cfg job prints its configuration, --multirun sweeps.",
        "Many processes: torchrun --nproc-per-node 8 -m llmtrain train …",
        "Many hosts: launch/torchrun.sh, launch/slurm.sbatch",
    ]
    return "\n".join(lines)


def run_verb(verb: str, arguments: list[str]) -> int:
    """Compose the verb's configuration and run it; → exit code, its problems printed."""
    if verb in SECOND_VERBS and (not arguments or arguments[0] in ("-h", "--help", "help")):
        print(second_usage(verb))
        return 0
    try:
        if verb in SECOND_VERBS:
            verb, arguments = second_verb(verb, arguments)
        return _run_hydra(verb, arguments)
    except UserError as error:
        if _speaks(error):
            print_problems(error.problems)
        else:
            time.sleep(SILENCE_SECONDS)
            # Still here: the rank that would have spoken does well, so the mistake is this rank's own.
            if not error.everywhere:
                prefix = f"rank {launcher.rank()}: "
                print_problems([replace(p, where=prefix + p.where) for p in error.problems])
        return EXIT_CODE
    except KeyboardInterrupt:
        print("llmtrain: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        from llmtrain.files import is_disk_full

        if not is_disk_full(error):
            raise
        where = str(error.filename or "the disk")
        print_problems([Problem(where, "a full disk", "", "make room, then run the same command again")])
        return EXIT_CODE
    except RuntimeError as error:
        _leave_if_lost(error)
        raise


def second_usage(verb: str) -> str:
    """What `llmtrain checkpoint --help` prints, and its like."""
    described = {f"{second} {keys}": purpose for second, (keys, purpose) in SECOND_VERBS[verb].items()}
    width = max(map(len, described)) + 2
    named = dict.fromkeys(key for keys, _ in SECOND_VERBS[verb].values() for key in _keys(keys))
    first = next(iter(named))
    lines = [f"usage: llmtrain {verb} VERB {first.upper()} [key=value …]", ""]
    lines += [f"  {words:<{width}}{purpose}" for words, purpose in described.items()]
    lines += ["", f"{first.upper()} is {FOLDERS[first]}. VERB --help lists a verb's keys."]
    return "\n".join(lines)


def second_verb(verb: str, arguments: list[str]) -> tuple[str, list[str]]:
    """`VERB PATH …` → the name of its configuration, and arguments with keys before the paths.

    Raises ConfigError for an unknown verb and for a path left out.
    """
    second, *rest = arguments
    if second not in SECOND_VERBS[verb]:
        known = nearest(second, list(SECOND_VERBS[verb]))
        raise ConfigError(Problem(f"llmtrain {verb}", repr(second), known, f"see llmtrain {verb} --help"))
    words = SECOND_VERBS[verb][second][0]
    for key, is_needed in _keys(words).items():
        # A path may hold a `=`, a key no `/`.
        is_path = (
            rest and not rest[0].startswith("-") and ("/" in rest[0].partition("=")[0] or "=" not in rest[0])
        )
        if is_path:
            rest = [*rest[1:], f"{key}={rest[0]}"]
        elif is_needed and not any(word.startswith((f"{key}=", "-")) for word in rest):
            raise ConfigError(Problem(key, "nothing", FOLDERS[key], f"llmtrain {verb} {second} {words}"))
    return f"{verb}_{second}", rest


def _keys(words: str) -> dict[str, bool]:
    """ "PATH [OTHER]" → {"path": True, "other": False}: whether each must be given."""
    return {word.strip("[]").lower(): not word.startswith("[") for word in words.split()}


def _help(verb: str) -> str:
    """What `llmtrain checkpoint VERB --help` prints, and its like."""
    first, _, second = verb.partition("_")
    usage = f"usage: llmtrain {first} {second} {SECOND_VERBS[first][second][0]} [key=value …]"
    return f"{usage}\n\n{(conf_folder() / f'{verb}.yaml').read_text()}"


def _runner(verb: str) -> Callable[[Mapping[str, Any]], int | None]:
    """What a verb does with its composed configuration; it may return an exit code."""
    name, _, function = verb.partition("_")
    return getattr(importlib.import_module(VERBS[name][0]), function or "run")


def _run_verb_on(composed: dict[str, Any], verb: str) -> int:
    """Run a verb; return its exit code. A path that no file system takes is the user's, wherever it stood."""
    try:
        return _runner(verb)(composed) or 0
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        allowed = "at most 255 bytes between two slashes"
        raise ConfigError(Problem(short(str(error.filename)), "a name that is too long", allowed)) from error


def _run_hydra(verb: str, arguments: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    codes = [0]
    # Kept from Hydra, which would print lines of its own about them.
    failures: list[UserError] = []
    crashes: list[Exception] = []
    overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    flags = [argument for argument in arguments if not OVERRIDE.match(argument)]
    sweeps = "hydra.mode=MULTIRUN" in overrides or any(
        flag == "-m" or (len(flag) > 3 and "--multirun".startswith(flag)) for flag in flags
    )
    keys = text_keys(verb) if overrides else {}
    refuse_unusable(flags, overrides, keys)
    quoted = [quote(override, keys, sweeps=sweeps) for override in overrides]
    refuse_unreadable(quoted)
    swept = swept_keys(quoted) - {"run.dir"} if sweeps else set()

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        multirun = str(hydra_config.mode).endswith("MULTIRUN")
        try:
            try:
                mapping = OmegaConf.to_container(config, resolve=True)
            except OmegaConfBaseException as error:
                raise ConfigError(explain(error, verb)) from error
            assert isinstance(mapping, dict)
            composed: dict[str, Any] = {str(key): value for key, value in mapping.items()}
            composed.pop("experiment", None)
            if multirun and isinstance(composed.get("run"), dict):
                # Jobs of a sweep must not share a run folder, nor go on from one of other values.
                name = job_folder(list(hydra_config.overrides.task), swept)
                composed["run"]["dir"] = str(Path(composed["run"]["dir"]) / name)
            if verb in DOES_MORE_THAN_PRINT:
                standard_streams.tolerate_lost_output()
            codes.append(_run_verb_on(composed, verb))
            if multirun and codes[-1] == INTERRUPTED_EXIT_CODE:
                raise _SweepInterrupted
        except UserError as error:
            if multirun:
                prefix = f"job {hydra_config.job.num}: "
                error.problems = tuple(replace(p, where=prefix + p.where) for p in error.problems)
            failures.append(error)
        except Exception as error:
            crashes.append(error)

    # Hydra then raises what happened instead of printing its own summary of it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    app = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=verb)(job)
    with tempfile.TemporaryDirectory() as sweep:  # Hydra leaves a file there for each sweep
        # argparse takes one run of overrides only, after the flags.
        settings = [*HYDRA_SETTINGS, f"hydra.sweep.dir='{sweep}'"]
        if verb.partition("_")[0] in SECOND_VERBS:
            settings.append(f"hydra.help.template={quote_text(_help(verb))}")
        sys.argv = [f"llmtrain {verb.replace('_', ' ')}", *flags, *settings, *quoted]
        try:
            app()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, verb)) from error
        except _SweepInterrupted:
            print_problems([problem for failure in failures for problem in failure.problems])
            return INTERRUPTED_EXIT_CODE
    if crashes:
        print_problems([problem for failure in failures for problem in failure.problems])
        raise crashes[0]
    if len(failures) == 1:
        raise failures[0]
    if failures:
        together = type(failures[0])(problem for failure in failures for problem in failure.problems)
        together.everywhere = all(failure.everywhere for failure in failures) or None
        raise together
    return max(codes)


def conf_folder() -> Path:
    """conf/: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").exists():
            return folder
    raise FileNotFoundError("llmtrain is installed without its conf/ folder")


def explain(error: Exception, verb: str) -> Problem:
    """Hydra's and OmegaConf's complaints about overrides as one problem."""
    cause = error.__cause__ or error
    text = " ".join((str(error) if cause is error else f"{error}\n{cause}").split())
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        return Problem(key, "an unknown key", nearest_keys(key, verb), "check the name, or see --help")
    if match := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = match[1], match[2]
        return Problem(group, repr(option), nearest(option, group_options(group)), f"see conf/{group}/")
    if match := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return Problem(match[1], "an unknown group", nearest(match[1], group_options("")))
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return Problem(match[1].rstrip("."), "nothing", "a value", f"give {match[1].rstrip('.')}=…")
    return Problem("override", text[:300], "key=value in Hydra's grammar", "quote values: 'key=\"a value\"'")


def group_options(group: str) -> list[str]:
    """Options of a config group, or the names of all groups for ''."""
    folder = conf_folder() / group
    if not folder.is_dir():
        return []
    if group == "":
        return sorted(path.name for path in folder.iterdir() if path.is_dir())
    return sorted(path.stem if path.suffix == ".yaml" else path.name for path in folder.glob("*.yaml"))


def nearest_keys(key: str, verb: str) -> str:
    """The verb's keys most like `key`, looked for in its composed configuration."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    known: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for name, value in node.items():
            path = f"{prefix}.{name}" if prefix else str(name)
            known.append(path)
            if isinstance(value, dict):
                walk(value, path)

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        walk(OmegaConf.to_container(compose(config_name=verb), resolve=False), "")
    parent = key.rpartition(".")[0]
    siblings = [name for name in [*known, *group_options("")] if name.rpartition(".")[0] == parent]
    return nearest(key, siblings or known)


def print_problems(problems: tuple[Problem, ...] | list[Problem]) -> None:
    for problem in problems:
        print(f"llmtrain: error: {problem}", file=sys.stderr)


def _speaks(error: UserError) -> bool:
    """Whether this process prints the error: what all ranks find is told by one of them."""
    if launcher.world_size() == 1:
        return True
    if error.everywhere is not None:
        return launcher.rank() == 0 or not error.everywhere
    torch_distributed = sys.modules.get("torch.distributed")
    started = torch_distributed is not None and torch_distributed.is_initialized()
    if not started:
        return launcher.local_rank() == 0
    return True


def _leave_if_lost(error: RuntimeError) -> None:
    """End the process, without waiting for others, if `error` tells that another rank is gone."""
    if "llmtrain.distributed.processes" in sys.modules:
        from llmtrain.distributed import processes

        said = processes.lost_rank(error)
        if said is not None:
            processes.finish(tell_lost_rank(said), together=False)


def tell_lost_rank(said: str) -> int:
    """Say that another rank is gone, unless this one is asked to end as well; → exit code."""
    told_by_now = time.monotonic() + LOST_SECONDS
    while not stopping.request.asked and time.monotonic() < told_by_now:
        time.sleep(0.05)
    if stopping.request.asked:
        return INTERRUPTED_EXIT_CODE
    where, got = f"rank {launcher.rank()}", f"a lost connection to another rank ({said})"
    print_problems([Problem(where, got, remedy="that process ended; its own message tells why")])
    return 1


def finish(exit_code: int) -> None:
    """End the process; ranks of a group leave it together and skip gloo's fragile shutdown."""
    if "llmtrain.distributed.processes" in sys.modules:
        from llmtrain.distributed import processes

        try:
            processes.finish(exit_code)
        except RuntimeError as error:
            _leave_if_lost(error)
            raise
    sys.exit(exit_code)

"""The command line: `llmtrain VERB key=value …`, each verb a Hydra app over conf/VERB.yaml.

Hydra is imported here alone, and only once a verb is known, so that `llmtrain --help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmtrain.errors import EXIT_CODE, ConfigError, Problem, UserError, nearest
from llmtrain.parallel import launcher

VERBS: dict[str, tuple[str, str]] = {
    "prepare": ("llmtrain.commands.prepare", "raw text → tokenizer and sharded corpus"),
    "plan": ("llmtrain.commands.plan", "will it run, will it fit, how large is a step; no GPU needed"),
    "train": ("llmtrain.commands.train", "corpus → trained model; resumes by itself"),
    "evaluate": ("llmtrain.commands.evaluate", "loss, perplexity and bits per byte of a trained model"),
    "generate": ("llmtrain.commands.generate", "text from a trained language model"),
    "export": ("llmtrain.commands.export", "trained model → Hugging Face folder"),
}
"""Verb → module with `run(mapping)`, and what it does."""

FREE_TEXT = {"prompt", "prompt_file", "source", "output", "checkpoint", "data.path", "run.dir", "run.name"}
FREE_TEXT |= {"checkpoint.resume", "tokenizer.model"}
"""Keys whose values are a person's words or paths: quoted for Hydra's grammar where it would trip."""

HYDRA_SETTINGS = (
    # llmtrain keeps its own run folder and logs.
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)

SILENCE_SECONDS = 5.0
"""How long a rank that leaves the message to another waits before it ends: a launcher ends all ranks as
soon as one has, and could cut the message off."""

OVERRIDE = re.compile(r"\+{0,2}[\w./@-]+=|~[\w./@-]+", re.ASCII)
"""key=value, +key=value, ++key=value, ~key."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with the verb's exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        from importlib import metadata

        print(f"llmtrain {metadata.version('llmtrain')}")
        sys.exit(0)
    verb = arguments[0]
    if verb not in VERBS:
        print_problems([Problem("llmtrain", repr(verb), nearest(verb, list(VERBS)), "see llmtrain --help")])
        sys.exit(EXIT_CODE)
    finish(run_verb(verb, arguments[1:]))


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
    try:
        _run_hydra(verb, arguments)
    except UserError as error:
        if _speaks(error):
            print_problems(error.problems)
        else:
            time.sleep(SILENCE_SECONDS)
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
    return 0


def _run_hydra(verb: str, arguments: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    failures: list[UserError] = []  # kept from Hydra, which would print lines of its own about them

    def job(config: DictConfig) -> None:
        mapping = OmegaConf.to_container(config, resolve=True)
        assert isinstance(mapping, dict)
        composed: dict[str, Any] = {str(key): value for key, value in mapping.items() if key != "experiment"}
        hydra_config = HydraConfig.get()
        if str(hydra_config.mode).endswith("MULTIRUN") and "run" in composed:
            # Jobs of a sweep must not share a run folder.
            composed["run"]["dir"] = str(Path(composed["run"]["dir"]) / str(hydra_config.job.num))
        run: Callable[[Mapping[str, Any]], None] = importlib.import_module(VERBS[verb][0]).run
        try:
            run(composed)
        except UserError as error:
            failures.append(error)

    # Hydra then raises what happened instead of printing its own summary of it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    flags = [argument for argument in arguments if not OVERRIDE.match(argument)]
    app = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=verb)(job)
    with tempfile.TemporaryDirectory() as sweep:  # Hydra leaves a file there for each sweep
        # argparse takes one run of overrides only, after the flags.
        settings = [*HYDRA_SETTINGS, f"hydra.sweep.dir='{sweep}'"]
        sys.argv = [f"llmtrain {verb}", *flags, *settings, *map(quote, overrides)]
        try:
            app()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error, verb)) from error
    if failures:
        raise failures[0]


def conf_folder() -> Path:
    """conf/: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").exists():
            return folder
    raise FileNotFoundError("llmtrain is installed without its conf/ folder")


def quote(argument: str) -> str:
    """`key=words` with the words quoted for Hydra's override grammar, for keys that hold free text.

    Lists, quoted values and what Hydra reads as one plain word stay as they are.
    """
    key, separator, value = argument.partition("=")
    if not separator or key.lstrip("+") not in FREE_TEXT:
        return argument
    plain = re.fullmatch(r"[\w./:+@%-]*", value) is not None and value.strip() != ""
    if plain or (value[:1], value[-1:]) in (("[", "]"), ("'", "'"), ('"', '"')):
        return argument
    # Within quotes the grammar unescapes only backslashes that stand before a quote.
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", value)
    escaped = re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped)
    return f"{key}='{escaped}'"


def explain(error: Exception, verb: str) -> Problem:
    """Hydra's and OmegaConf's complaints about overrides as one problem."""
    cause = error.__cause__ or error
    text = " ".join(f"{error}\n{cause}".split())
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
    if match := re.search(r"[Ee]rror parsing override '(.*?)' (.*?)(?: See http|$)", text):
        return Problem("override", f"{match[1]} ({match[2]})", "key=value", "quote values: 'key=\"a value\"'")
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
    known += group_options("")
    parent = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    found = nearest(key, known)
    return found if not found.endswith(" names") else nearest(key, siblings)


def print_problems(problems: tuple[Problem, ...] | list[Problem]) -> None:
    for problem in problems:
        print(f"llmtrain: error: {problem}", file=sys.stderr)


def _speaks(error: UserError) -> bool:
    """Whether this process prints the error: what all ranks find is told by one of them."""
    if launcher.world_size() == 1:
        return True
    torch_distributed = sys.modules.get("torch.distributed")
    started = torch_distributed is not None and torch_distributed.is_initialized()
    if not started:
        return launcher.local_rank() == 0
    return launcher.rank() == 0 or not error.everywhere


def finish(exit_code: int) -> None:
    """End the process; ranks of a group leave it together and skip gloo's fragile shutdown."""
    if "llmtrain.parallel.distributed" in sys.modules:
        from llmtrain.parallel import distributed

        distributed.finish(exit_code)
    sys.exit(exit_code)

"""Help texts, and Hydra's complaints about overrides told as one-line problems."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmtrain.cli.verbs import CONFIGS, FOLDERS, PLAIN_WORDS, SECOND_VERBS, VERBS, config_types, word_keys
from llmtrain.errors import EXIT_CODE, Problem, nearest


def usage() -> str:
    """Return what `llmtrain --help` prints."""
    lines = ["llmtrain trains large models.", "", "usage: llmtrain VERB [key=value …]", ""]
    lines += [f"  {verb:<10}{purpose}" for verb, (_, purpose) in VERBS.items()]
    lines += [
        "",
        "llmtrain VERB --help lists a verb's keys; --cfg job prints its configuration, --multirun sweeps.",
        "llmtrain keys describes every key of every verb, as conf/README.md does.",
        "Many processes: torchrun --nproc-per-node 8 -m llmtrain train …",
        "Many hosts: launch/torchrun.sh, launch/slurm.sbatch",
    ]
    return "\n".join(lines)


def second_usage(verb: str) -> str:
    """Return what `llmtrain VERB --help` prints for a verb with second verbs."""
    described = {f"{second} {words}": purpose for second, (words, purpose) in SECOND_VERBS[verb].items()}
    width = max(map(len, described)) + 2
    named = dict.fromkeys(key for words, _ in SECOND_VERBS[verb].values() for key in word_keys(words))
    first = next(iter(named))
    lines = [f"usage: llmtrain {verb} VERB {first.upper()} [key=value …]", ""]
    lines += [f"  {words:<{width}}{purpose}" for words, purpose in described.items()]
    lines += ["", f"{first.upper()} is {FOLDERS[first]}. VERB --help lists a verb's keys."]
    return "\n".join(lines)


def second_help(name: str) -> str:
    """Return what `llmtrain VERB SECOND --help` prints; `name` is that of its configuration."""
    verb, _, second = name.partition("_")
    words = [verb, second, SECOND_VERBS[verb][second][0]]
    first_line = f"usage: llmtrain {' '.join(filter(None, words))} [key=value …]"
    return f"{first_line}\n\n{(conf_folder() / f'{name}.yaml').read_text()}"


def plain_help(verb: str) -> str:
    """Return what `llmtrain VERB --help` prints for a verb that takes plain words."""
    words = PLAIN_WORDS[verb].replace("RUNS", "RUN…")
    return f"usage: llmtrain {verb} {words} [key=value …]\n\n{(conf_folder() / f'{verb}.yaml').read_text()}"


def explain(error: Exception, name: str) -> Problem:
    """Return an error that Hydra or OmegaConf raised for an override as a problem.

    name: that of the configuration, in which similar keys are looked for.
    """
    cause = error.__cause__ or error
    text = " ".join((str(error) if cause is error else f"{error}\n{cause}").split())
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        return Problem(key, "an unknown key", nearest_keys(key, name), "check the name, or see --help")
    if match := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = match[1], match[2]
        return Problem(group, repr(option), nearest(option, group_options(group)), f"see conf/{group}/")
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return Problem(match[1].rstrip("."), "nothing", "a value", f"give {match[1].rstrip('.')}=…")
    return Problem("override", text[:300], "key=value in Hydra's grammar", "quote values: 'key=\"a value\"'")


def nearest_keys(key: str, name: str) -> str:
    """Return the keys of the configuration `name` that are most similar to `key`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    known: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for child, value in node.items():
            path = f"{prefix}.{child}" if prefix else str(child)
            known.append(path)
            if isinstance(value, dict):
                walk(value, path)

    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        walk(OmegaConf.to_container(compose(config_name=name), resolve=False), "")
    parent = key.rpartition(".")[0]
    siblings = [path for path in [*known, *group_options("")] if path.rpartition(".")[0] == parent]
    return nearest(key, siblings or known)


def group_options(group: str) -> list[str]:
    """Return the options of a config group; the names of all groups for ""."""
    from llmtrain.models.registry import preset_folders

    folders = [folder / group for folder in (conf_folder(), *preset_folders()) if (folder / group).is_dir()]
    if group == "":
        return sorted({path.name for folder in folders for path in folder.iterdir() if path.is_dir()})
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def conf_folder() -> Path:
    """Return the folder conf/, inside an installed package or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").exists():
            return folder
    raise FileNotFoundError("llmtrain is installed without its conf/ folder")


def print_keys(arguments: list[str]) -> int:
    """Print what every configuration key is, as Markdown, and return the exit code."""
    from llmtrain.commands.keys import page

    if arguments:
        got = repr(arguments[0])
        print_problems([Problem("llmtrain keys", got, "nothing after it", "it prints all keys")])
        return EXIT_CODE
    purposes = {verb: purpose for verb, (_, purpose) in VERBS.items()}
    for verb, seconds in SECOND_VERBS.items():
        purposes |= {f"{verb}_{second}": purpose for second, (_, purpose) in seconds.items()}
    configs: dict[str, type] = {}
    for name in CONFIGS:
        found = config_types(name)
        configs[name] = found[0]
        if name == "train":
            configs["train model=word2vec"] = found[-1]
    purposes["train model=word2vec"] = "texts → word vectors; also with model=fasttext, glove and one_hot"
    print(page(configs, purposes, conf_folder()), end="")
    return 0


def print_problems(problems: Iterable[Problem]) -> None:
    """Print each problem as one line on stderr."""
    for problem in problems:
        print(f"llmtrain: error: {problem}", file=sys.stderr)

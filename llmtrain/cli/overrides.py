"""Overrides as a person types them, and as Hydra has to be given them for llmtrain to get just that.

Hydra's grammar has a meaning for `=`, `,`, brackets and more. Keys that hold text, by the type that the
verb's configuration gives them, hold it as it was typed.
"""

from __future__ import annotations

import importlib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmtrain.config import leaves
from llmtrain.errors import ConfigError, Problem

CONFIGS = {
    "prepare": "llmtrain.prepare.config:PrepareConfig",
    "train": "llmtrain.train.config:TrainConfig",
    "plan": "llmtrain.train.config:TrainConfig",
    "evaluate": "llmtrain.commands.evaluate:EvaluateConfig",
    "generate": "llmtrain.commands.generate:GenerateCommandConfig",
    "import": "llmtrain.commands.import_:ImportConfig",
    "export": "llmtrain.commands.export:ExportConfig",
    "checkpoint_verify": "llmtrain.commands.checkpoint:VerifyConfig",
    "checkpoint_show": "llmtrain.commands.checkpoint:ShowConfig",
    "checkpoint_diff": "llmtrain.commands.checkpoint:DiffConfig",
    "checkpoint_export": "llmtrain.commands.export:ExportConfig",
    "checkpoint_prune": "llmtrain.commands.checkpoint:PruneConfig",
    "data_trace": "llmtrain.commands.data:TraceConfig",
    "data_show": "llmtrain.commands.data_show:ShowConfig",
    "data_digest": "llmtrain.commands.data:DigestConfig",
}
"""Verb → the dataclass that its composed configuration becomes."""

UNTYPED = {"train": "model.path", "plan": "model.path", "checkpoint_export": "path"}
"""Verb → a key of a path that is taken out of it before."""

MAY_BE_EMPTY = {"prompt", "track.wandb.notes"}
"""Keys of texts; all others are of paths and names."""

OVERRIDE = re.compile(r"\+{0,2}[\w./@:-]+=|~[\w./@:-]+", re.ASCII)
"""key=value, +key=value, ++key=value, ~key."""
SECTION_KEY = re.compile(r"(?!hydra\.)[\w-]+(\.[\w-]+)+=", re.ASCII)
"""section.key=value of llmtrain's own."""
VALUED_FLAGS = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"}
VALUED_FLAGS |= {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
"""Hydra's flags that a word may follow."""
PIECE = re.compile(
    r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")\s*(?:,|$)|(\s*\[[^\]]*\]\s*|[^,]*)(?:,|$)""", re.DOTALL
)
"""One of the values between the commas of a list or sweep: quoted, or else a list or plain."""
NAMED = re.compile(r"\s*([\w./-]+)\s*:(.*)", re.DOTALL | re.ASCII)
"""name: value, of a mapping."""


@dataclass(frozen=True)
class TextKey:
    """What a key of text may hold besides a text."""

    may_be_null: bool = False
    is_list: bool = False
    """Several texts, in brackets."""
    is_mapping: bool = False
    """Several texts by name, in braces."""


TextKeys = Mapping[str, TextKey]


def config_of(verb: str) -> type:
    """The dataclass that the verb's composed configuration becomes."""
    module, _, name = CONFIGS[verb].partition(":")
    config: type = getattr(importlib.import_module(module), name)
    return config


@cache
def text_keys(verb: str) -> TextKeys:
    """The verb's keys that hold paths, names and other text. `*` stands for a name that is left open."""
    found = {UNTYPED[verb]: TextKey()} if verb in UNTYPED else {}
    for key, hint in leaves(config_of(verb)):
        kind = _text_kind(hint)
        if kind is None:
            continue
        # A section may have several forms.
        before = found.get(key, kind)
        found[key] = TextKey(before.may_be_null or kind.may_be_null, before.is_list or kind.is_list)
        if key.endswith(".*"):
            found[key.removesuffix(".*")] = TextKey(is_mapping=True)
    return found


def _text_kind(hint: Any) -> TextKey | None:
    """None for types that hold no text."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in map(_text_kind, arguments) if kind is not None]
        if not kinds:
            return None
        return TextKey(type(None) in arguments, any(kind.is_list for kind in kinds))
    if typing.get_origin(hint) in (tuple, list):
        return TextKey(is_list=True) if {str, Path} & set(arguments) else None
    return TextKey() if hint in (str, Path) else None


def _find(keys: TextKeys, name: str) -> TextKey | None:
    return keys.get(name) or keys.get(f"{name.rpartition('.')[0]}.*")


def refuse_unusable(flags: list[str], overrides: list[str], keys: TextKeys) -> None:
    """Raise ConfigError for words that are neither flag nor override, and for paths left empty."""
    problems = [
        Problem("override", repr(word), "key=value", "see --help for the keys")
        for before, word in zip(["", *flags], flags, strict=False)
        if not word.startswith("-") and before not in VALUED_FLAGS
    ]
    for override in overrides:
        key, separator, value = override.partition("=")
        key = key.lstrip("+")
        is_needed = _find(keys, key) is not None and key not in MAY_BE_EMPTY
        if separator and is_needed and value in ("", "''", '""'):
            problems.append(Problem(key, "nothing", "a path or name", f"give {key}=…"))
    if problems:
        raise ConfigError(problems)


def refuse_unreadable(overrides: list[str]) -> None:
    """Raise ConfigError for those that Hydra cannot read, each by its key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    problems = []
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            key, _, value = override.partition("=")
            if key and value:
                allowed = "a number, a word, a [list] or a {mapping: 1}"
                remedy = "quote what is one text: 'key=\"a text\"'"
                problems.append(Problem(key.lstrip("+"), repr(value), allowed, remedy))
            else:
                problems.append(Problem("override", repr(override), "key=value", "see --help for the keys"))
    if problems:
        raise ConfigError(problems)


def swept_keys(overrides: list[str]) -> set[str]:
    """The keys that have several values in a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group for override in parsed if override.is_sweep_override()}


def quote(argument: str, keys: TextKeys, *, sweeps: bool = False) -> str:
    """An override as Hydra has to be given it for llmtrain to get it as typed.

    Values of `keys` become quoted text, but for lists, mappings and null where a key may be one. Where
    the command `sweeps`, commas part the values of a sweep, and quotes keep a value in one piece.
    Keys of a section need no `+`: decoding knows which there are.
    """
    name, separator, value = argument.partition("=")
    prefix = "++" if SECTION_KEY.match(argument) else ""
    key = _find(keys, name.lstrip("+"))
    if not separator or key is None:
        return f"{prefix}{argument}"
    start = f"{prefix}{name}="
    if not sweeps or not re.search(r"""[,'"(]""", value):
        return f"{start}{_quote_value(key, value)}"
    if choice := re.fullmatch(r"\s*choice\((.*)\)\s*", value, re.DOTALL):
        return f"{start}choice({_quote_pieces(key, choice[1])})"
    if re.fullmatch(r"\s*(glob|range|interval|shuffle|sort|tag)\(.*\)\s*", value, re.DOTALL):
        return f"{start}{value}"
    return f"{start}{_quote_pieces(key, value)}"


def _pieces(text: str) -> list[tuple[str | None, str]]:
    """Of a list's or a sweep's values each as (quoted, None) or as (None, plain)."""
    found = []
    end = 0
    while end <= len(text) and (piece := PIECE.match(text, end)):
        found.append((piece[1], (piece[2] or "").strip()))
        end = piece.end() if piece[0].endswith(",") else len(text) + 1
    return found


def _quote_pieces(key: TextKey, text: str) -> str:
    return ",".join(quoted or _quote_value(key, plain) for quoted, plain in _pieces(text))


def _quote_value(key: TextKey, text: str) -> str:
    if key.may_be_null and text == "null":
        return text
    if key.is_list and _is_list(text):
        inner = text[1:-1]
        return f"[{_quote_pieces(TextKey(), inner)}]" if inner.strip() else text
    if key.is_mapping:
        return _quote_mapping(text)
    return quote_text(text)


def _quote_mapping(text: str) -> str:
    named = [NAMED.fullmatch(plain) for _, plain in _pieces(text.strip()[1:-1])]
    if not (text.strip()[:1] == "{" and text.strip()[-1:] == "}") or not all(named):
        return text
    return f"{{{','.join(f'{m[1]}:{_quote_named(m[2].strip())}' for m in named if m)}}}"


def _quote_named(text: str) -> str:
    return text if text[:1] in ("'", '"') and text[-1:] == text[:1] else quote_text(text)


def _is_list(text: str) -> bool:
    """Whether the bracket that a text begins with is closed by its last character."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    depths = list(accumulate({"[": 1, "]": -1}.get(character, 0) for character in text))
    return 0 not in depths[:-1] or _parses(f"key={text}")  # there may be brackets within quotes


def quote_text(text: str) -> str:
    """A text as Hydra's and OmegaConf's grammars say it."""
    # OmegaConf resolves ${…} unless a backslash stands before it; backslashes before that are doubled.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    # Within quotes Hydra's grammar unescapes only backslashes that stand before a quote.
    text = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    text = re.sub(r"(\\+)$", lambda match: match[1] * 2, text)
    return f"'{text}'"


def _parses(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True

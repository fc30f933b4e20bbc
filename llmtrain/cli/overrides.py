"""Quote overrides for Hydra, so that keys that hold text get it exactly as the user typed it.

Hydra's grammar gives `=`, `,`, brackets and more a meaning. Which keys hold text follows from the types of
the fields of the verb's configuration.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmtrain.cli.verbs import config_types
from llmtrain.config import MAY_BE_EMPTY, leaves
from llmtrain.corpus.config import PRESENT_KEYS
from llmtrain.errors import ConfigError, Problem

OVERRIDE = re.compile(r"\+{0,2}[\w./@:-]+=|~[\w./@:-]+", re.ASCII)
"""key=value, +key=value, ++key=value, ~key."""
SECTION_KEY = re.compile(r"(?!hydra\.)[\w-]+(\.[\w-]+)+=", re.ASCII)
"""section.key=value of a section of llmtrain."""
VALUED_FLAGS = {"--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"}
VALUED_FLAGS |= {"--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"}
"""Hydra's flags that take a value."""
PIECE = re.compile(
    r"""\s*('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")\s*(?:,|$)|(\s*\[[^\]]*\]\s*|[^,]*)(?:,|$)""", re.DOTALL
)
"""One of the comma-separated values of a list or sweep: quoted, or a list, or plain."""
RENAMED = {"shard_bytes": "tar_bytes"} | {f"data.{old}": f"data.{new}" for old, new in PRESENT_KEYS.items()}
"""Key of an earlier version, which users' scripts still have → its present name."""
NAMED = re.compile(r"\s*([\w./-]+)\s*:(.*)", re.DOTALL | re.ASCII)
"""`name: value` in a mapping."""


@dataclass(frozen=True)
class TextKey:
    """Values that a text key accepts besides a single text."""

    may_be_null: bool = False
    is_list: bool = False
    """Several texts, in brackets."""
    is_mapping: bool = False
    """Several texts by name, in braces."""
    may_be_empty: bool = False
    """The text may have no character; paths and names have some."""


TextKeys = Mapping[str, TextKey]


def text_keys(name: str) -> TextKeys:
    """Return the keys of the configuration `name` that hold paths, names or other text, by the types of its
    dataclasses' fields. `*` stands for a key that the user names."""
    found: dict[str, TextKey] = {}
    for leaf in (leaf for config in config_types(name) for leaf in leaves(config)):
        kind = _text_kind(leaf.hint)
        if kind is None:
            continue
        # A section may be one of several dataclasses.
        before = found.get(leaf.key, kind)
        found[leaf.key] = TextKey(
            may_be_null=before.may_be_null or kind.may_be_null,
            is_list=before.is_list or kind.is_list,
            may_be_empty=before.may_be_empty or MAY_BE_EMPTY in leaf.markers,
        )
        if leaf.key.endswith(".*"):
            found[leaf.key.removesuffix(".*")] = TextKey(is_mapping=True)
    return found


def _text_kind(hint: Any) -> TextKey | None:
    """Return what a field of this type may hold; None for a type that holds no text."""
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
    """Return the entry of a key, or the one in which `*` stands for a name of it."""
    if name in keys:
        return keys[name]
    parts = name.split(".")

    def stands_for(key: str) -> bool:
        own = key.split(".")
        return len(own) == len(parts) and all(a in ("*", b) for a, b in zip(own, parts, strict=True))

    return next((kind for key, kind in keys.items() if "*" in key and stands_for(key)), None)


def with_present_keys(overrides: list[str]) -> list[str]:
    """Return the overrides with keys of earlier versions under their present names."""
    found = []
    for override in overrides:
        name = override.partition("=")[0].lstrip("+~")
        found.append(override.replace(name, RENAMED.get(name, name), 1))
    return found


def refuse_unusable(flags: list[str], overrides: list[str], keys: TextKeys) -> None:
    """Raise ConfigError for words that are neither a flag nor an override, and for empty paths and names."""
    problems = [
        Problem("override", repr(word), "key=value", "see --help for the keys")
        for before, word in zip(["", *flags], flags, strict=False)
        if not word.startswith("-") and before not in VALUED_FLAGS
    ]
    for override in overrides:
        key, separator, value = override.partition("=")
        key = key.lstrip("+")
        kind = _find(keys, key)
        is_needed = kind is not None and not kind.may_be_empty
        if separator and is_needed and value in ("", "''", '""'):
            problems.append(Problem(key, "nothing", "a path or name", f"give {key}=…"))
    if problems:
        raise ConfigError(problems)


def refuse_unreadable(overrides: list[str]) -> None:
    """Raise ConfigError with a problem for each override that Hydra cannot parse."""
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
    """Return the keys for which a sweep gives several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides)
    return {override.key_or_group for override in parsed if override.is_sweep_override()}


def quote(argument: str, keys: TextKeys, *, sweeps: bool = False) -> str:
    """Return an override as Hydra must get it, so that `keys` hold their text as typed.

    Values of `keys` are quoted, except lists, mappings and null where a key may hold one. If the command
    `sweeps`, commas separate the values of a sweep, and quotes keep a value with commas together.
    Keys of a section, and mappings, get `++`, which lets Hydra add a key; decoding then refuses unknown ones.
    """
    name, separator, value = argument.partition("=")
    key = _find(keys, name.lstrip("+"))
    takes_names = key is not None and key.is_mapping and not name.startswith("+")
    prefix = "++" if SECTION_KEY.match(argument) or takes_names else ""
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
    """Return each of the comma-separated values as (quoted, "") or (None, plain)."""
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
    """Return whether the last character of the text closes the bracket that the text begins with."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    depths = list(accumulate({"[": 1, "]": -1}.get(character, 0) for character in text))
    return 0 not in depths[:-1] or _parses(f"key={text}")  # quotes may contain brackets


def quote_text(text: str) -> str:
    """Return the text quoted for the grammars of Hydra and OmegaConf."""
    # OmegaConf resolves ${…} unless a backslash precedes it; further backslashes before it are doubled.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    # Within quotes Hydra unescapes only backslashes that precede a quote.
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

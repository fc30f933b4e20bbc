"""`llmtrain keys`: every configuration key with its type, default and meaning, as a Markdown page.

Meanings are the docstrings under the fields of the configs. Defaults come from conf/VERB.yaml, else from the
preset that it selects for the section, else from the field. conf/README.md holds this page.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from llmtrain.config import INTERNAL, MISSING, encode, kinds_of
from llmtrain.plan.keys import PlanKeys, SearchKeys

INTRODUCTION = """\
# Configuration

Every key of every verb. The command `llmtrain keys > conf/README.md` writes this page from the typed
configurations; a test keeps it up to date.

- Set a key on the command line: `llmtrain train batch.global_size=64`. Values with spaces, commas or brackets
  need quotes for the shell: `'data.mixture={web: 0.7, books: 0.3}'`.
- Choose a preset of a [group](#groups), a folder beside this page: `model=gpt2_124m optimizer=sgd`. Keys that
  are given as well override the preset: `model=gpt2_124m model.dropout=0.1`.
- `llmtrain VERB --help` lists the keys of a verb, `--cfg job` prints the composed configuration, and
  `--multirun optimizer.lr=1e-3,3e-4` runs one job for each value.
- Keys without a default are required. An unknown key, or a value of the wrong type, ends the command with
  exit code 2 and one line that says what is allowed.
"""


class Extra(NamedTuple):
    """A key of a verb that its config lacks."""

    key: str
    type: str
    default: str
    meaning: str


EXTRAS = {
    "train": [
        Extra(
            "model.path",
            "path",
            "required",
            "With `model=pretrained`: an import, a run, a checkpoint or a Hugging Face folder.",
        )
    ],
    "checkpoint_export": [
        Extra(
            "path",
            "path",
            "required",
            "Replaces `checkpoint`: a checkpoint folder, or a run folder for its newest good checkpoint.",
        )
    ],
}


PRESETS = {"train model=word2vec": "model/word2vec"}
"""Verb with a preset → the file of conf/ that holds the defaults of its keys."""


class Row(NamedTuple):
    """A row of a table."""

    key: str
    hint: Any
    default: Any
    meaning: str


class Form(NamedTuple):
    """One of the forms that a section may have."""

    label: str
    """Its title; empty for the only form of a section."""
    cls: type


BESIDES: dict[str, type] = {"plan": PlanKeys, "plan_search": SearchKeys}
"""Verb → the dataclass of its keys besides those of its config."""


def page(configs: Mapping[str, type], purposes: Mapping[str, str], conf: Path) -> str:
    """Return the page.

    configs: verb, its words joined by `_` → the config that it decodes; purposes: verb → a phrase; conf: the
    folder of the YAML files.
    """
    parts = [INTRODUCTION]
    described: dict[tuple[str, type], str] = {}
    for verb, config in configs.items():
        words = f"llmtrain {verb.replace('_', ' ')}"
        parts.append(f"## {words}\n\n{_sentence(purposes[verb])}\n")
        parts += _verb(verb, words, config, _Defaults(conf, PRESETS.get(verb, verb)), described)
    parts.append(_groups(conf))
    return "\n".join(parts)


def _verb(
    verb: str, words: str, config: type, defaults: _Defaults, described: dict[tuple[str, type], str]
) -> Iterator[str]:
    before = described.get(("", config))
    described[("", config)] = before or words
    rows, sections = [], []
    for name, hint, own in _fields(config):
        forms = _forms(hint)
        if forms and before is None:
            sections.append((name, forms))
        elif not forms and before is None:
            rows.append(Row(name, hint, defaults.of(name, own), meaning_of(config, name)))
    extras = _extras(verb, defaults)
    if before is not None:
        yield f"The keys of [{before}](#{_anchor(before)})" + (", and:\n" if extras else ".\n")
    if rows or extras:
        yield _table(rows, extras)
    for section, forms in sections:
        yield from _section(section, forms, words, defaults, described)


def _extras(verb: str, defaults: _Defaults) -> list[Extra]:
    """Return the keys that the config of a verb lacks."""
    found = list(EXTRAS.get(verb, ()))
    cls = BESIDES.get(verb)
    for name, hint, own in () if cls is None else _fields(cls):
        forms = _forms(hint)
        rows = [Row(name, hint, own, meaning_of(cls, name))] if not forms and cls is not None else []
        for form in forms:
            rows += _rows(form.cls, name, (), defaults)
        found += [Extra(r.key, type_words(r.hint), _default_words(r.default), r.meaning) for r in rows]
    return found


def _section(
    section: str,
    forms: Sequence[Form],
    words: str,
    defaults: _Defaults,
    described: dict[tuple[str, type], str],
) -> Iterator[str]:
    for form in forms:
        title = f"`{section}`" + (f", {form.label}" if form.label else "")
        before = described.setdefault((section, form.cls), words)
        if before != words:
            yield f"{title}: the keys of [{before}](#{_anchor(before)}).\n"
            continue
        # A key that several forms have may be explained at only one of them.
        others = [other.cls for other in forms]
        rows = list(_rows(form.cls, section, others, defaults if len(forms) == 1 else None))
        yield f"### {title}\n\n{_summary(form.cls)}\n"
        if rows:
            yield _table(rows)


def _rows(
    cls: type, prefix: str, others: Sequence[type], defaults: _Defaults | None, unset: bool = False
) -> Iterator[Row]:
    """Yield a row for each key of a section, including the keys of nested sections."""
    for name, hint, own in _fields(cls):
        key = f"{prefix}.{name}"
        forms = _forms(hint)
        if not forms:
            meaning = next(filter(None, (meaning_of(each, name) for each in (cls, *others))), "")
            yield Row(key, hint, defaults.of(key, own) if defaults and not unset else own, meaning)
            continue
        may_be_null = type(None) in typing.get_args(hint)
        if may_be_null:
            yield Row(key, hint, None, _summary(forms[0].cls))
        for form in forms:
            yield from _rows(form.cls, key, (), defaults, unset or may_be_null)


class _Defaults:
    """The default values that conf/ gives."""

    def __init__(self, conf: Path, verb: str) -> None:
        self._conf = conf
        self._own: dict[str, Any] = yaml.safe_load((conf / f"{verb}.yaml").read_text())
        chosen = self._own.get("defaults", ())
        bases = [each for each in chosen if isinstance(each, str) and each != "_self_"]
        self._bases = [_Defaults(conf, str(Path(verb).with_name(each))) for each in bases]
        self._presets = {
            group.removeprefix("override /").partition("@")[0]: each[group]
            for each in chosen
            if isinstance(each, dict)
            for group in each
        }

    def of(self, key: str, own: Any) -> Any:
        """Return the value of a dotted key. own: the field's default, which a null in conf/ stands for."""
        found = self._given(key)
        return own if found == MISSING or (found is None and own != MISSING) else found

    def _given(self, key: str) -> Any:
        section, _, rest = key.partition(".")
        found = self._find(self._own, key)
        if found == MISSING and rest:
            found = self._find(self._preset(section), rest)
        for base in self._bases:
            found = base._given(key) if found == MISSING else found
        return found

    def _preset(self, group: str) -> dict[str, Any]:
        path = self._conf / group / f"{self._presets.get(group)}.yaml"
        return yaml.safe_load(path.read_text()) if path.is_file() else {}

    @staticmethod
    def _find(values: Any, key: str) -> Any:
        for name in key.split("."):
            if not isinstance(values, dict) or name not in values:
                return MISSING
            values = values[name]
        return values


def _fields(cls: type) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, type, default or MISSING) for each field that is a key for people."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if INTERNAL in field.metadata:
            continue
        default: Any = MISSING
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, hints[field.name], default


def _forms(hint: Any) -> list[Form]:
    """Return the dataclasses that a section may be; empty for a plain value."""
    if dataclasses.is_dataclass(hint):
        return [Form("", typing.cast(type, hint))]
    classes = kinds_of(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        classes = [
            typing.cast(type, each) for each in typing.get_args(hint) if dataclasses.is_dataclass(each)
        ]
    return [Form(_label(cls) if len(classes) > 1 else "", cls) for cls in classes]


def _label(cls: type) -> str:
    """Return the title of a form: a field with one possible value, such as `family=gpt`, else the beginning
    of the docstring."""
    for name, hint, default in _fields(cls):
        if typing.get_origin(hint) is Literal and len(typing.get_args(hint)) == 1:
            return f"`{name}={default}`"
    words = re.split(r"[;.(:]", _summary(cls))[0].strip()
    return words[:1].lower() + words[1:]


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """Return field → the docstring under it."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                found[name] = " ".join(text.split())
    return found


def meaning_of(cls: type, name: str) -> str:
    """Return the docstring under a field, its own or inherited; empty without one."""
    classes = [each for each in cls.__mro__ if dataclasses.is_dataclass(each)]
    return next((_docstrings(each)[name] for each in classes if name in _docstrings(each)), "")


def _summary(cls: type) -> str:
    """Return the first paragraph of the docstring of a dataclass."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _anchor(heading: str) -> str:
    return heading.replace(" ", "-")


def _table(rows: Sequence[Row], extras: Sequence[Extra] = ()) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    cells = [(r.key, type_words(r.hint), _default_words(r.default), r.meaning) for r in rows]
    for key, kind, default, meaning in [*cells, *extras]:
        lines.append(f"| `{key}` | {kind} | {default} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _default_words(value: Any) -> str:
    if value == MISSING:
        return "required"
    return f"`{_plain(value)}`" if value != "" else "empty"


def _plain(value: Any) -> str:
    """Return a value as it is written on the command line."""
    value = encode(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_plain, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value).replace(str(Path.home()), "~")
    return text.replace("\n", r"\n")


def type_words(hint: Any) -> str:
    """Return a type in words."""
    names = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", Path: "path"}
    if hint in names:
        return names[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = " or ".join(type_words(each) for each in arguments if each is not type(None))
        return f"{words}, or null" if type(None) in arguments else words
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if dataclasses.is_dataclass(hint) or kinds_of(hint):
        return "section"
    if origin in (tuple, list):
        if dataclasses.is_dataclass(arguments[0]):
            return f"list: {{{', '.join(f'`{field.name}`' for field in dataclasses.fields(arguments[0]))}}}"
        if arguments[-1] is not Ellipsis:
            return f"list of {len(arguments)}: {type_words(arguments[0])}"
        return f"list: {type_words(arguments[0])}"
    return f"{{name: {type_words(arguments[1])}}}" if arguments else "anything"


def _groups(conf: Path) -> str:
    """Return a table for each folder of presets."""
    parts = [
        "## Groups\n\nA preset is chosen as `GROUP=PRESET`, and `track` as a list: `track=[jsonl,wandb]`.\n"
    ]
    for folder in sorted(path for path in conf.iterdir() if path.is_dir()):
        lines = [f"### {folder.name}\n", "| preset | what it is |", "|---|---|"]
        for preset in sorted(folder.glob("*.yaml")):
            lines.append(f"| [`{preset.stem}`]({folder.name}/{preset.name}) | {_head(preset)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _head(preset: Path) -> str:
    """Return the comment at the head of a file, up to its first commands."""
    lines = []
    for line in preset.read_text().splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# ") or line.startswith("#   "):
            break
        lines.append(line[2:])
    return re.sub(r"\s*\b(Before|Behind):$", "", " ".join(lines)).replace("|", "\\|")

"""Render conversations by a chat template, with what transformers' `apply_chat_template` gives to one.

Templates come from folders of others. They run in jinja2's sandbox, which reaches nothing but their
arguments, and in a process of their own (worker.py), which bounds time and memory.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from llmtrain.chat.error import ChatError, short

Messages = Sequence[Mapping[str, Any]]

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Around what a template renders between `{% generation %}` and `{% endgeneration %}`: two of the characters
that Unicode reserves for a program's own use, which no text may contain."""
LONGEST_TEXT = 1 << 24
"""Maximum characters of a conversation as text."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the field with what a model thinks before its answer; templates read the first or the second."""


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    marked: tuple[tuple[int, int], ...] = ()
    """Characters [begin, end) between the template's marks of what a model generates, in order."""


class _RefusalError(jinja2.TemplateError):
    """A template calls raise_exception."""


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, by which a template marks what the model generates."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(has_generation=False, marks=("", ""))

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        self.environment.has_generation = True  # type: ignore[attr-defined]
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        before, after = self.environment.marks  # type: ignore[attr-defined]
        return f"{before}{caller()}{after}"


class _Dict:
    """`dict` in templates: without the attributes of the class."""

    def __call__(self, *args: Any, **arguments: Any) -> dict[Any, Any]:
        return dict(*args, **arguments)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates: without attributes that Python keeps for itself."""

    def __init__(*args: Any, **arguments: Any) -> None:  # type: ignore[misc]
        self, *others = args
        attributes = dict(*others, **arguments)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"an attribute {name!r} of a namespace")


def _raise_exception(message: object) -> None:
    raise _RefusalError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class Template:
    """A compiled chat template."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """tokens: name in templates, such as bos_token → spelling. Raise ChatError for a wrong template."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_Dict(),
            namespace=_Namespace,
        )
        self._environment: Any = environment
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            got = f"an invalid chat template (line {error.lineno}: {short(str(error.message))})"
            raise ChatError(got, "a template of jinja2") from None
        except (RecursionError, SyntaxError, ValueError, OverflowError) as error:
            raise ChatError(
                f"an invalid chat template ({short(str(error))})", "a template of jinja2"
            ) from None

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the model generates."""
        return bool(self._environment.has_generation)

    def render(self, messages: Messages, *, prompt: bool = False) -> Rendered:
        """Return the text of messages. prompt: end with what comes before the next answer.

        Raise ChatError for messages that the template refuses or fails on.
        """
        given = [_as_transformers(message) for message in messages]
        plain = self._render(given, prompt, ("", ""))
        if not self.has_marks:
            return Rendered(plain)
        pieces = self._render(given, prompt, (OPEN, CLOSE))
        marked, text = [], ""
        for number, piece in enumerate(pieces.split(OPEN)):
            inside, _, outside = piece.rpartition(CLOSE) if number else ("", "", piece)
            if CLOSE in inside or CLOSE in outside:
                raise ChatError("{% generation %} within {% generation %}", "one after another")
            if inside:
                marked.append((len(text), len(text) + len(inside)))
            text += inside + outside
        if text != plain:
            raise ChatError(
                "{% generation %} within a filter that changes it", "marks around text as it is printed"
            )
        return Rendered(plain, tuple(marked))

    def _render(self, messages: list[dict[str, Any]], prompt: bool, marks: tuple[str, str]) -> str:
        self._environment.marks = marks
        try:
            text = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **self._tokens
            )
        except _RefusalError as error:
            got = f"messages that the chat template refuses: {short(str(error))}"
            raise ChatError(got, "messages as its template takes them") from None
        except MemoryError:
            raise ChatError("a chat template that needs too much memory", "one that needs less") from None
        except Exception as error:  # whatever the code of a template may do
            got = f"messages that the chat template fails on ({type(error).__name__}: {short(str(error))})"
            raise ChatError(got, "messages as its template takes them") from None
        if len(text) > LONGEST_TEXT:
            raise ChatError(f"a conversation of {len(text):,} characters", f"at most {LONGEST_TEXT:,}")
        return text


def _as_transformers(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as transformers gives it to templates: without keys that have no value, and what the
    model thinks under the names that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    thought = next((given[key] for key in _REASONING if key in given), None)
    return given if thought is None else {"thinking": thought, **given, "reasoning_content": thought}

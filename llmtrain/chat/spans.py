"""Which characters of a conversation are trained: what the model itself has to write.

That is each answer of the assistant and the token that ends its turn, and nothing else. Marks of the template
(`{% generation %}`) say it. Where a template has none it is found by rendering:

- the conversation with a reserved text in place of one answer shows where that answer is: what stands before
  and after it stays;
- the messages before it with add_generation_prompt=true show where the model begins to write. Behind that may
  come more than the answer, such as an empty thought;
- the conversation up to the answer shows what ends its turn.

What does not fit together is refused. Most conversations have the shape of others with the same roles, whose
spans are known: they are compared with it and rendered only once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from llmtrain.chat.error import ChatError, check_text
from llmtrain.chat.template import Messages, Template

SYSTEM = "system"
ASSISTANT = "assistant"
"""The role whose messages are trained."""
_THOUGHT = re.compile("<think>(.*?)</think>", re.DOTALL)
_MOST_SHAPES = 4096


class Marked(NamedTuple):
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Characters [begin, end) that are trained, in order."""
    left_out: bool = False
    """Whether the template leaves out a system message."""


class _Shape(NamedTuple):
    """What conversations with the same roles have in common."""

    literals: tuple[str, ...]
    """What the template has before each content, and after the last."""
    order: tuple[int, ...]
    """Number of the message whose content follows each literal."""
    answers: tuple[tuple[int, int, int, int], ...]
    """Of each answer: literal and character in it at which it begins, and those at which it ends."""
    left_out: bool
    """Whether the template leaves out a system message."""

    def fit(self, text: str, contents: Sequence[Any]) -> tuple[tuple[int, int], ...] | None:
        """Return the answers of a text; None if it is not the literals with the contents between them, as
        they are or stripped."""
        starts, at = [], 0
        for place, message in enumerate(self.order):
            starts.append(at)
            at += len(self.literals[place])
            content, following = contents[message], self.literals[place + 1]
            for written in (content, content.strip(), content.lstrip(), content.rstrip()):
                behind = at + len(written)
                if text.startswith(written, at) and text.startswith(following, behind):
                    at = behind
                    break
            else:
                return None
        starts.append(at)
        if not text.startswith(self.literals[0]) or at + len(self.literals[-1]) != len(text):
            return None
        return tuple((starts[a] + b, starts[c] + d) for a, b, c, d in self.answers)


class Spans:
    """Finds what is trained of conversations of one template."""

    def __init__(self, template: Template, added: Sequence[str], bos: str | None = None) -> None:
        """added: spellings of the tokens that the tokenizer matches whole; bos: the one that begins a
        text."""
        self._template, self._bos = template, bos
        tokens = sorted((re.escape(token) for token in added if token.strip()), key=len, reverse=True)
        self._token = re.compile("|".join(tokens) or "(?!)")
        self._tokens = re.compile(f"(?:{self._token.pattern})+")
        self._shapes: dict[tuple[str, ...], _Shape | ChatError | None] = {}
        self._takes_parts: bool | None = None

    def of(self, messages: Messages) -> Marked:
        """Return the text of a conversation and what of it is trained. Raise ChatError."""
        messages = [dict(message) for message in messages]
        if not any(message["role"] == ASSISTANT for message in messages):
            raise ChatError("messages without an answer", f"at least one message with the role {ASSISTANT}")
        check_text(messages)
        rendered = self._template.render(self._as_taken(messages))
        if self._template.has_marks:
            if not rendered.marked:
                raise ChatError(
                    "a conversation of which {% generation %} marks nothing", "marks around answers"
                )
            return Marked(rendered.text, rendered.marked)
        _refuse_calls(messages)
        text = rendered.text
        shape = self._shape(tuple(message["role"] for message in messages))
        if shape is not None and all(_is_plain(message) for message in messages):
            answers = shape.fit(text, [message["content"] for message in messages])
            if answers is not None:
                return Marked(text, answers, shape.left_out)
        answers = self._by_rendering(text, messages)
        return Marked(text, answers, shape is not None and shape.left_out)

    def prompt(self, messages: Messages) -> str:
        """Return the text after which the model writes its answer. Raise ChatError."""
        return self._template.render(self._as_taken(messages), prompt=True).text

    # By rendering

    def _by_rendering(self, text: str, messages: Messages) -> tuple[tuple[int, int], ...]:
        found = tuple(
            self._answer(text, messages, number)
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT
        )
        if any(before[1] > after[0] for before, after in pairwise(found)):
            raise _unclear("answers that overlap")
        return found

    def _answer(self, text: str, messages: Messages, number: int) -> tuple[int, int]:
        sign = _sign(number)
        probe = self._render([*messages[:number], _with(messages[number], sign), *messages[number + 1 :]])
        parts = probe.split(sign)
        if len(parts) != 2:
            raise _unclear("an answer that it leaves out" if len(parts) < 2 else "an answer that it repeats")
        before, after = parts
        end = len(text) - len(after)
        if end < 0 or not text.endswith(after):
            raise _unclear("an answer that changes the text after it")
        if text.startswith(before) and len(before) <= end and not text[len(before) : end].strip():
            raise ChatError("an answer of which the chat template leaves nothing", "an answer that it prints")
        return self._begin(text, messages, number, before, end), self._end(text, messages, number, end)

    def _begin(self, text: str, messages: Messages, number: int, before: str, end: int) -> int:
        """Return where the model begins to write an answer, whose content ends at `end`."""
        content = len(before) if len(before) <= end and text.startswith(before) else None
        opening = None
        asked, unasked = self._attempt(messages[:number], prompt=True), self._attempt(messages[:number])
        if asked is not None and len(asked) <= end and text.startswith(asked):
            opening = len(asked)
        elif content is not None and number > 0:
            # Where the conversation goes on, earlier text may be another; what follows the last message is
            # not.
            asked, unasked = self._after(messages, number - 1, prompt=True), self._after(messages, number - 1)
            between = self._between(messages, number)
            is_clear = None not in (asked, between) and text.endswith(between or "", 0, content)
            if is_clear and between.startswith(asked):  # type: ignore[union-attr, arg-type]
                opening = content - len(between) + len(asked)  # type: ignore[arg-type]
        # Without a prompt of its own, what stands before the answer may be the header of its turn.
        is_bare = content is not None and opening is not None and not text[opening:content].strip()
        is_before = opening is not None and (content is None or opening <= content)
        if is_before and (asked != unasked or is_bare):
            assert opening is not None
            return opening
        if content is None:
            content = self._begin_of_thought(text, messages, number, asked)
        if content is None:
            raise _unclear("an answer that changes the text before it")
        return content

    def _begin_of_thought(self, text: str, messages: Messages, number: int, asked: str | None) -> int | None:
        """Return where an answer begins whose thought stands elsewhere than in its content. asked: the text
        with the prompt, which may have a part of it."""
        content = messages[number]["content"]
        thought = _THOUGHT.search(content) if isinstance(content, str) else None
        if thought is None:
            return None
        sign = _sign(number)
        other = f"{content[: thought.start(1)]}\n{sign}\n{content[thought.end(1) :]}"
        probe = self._attempt([*messages[:number], _with(messages[number], other), *messages[number + 1 :]])
        before = None if probe is None or probe.count(sign) != 1 else probe.partition(sign)[0]
        if before is None or not text.startswith(before):
            return None
        same = 0
        while asked is not None and same < min(len(before), len(asked)) and before[same] == asked[same]:
            same += 1
        return len(before) if asked is None else same

    def _end(self, text: str, messages: Messages, number: int, end: int) -> int:
        """Return the end of the turn of an answer, whose content ends at `end`."""
        alone = text if number + 1 == len(messages) else self._attempt(messages[: number + 1])
        if alone is not None and len(alone) >= end and text.startswith(alone):
            own = text[end : len(alone)]
            if (tokens := self._tokens.search(own)) is not None:
                if own[: tokens.start()].strip():
                    raise _unclear("text between an answer and the token that ends its turn")
                return end + tokens.end()
            if own.strip():  # a mark that the vocabulary lacks
                return end + len(own.rstrip())
            return self._end_by_next(text, end)
        # Within a conversation a turn ends in another way than at its end: by the token that follows whatever
        # comes next, another message or the prompt for an answer.
        asked = self._after(messages, number, prompt=True)
        here = self._token_at(text, end)
        there = None if asked is None else self._token_at(asked, 0)
        is_token = asked is not None and here is not None and there is not None
        if is_token and text[end : here[0]] == asked[: there[0]]:  # type: ignore[index]
            return here[0]  # type: ignore[index]
        own_end = self._after(messages, number)
        if own_end is None:
            raise _unclear("an answer whose turn it ends in no clear way")
        mark = own_end.rstrip()
        if not mark:
            return self._end_by_next(text, end)
        is_text = self._tokens.search(mark) is None
        return end + len(mark) if is_text and text.startswith(mark, end) else end

    def _end_by_next(self, text: str, end: int) -> int:
        """Return the end of a turn that has nothing of its own to end it: the token that begins the next one
        does."""
        token = self._token_at(text, end)
        return end if token is None or token[1] == self._bos else token[0]

    def _between(self, messages: Messages, number: int) -> str | None:
        """Return what stands between the content of a message and of the one before; None if that is not
        clear."""
        first, second = _sign(number - 1), _sign(number)
        two = [_with(messages[number - 1], first), _with(messages[number], second)]
        probe = self._attempt([*messages[: number - 1], *two, *messages[number + 1 :]])
        if probe is None or probe.count(first) != 1 or probe.count(second) != 1:
            return None
        return probe.partition(first)[2].partition(second)[0]

    def _after(self, messages: Messages, number: int, *, prompt: bool = False) -> str | None:
        """Return what follows a message at the end of a conversation; None if that is not clear."""
        sign = _sign(number)
        probe = self._attempt([*messages[:number], _with(messages[number], sign)], prompt=prompt)
        parts = [] if probe is None else probe.split(sign)
        return parts[1] if len(parts) == 2 else None

    def _token_at(self, text: str, at: int) -> tuple[int, str] | None:
        """Return the end and the spelling of the token that follows, perhaps after white space."""
        token = self._token.search(text, at)
        if token is None or text[at : token.start()].strip():
            return None
        return token.end(), token[0]

    # By shape

    def _shape(self, roles: tuple[str, ...]) -> _Shape | None:
        """Return the shape of conversations with these roles; None if none is clear. Raise ChatError for a
        role whose messages the template leaves out."""
        if roles not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[roles] = self._found_shape(roles)
        found = self._shapes[roles]
        if isinstance(found, ChatError):
            raise ChatError(found.got, found.allowed)
        return found

    def _found_shape(self, roles: tuple[str, ...]) -> _Shape | ChatError | None:
        signs = [_sign(number) for number in range(len(roles))]
        messages = [{"role": role, "content": sign} for role, sign in zip(roles, signs, strict=True)]
        text = self._attempt(messages)
        if text is None:
            return None
        for role, sign in zip(roles, signs, strict=True):
            # Templates leave out system messages where others take them into account: Mistral's does, unless
            # the user speaks last.
            if sign not in text and role != SYSTEM:
                got = f"a message of the role {role[:40]!r}, which the chat template leaves out"
                return ChatError(got, "roles that it knows")
        try:
            answers = self._by_rendering(text, messages)
        except ChatError:
            return None
        shown = [number for number, sign in enumerate(signs) if sign in text]
        order = sorted(shown, key=lambda number: text.index(signs[number]))
        literals, firsts, at = [], [], 0
        for number in order:
            here = text.index(signs[number], at)
            literals.append(text[at:here])
            firsts.append(at)
            at = here + len(signs[number])
        literals.append(text[at:])
        firsts.append(at)
        if any(sign in literal for sign in signs for literal in literals):
            return None  # a content that is printed twice

        def place(position: int) -> tuple[int, int] | None:
            for literal, (first, words) in enumerate(zip(firsts, literals, strict=True)):
                if first <= position <= first + len(words):
                    return literal, position - first
            return None

        places = [(place(begin), place(end)) for begin, end in answers]
        if any(begin is None or end is None for begin, end in places):
            return None
        spans = tuple((*begin, *end) for begin, end in places)  # type: ignore[misc]
        return _Shape(tuple(literals), tuple(order), spans, len(shown) < len(roles))

    # What the template takes

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        return self._template.render(self._as_taken(messages), prompt=prompt).text

    def _attempt(self, messages: Messages, *, prompt: bool = False) -> str | None:
        """Return the text; None if the template refuses it."""
        try:
            return self._render(messages, prompt=prompt)
        except ChatError:
            return None

    def _as_taken(self, messages: Messages) -> Messages:
        """Return messages with their contents as the template takes them: text, or a list of parts."""
        if self._takes_parts is None:
            self._takes_parts = self._needs_parts()
        return [_in_parts(message) for message in messages] if self._takes_parts else messages

    def _needs_parts(self) -> bool:
        signs = [_sign(0), _sign(1)]
        messages = [{"role": "user", "content": signs[0]}, {"role": ASSISTANT, "content": signs[1]}]

        def shows(given: Messages) -> bool:
            try:
                text = self._template.render(given).text
            except ChatError:
                return False
            return all(sign in text for sign in signs)

        return not shows(messages) and shows([_in_parts(message) for message in messages])


def _sign(number: int) -> str:
    """Return a text that no message contains and no template changes."""
    return f"\ufdd2{number}\ufdd3"


def _is_plain(message: Any) -> bool:
    return isinstance(message["content"], str) and {
        key for key, value in message.items() if value is not None
    } == {"role", "content"}


def _with(message: Any, content: str) -> dict[str, Any]:
    """Return a message with another content of the same form."""
    if isinstance(message["content"], str):
        return {**message, "content": content}
    return {**message, "content": [{"type": "text", "text": content}]}


def _in_parts(message: Any) -> dict[str, Any]:
    content = message["content"]
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )


def _refuse_calls(messages: Messages) -> None:
    for message in messages:
        for key in ("tool_calls", "function_call"):
            if message.get(key):
                allowed = "answers of text, or a chat template with {% generation %}"
                raise ChatError(f"an answer with {key}", allowed)


def _unclear(what: str) -> ChatError:
    return ChatError(
        f"{what}, so that what the model writes is not clear", "a chat template with {% generation %}"
    )

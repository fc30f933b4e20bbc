"""Conversations in the rows of a table, in any of their forms. Free of torch.

What raises ValueError says two phrases: what was got, and what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtrain.objectives.fields import kind_of, text_of
from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from llmtrain.tables.config import TableDataConfig

ASSISTANT, USER = "assistant", "user"
_NEEDED = "a list of {role, content}"
_SHOWN = 40


class Conversation(NamedTuple):
    """A row: messages, or a prompt and its completion as they stand."""

    messages: tuple[Mapping[str, Any], ...] = ()
    given: int = 0
    """How many of the first messages are a prompt, whose answers are not trained."""
    prompt: str = ""
    completion: str | None = None
    """Text that follows the prompt as it stands, without a chat template; None: messages."""

    @property
    def text(self) -> str:
        """Return the text by which the row is put into a split."""
        if self.completion is not None:
            return f"{self.prompt}\n{self.completion}"
        return _lines(self.messages)

    @property
    def asked(self) -> str:
        """Return the text of the prompt."""
        return self.prompt if self.completion is not None else _lines(self.messages[: self.given])


def conversation_of(values: Mapping[str, Any], data: TableDataConfig, *, as_text: bool) -> Conversation:
    """Return the conversation of a row. as_text: leave a prompt and a completion that are texts as they
    are."""
    if data.prompt_field or data.completion_field:
        return _of_prompt(values, data, as_text)
    if data.instruction_field or data.output_field or data.input_field:
        return _of_instruction(values, data)
    if data.messages_field in values:
        return Conversation(messages_of(values[data.messages_field], data.messages_field))
    if "prompt" in values and "completion" in values:
        return _of_prompt(values, data, as_text)
    if "instruction" in values and "output" in values:
        return _of_instruction(values, data)
    try:
        field_of(values, data.messages_field)
    except ValueError as error:
        got, fields = error.args
        keys = "data.messages_field=…, or data.prompt_field=… and data.completion_field=…"
        raise ValueError(got, f"one of {fields}, by {keys}") from None
    raise AssertionError("a field that is there and is not")


def preference_of(
    values: Mapping[str, Any], data: TableDataConfig, *, as_text: bool
) -> tuple[Conversation, Conversation]:
    """Return the chosen conversation of a row and the rejected one. as_text: leave texts as they are."""
    names = (data.chosen_field, data.rejected_field)
    chosen, rejected = (field_of(values, name) for name in names)
    prompt_field = data.prompt_field or "prompt"
    if data.prompt_field is None and prompt_field not in values:
        prompt, chosen, rejected = _common(chosen, rejected, names)
    else:
        prompt = field_of(values, prompt_field)
    if chosen == rejected:
        raise ValueError(f"{names[0]} equal to {names[1]}", "two different answers")
    is_text = as_text and not any(isinstance(value, list) for value in (prompt, chosen, rejected))
    found = []
    for value, name in zip((chosen, rejected), names, strict=True):
        if is_text:
            before, after = (
                text_of({key: text}, key) for key, text in ((prompt_field, prompt), (name, value))
            )
            if not after.strip():
                raise ValueError(f"an empty {name}", "text")
            found.append(Conversation(prompt=before, completion=after))
            continue
        first, last = _side(prompt, prompt_field, USER), _side(value, name, ASSISTANT)
        if not any(message["role"] == ASSISTANT for message in last):
            raise ValueError(f"no answer in the field {name}", f"a message of the role {ASSISTANT}")
        found.append(Conversation((*first, *last), given=len(first)))
    return found[0], found[1]


def _common(chosen: Any, rejected: Any, names: tuple[str, str]) -> tuple[Any, Any, Any]:
    """Return the messages that two conversations begin with, and what follows in each."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise ValueError("no field prompt", f"data.prompt_field=…, or conversations in {' and '.join(names)}")
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        raise ValueError(f"{names[0]} equal to {names[1]}", "two different answers")
    if not same:
        raise ValueError("no field prompt, and conversations that begin with different messages", "a prompt")
    return chosen[:same], chosen[same:], rejected[same:]


def messages_of(value: Any, name: str) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of a field; in csv they are JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"text in the field {name}", f"{_NEEDED}, in csv as JSON") from None
    if not isinstance(value, list):
        raise ValueError(f"{kind_of(value)} in the field {name}", _NEEDED)
    if not value:
        raise ValueError(f"no message in the field {name}", _NEEDED)
    return tuple(_message(item, f"message {number} of {name}") for number, item in enumerate(value, 1))


def _message(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise ValueError(f"{kind_of(item)} as {where}", "an object with role and content")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not role.strip():
        keys = ", ".join(str(key)[:_SHOWN] for key in list(item)[:8])
        raise ValueError(f"no role in {where}", f"role and content, not {keys or 'nothing'}")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise ValueError(f"a part of {where} that is no text", "text, or a list of parts of text")
    elif not isinstance(content, str):
        raise ValueError(f"{kind_of(content)} as the content of {where}", "text")
    if role != "system" and not _words(content).strip():
        raise ValueError(f"an empty content of the role {role[:_SHOWN]} in {where}", "text")
    return item


def _lines(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {_words(message['content'])}" for message in messages)


def _words(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _said(role: str, text: str, name: str) -> Mapping[str, Any]:
    if not text.strip():
        raise ValueError(f"an empty {name}", "text")
    return {"role": role, "content": text}


def _of_prompt(values: Mapping[str, Any], data: TableDataConfig, as_text: bool) -> Conversation:
    prompt_field, completion_field = data.prompt_field or "prompt", data.completion_field or "completion"
    prompt, completion = field_of(values, prompt_field), field_of(values, completion_field)
    if not isinstance(prompt, list) and not isinstance(completion, list):
        before, after = text_of(values, prompt_field), text_of(values, completion_field)
        if as_text:
            if not after.strip():
                raise ValueError(f"an empty {completion_field}", "text")
            return Conversation(prompt=before, completion=after)
        return Conversation(
            (_said(USER, before, prompt_field), _said(ASSISTANT, after, completion_field)), given=1
        )
    first = _side(prompt, prompt_field, USER)
    last = _side(completion, completion_field, ASSISTANT)
    if not any(message["role"] == ASSISTANT for message in last):
        raise ValueError(f"no answer in the field {completion_field}", f"a message of the role {ASSISTANT}")
    return Conversation((*first, *last), given=len(first))


def _side(value: Any, name: str, role: str) -> Sequence[Mapping[str, Any]]:
    """Return the messages of a prompt or a completion; text is one message."""
    return (
        messages_of(value, name)
        if isinstance(value, list)
        else [_said(role, text_of({name: value}, name), name)]
    )


def _of_instruction(values: Mapping[str, Any], data: TableDataConfig) -> Conversation:
    instruction = text_of(values, data.instruction_field or "instruction")
    output_field = data.output_field or "output"
    about = ""
    if data.input_field is not None or "input" in values:
        about = text_of(values, data.input_field or "input")
    asked = f"{instruction}\n\n{about}" if about.strip() else instruction
    return Conversation(
        (
            _said(USER, asked, data.instruction_field or "instruction"),
            _said(ASSISTANT, text_of(values, output_field), output_field),
        )
    )

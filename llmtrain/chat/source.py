"""The chat template of a tokenizer, and the plain one of those that have none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.chat.error import ChatError
from llmtrain.tokenizers.base import ROLES, Tokenizer
from llmtrain.tokenizers.huggingface import (
    SPECIAL_TOKENS_MAP,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    JsonTokenizer,
)

TEMPLATE_BYTES = 1 << 20
"""Maximum size of a chat template."""
PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the role ' + message['role'] + '; it takes system, user and assistant') }}"
    "{% endif %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %} {{ message['content'] }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template of a tokenizer without one. A line for each message; an answer ends with the end token:

    User: …
    Assistant: …</s>
"""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it is rendered with."""

    source: str
    """The template."""
    tokens: Mapping[str, str]
    """Name in templates, such as bos_token → spelling."""
    added: Sequence[str]
    """Spellings of the tokens that are matched whole in the text."""

    @property
    def is_plain(self) -> bool:
        """Whether it is the plain one, which no folder has."""
        return self.source == PLAIN


def own_source(tokenizer: Tokenizer) -> str | None:
    """Return the template that came with a tokenizer. Raise ChatError for one that cannot be read."""
    if TEMPLATE_FILE in tokenizer.files:
        return tokenizer.files[TEMPLATE_FILE]
    found = _object(tokenizer, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):  # of several, as transformers writes them
        by_name = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = by_name.get("default")
        if found is None:
            raise ChatError(f"chat templates named {', '.join(map(str, by_name))[:200]}", "one named default")
    if found is None or isinstance(found, str):
        return found
    raise ChatError(f"a chat_template that is a {type(found).__name__}", "text")


def template_of(tokenizer: Tokenizer, given: str | None = None) -> ChatTemplate:
    """Return the chat template of a tokenizer: the one that is given, its own, or the plain one.

    Raise ChatError for one that cannot be used.
    """
    source = own_source(tokenizer) if given is None else given
    tokens, matched = special_tokens(tokenizer), matched_tokens(tokenizer)
    if source is None:
        return ChatTemplate(PLAIN, {"eos_token": tokenizer.pieces()[tokenizer.eos_id], **tokens}, matched)
    if len(source) > TEMPLATE_BYTES:
        raise ChatError(f"a chat template of {len(source):,} characters", f"at most {TEMPLATE_BYTES:,}")
    return ChatTemplate(source, tokens, matched)


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Return name in templates → spelling, as transformers' special_tokens_map has them."""
    if not isinstance(tokenizer, JsonTokenizer):
        pieces = tokenizer.pieces()
        return {f"{role}_token": pieces[i] for role, i in tokenizer.special_ids.items()}
    said = _object(tokenizer, SPECIAL_TOKENS_MAP) | _object(tokenizer, TOKENIZER_CONFIG)
    found: dict[str, str] = {}
    for role in ROLES:
        token = said.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[f"{role}_token"] = token
    return found


def matched_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return the spellings of the tokens that are matched whole in a text, special ones or not."""
    pieces = tokenizer.pieces()
    return sorted({pieces[i] for i in tokenizer.special_ids.values()} | {*tokenizer.added_tokens()})


def _object(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    # The tokenizer has checked that its files are JSON objects.
    content: dict[str, Any] = json.loads(tokenizer.files.get(name, "{}"))
    return content

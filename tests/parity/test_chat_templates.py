"""Conversations as tokens, and which are trained: transformers has both from a template that marks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from llmtrain.chat.encoder import Encoder
from llmtrain.chat.renderer import Renderer
from llmtrain.chat.source import ChatTemplate, template_of
from llmtrain.tokenizers.folder import load_tokenizer
from tests.support.chat_templates import CONVERSATIONS, STYLES, Style
from tests.support.tokenizers import write_chat_tokenizer

NO_SYSTEM = ("gemma",)
ALTERNATE = ("llama 2", "mistral", "gemma")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, style in STYLES.items():
        for kind in ("gpt2", "llama"):
            path = folder / f"{kind} {name}"
            found[kind, name] = write_chat_tokenizer(path, kind, style.tokens, style.plain)
    return found


def theirs(folder: Path, style: Style, messages: list[dict[str, str]]) -> tuple[str, list[int], list[int]]:
    """Text, ids and mask of transformers, by the marks."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given: list[Any] = messages
    if "part in m.content" in style.source:
        given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = tokenizer.apply_chat_template(given, chat_template=style.marked, tokenize=False)
    out = tokenizer.apply_chat_template(
        given,
        chat_template=style.marked,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return text, out["input_ids"], out["assistant_masks"]


def conversations(name: str) -> list[list[dict[str, str]]]:
    """Those that the style takes."""
    found = []
    for about, messages in CONVERSATIONS.items():
        if about == "system and turns" and name in NO_SYSTEM:
            messages = messages[1:]
        found.append(messages)
    return found


@pytest.mark.parametrize("name", STYLES)
def test_tokens_and_masks_are_those_of_marked_templates(
    name: str, folders: dict[tuple[str, str], Path]
) -> None:
    style = STYLES[name]
    for kind in ("gpt2", "llama"):
        folder = folders[kind, name]
        tokenizer = load_tokenizer(folder)
        encoder = Encoder(tokenizer)
        own = template_of(tokenizer)
        assert own.source == style.plain
        marked = ChatTemplate(style.marked, own.tokens, own.added)
        with Renderer(own) as found, Renderer(marked) as said:
            for messages in conversations(name):
                text, ids, mask = theirs(folder, style, messages)
                for renderer in (found, said):
                    ours = renderer.conversation(messages)
                    assert ours.text == text
                    encoded = encoder.conversation(ours)
                    assert encoded.ids.tolist() == ids
                    trained = [text[b:e] for b, e in ours.answers]
                    assert encoded.trained.astype(int).tolist() == mask, (messages, trained)

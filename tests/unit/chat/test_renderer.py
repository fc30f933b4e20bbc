"""Chat templates of others run in a process that bounds them, and reach nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.chat.error import ChatError
from llmtrain.chat.renderer import Renderer
from llmtrain.chat.source import ChatTemplate, template_of
from llmtrain.tokenizers.folder import load_tokenizer
from tests.support.chat_templates import STYLES, message
from tests.support.tokenizers import write_chat_tokenizer

ASKED = [message("user", "Hi?"), message("assistant", "Ho.")]
EACH = "{% for m in messages %}{{ m.content }}{% endfor %}"


def refusal(source: str, messages: list[dict[str, str]] = ASKED, seconds: int = 20) -> str:
    with pytest.raises(ChatError) as raised, Renderer(ChatTemplate(source, {}, ()), seconds) as renderer:
        renderer.conversation(messages)
    return f"{raised.value.got}; {raised.value.allowed}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ namespace(__init__=1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "fails on"),
        ("{{ 'x' * 10 ** 11 }}", "too much memory"),
        ("{% for m in messages %}", "invalid chat template (line 1"),
        ("{{ raise_exception('only\n  poems\x1b[2J') }}", "refuses: only poems"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'nothing' }}", "leaves out"),
        (EACH + EACH, "an answer that it repeats"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content[:1] }}{% endfor %}",
            "what the model writes",
        ),
    ],
)
def test_refusals(source: str, said: str) -> None:
    assert said in refusal(source)


def test_a_template_without_an_end_is_ended() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "takes too long" in refusal(endless, seconds=1)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([message("user", "Hi?")], "messages without an answer"),
        ([message("user", "\ufdd0"), message("assistant", "Ho.")], "U+FDD0"),
        ([message("user", "Hi?"), message("assistant", "\ud800")], "a lone surrogate"),
        ([message("critic", "Hm."), *ASKED], "the role 'critic', which the chat template leaves out"),
        ([ASKED[0], {**ASKED[1], "tool_calls": [{"name": "f"}]}], "tool_calls"),
        ([ASKED[0], message("assistant", "<think>Ho.</think>")], "leaves nothing"),
    ],
)
def test_messages_that_do_not_fit(messages: list[dict[str, str]], said: str) -> None:
    known = (
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} {% elif m.role == 'assistant' %}"
        "A: {{ m.content.split('</think>')[-1] }} {% endif %}{% endfor %}"
    )
    assert said in refusal(known, messages)


def test_the_folder_of_a_person_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    with Renderer(ChatTemplate(STYLES["chatml"].plain, {}, ())) as renderer:
        assert renderer.prompt(ASKED[:1]).endswith("<|im_start|>assistant\n")


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path, "gpt2", (), "{{ 'config' }}")
    assert template_of(load_tokenizer(folder)).source == "{{ 'config' }}"
    (folder / "chat_template.jinja").write_text("{{ 'file' }}")
    assert template_of(load_tokenizer(folder)).source == "{{ 'file' }}"
    assert template_of(load_tokenizer(folder), "{{ 'given' }}").source == "{{ 'given' }}"

"""Conversations and chat templates that cannot be used: one line, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as cli
from tests.support.chat_templates import STYLES, message
from tests.support.tokenizers import write_chat_tokenizer

ASKED = [message("user", "Hi?"), message("assistant", "Ho.")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers with chat templates of several styles."""
    made = {}
    for name in ("chatml", "gemma", "phi 3", "deepseek"):
        style = STYLES[name]
        made[name] = write_chat_tokenizer(tmp_path_factory.mktemp(name), "gpt2", style.tokens, style.plain)
    made["broken"] = write_chat_tokenizer(tmp_path_factory.mktemp("broken"), "gpt2", (), "{% for %}")
    return made


def refusal(
    rows: list[dict[str, Any]],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *more: str,
) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *("objective=instruct", "model=gpt_tiny", f"data.path={path}", f"data.tokenizer={tokenizer}"),
        *(f"data.cache.dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "train.epochs=1"),
        *("data.split.validation=0", "data.split.test=0", "batch.sequence_length=64"),
    ]
    given = {word.split("=")[0] for word in more}
    capsys.readouterr()
    assert cli.run_verb("finetune", [*(w for w in words if w.split("=")[0] not in given), *more]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
    *_, line = [line for line in said.splitlines() if line.startswith("llmtrain: error")]
    return line


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [message("user", "Hi?")]},
            "line 2: got messages without an answer; allowed: at least one",
        ),
        ({"messages": "Hi?"}, "line 2: got text in the field messages; allowed: a list of {role, content}"),
        ({"messages": {"role": "user"}}, "line 2: got an object in the field messages; allowed: a list"),
        ({"messages": []}, "line 2: got no message in the field messages"),
        ({"messages": ["Hi?"]}, "line 2: got text as message 1 of messages; allowed: an object with role"),
        (
            {"messages": [{"from": "human", "value": "Hi?"}]},
            "no role in message 1 of messages; allowed: role and",
        ),
        (
            {"messages": [message("user", "Hi?"), {"role": "assistant", "content": None}]},
            "got nothing as the content",
        ),
        (
            {"messages": [ASKED[0], message("assistant", " \n")]},
            "an empty content of the role assistant in message 2",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASKED[1]]},
            "a part of message 1 of messages",
        ),
        ({"text": "Hi?"}, "line 2: got no field messages; allowed: one of text, by data.messages_field=…"),
        ({"prompt": "Hi?", "completion": ""}, "line 2: got an empty completion"),
        ({"instruction": "Say.", "output": " "}, "line 2: got an empty output"),
    ],
)
def test_rows(
    row: dict[str, Any],
    said: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said in refusal([{"messages": ASKED}, row], folders["chatml"], tmp_path, capsys)


@pytest.mark.parametrize(
    ("style", "messages", "said"),
    [
        ("gemma", [message("system", "Be."), *ASKED], "template refuses: System role not supported"),
        ("gemma", [*ASKED, ASKED[1]], "template refuses: roles must alternate user/assistant"),
        (
            "deepseek",
            [ASKED[0], message("assistant", "<think>Ho.</think>")],
            "the chat template leaves nothing",
        ),
        ("broken", ASKED, "got an invalid chat template (line 1: "),
    ],
)
def test_templates(
    style: str,
    messages: list[dict[str, str]],
    said: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert said in refusal([{"messages": messages}], folders[style], tmp_path, capsys)


def test_settings(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, chatml = [{"messages": ASKED}], folders["chatml"]
    long = [{"messages": [message("user", "Hi? " * 99), ASKED[1]]}]
    assert "no conversation of 1 whose first answer ends within 64 tokens" in refusal(
        long, chatml, tmp_path, capsys
    )
    assert "objective.template: got" in refusal(
        rows, chatml, tmp_path, capsys, f"objective.template={tmp_path / 'none.jinja'}"
    )
    assert "data.prompt_field: got q; allowed: null beside i" in refusal(
        rows, chatml, tmp_path, capsys, "data.prompt_field=q", "data.instruction_field=i"
    )
    assert "data.completion_field" not in refusal(rows, chatml, tmp_path, capsys, "data.prompt_field=q")
    assert "instruct with model.family=bert" in refusal(rows, chatml, tmp_path, capsys, "model=bert_tiny")
    assert "1 with objective=instruct, which reads whole rows" in refusal(
        rows, chatml, tmp_path, capsys, "objective.packing=false", "parallel.sequence=2"
    )


def test_methods(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, chatml = [{"messages": ASKED}], folders["chatml"]
    assert (
        "objective.packing: got true with method=prefix, whose virtual tokens belong to one text"
        in refusal(rows, chatml, tmp_path, capsys, "method=prefix")
    )


def test_equal_answers(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "Hi?", "chosen": "Ho.", "rejected": "Ho."}]
    said = refusal(rows, folders["chatml"], tmp_path, capsys, "objective=dpo")
    assert "line 1: got chosen equal to rejected; allowed: two different answers" in said
    rows = [{"prompt": "Hi?", "chosen": "Ho.", "rejected": "No."}]
    said = refusal(rows, folders["chatml"], tmp_path, capsys, "objective=dpo", "parallel.pipeline=2")
    assert "parallel.pipeline: got 2; allowed: 1 with objective=dpo" in said

"""`llmtrain finetune objective=instruct`: from conversations in a file to a model that answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli import main as cli
from tests.support.chat_templates import STYLES, message
from tests.support.tokenizers import write_chat_tokenizer

TINY = ("model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.dropout=0")
ANSWERS = {"red": "warm", "blue": "cold", "green": "calm", "black": "dark"}
WORDS = ["tell", "me", "about", "the", "colour", "please", "what", "is", "like", "now"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(draw: np.random.Generator, turns: int) -> list[dict[str, str]]:
    """Questions about colours, whose answers follow from them."""
    messages = []
    for _ in range(turns):
        colour = str(draw.choice(list(ANSWERS)))
        asked = " ".join([*draw.choice(WORDS, draw.integers(2, 6)), colour])
        messages += [message("user", asked), message("assistant", f"It is {ANSWERS[colour]}.")]
    return messages


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(0)
    rows = [{"messages": conversation(draw, int(draw.integers(1, 4)))} for _ in range(300)]
    return write(tmp_path_factory.mktemp("talks") / "talks.jsonl", rows)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template."""
    style = STYLES["chatml"]
    return write_chat_tokenizer(tmp_path_factory.mktemp("chatml"), "gpt2", style.tokens, style.plain)


def settings(talks: Path, tokenizer: Path, tmp_path: Path, *more: str) -> list[str]:
    usual = [
        *("objective=instruct", "model=gpt_tiny", *TINY, f"data.path={talks}"),
        *(f"data.tokenizer={tokenizer}", f"data.cache.dir={tmp_path / 'cache'}"),
        *("data.split.validation=0.2", "batch.global_size=8", "batch.micro_size=8"),
        *("batch.sequence_length=96", "optimizer.lr=3e-3", f"run.dir={tmp_path / 'run'}"),
    ]
    given = {word.split("=")[0] for word in more}
    return [*(word for word in usual if word.split("=")[0] not in given), *more]


def run(capsys: pytest.CaptureFixture[str], verb: str, *words: str) -> str:
    """What it prints on stdout; of finetune, what it says."""
    capsys.readouterr()
    code = cli.run_verb(verb, list(words))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.err if verb == "finetune" else captured.out


def figures(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run_verb("evaluate", [f"checkpoint={folder}", "format=json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_answers_are_learned_and_exported(
    talks: Path, chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(
        talks,
        chatml,
        tmp_path,
        "train.epochs=null",
        "train.steps=150",
        "optimizer.lr=1e-2",
        "evaluation.every=null",
    )
    said = run(capsys, "finetune", *words)
    [line] = [line for line in said.splitlines() if line.startswith("train: ")]
    first, *_, last = line.split(", ")
    assert first == "train: 220 conversations"
    assert re.fullmatch(r"[\d.]+% padding", last)
    assert "% of them trained" in line
    assert re.search(r"cut \d+ at a turn to fit 96 tokens", line)
    found = figures(capsys, tmp_path / "run")
    assert found["token_accuracy"] > 0.97
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert "written" not in found
    found = figures(capsys, tmp_path / "run", "bleu=true", "max_samples=20")
    assert found["written"] == 20, "conversations, of which a sequence holds several"
    assert found["rouge1"] > 0.95, "the last answer of each, given all before it"
    assert found["rouge1_interval"][0] <= found["rouge1"] <= found["rouge1_interval"][1]

    asked = ["chat=true", "prompt=tell me about red", "generate.temperature=0", "generate.max_new_tokens=20"]
    assert run(capsys, "generate", f"checkpoint={tmp_path / 'run'}", *asked) == "It is warm.\n"

    run(capsys, "export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = conversation(np.random.default_rng(1), 2)
    theirs = transformers.AutoTokenizer.from_pretrained(chatml)
    assert tokenizer.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end == ends or end in ends
    assert run(capsys, "generate", f"checkpoint={tmp_path / 'out'}", *asked).strip() == "It is warm."


def test_without_a_template_the_plain_one_is_used_and_exported(
    talks: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(talks, corpus, tmp_path, "train.epochs=null", "train.steps=2", "evaluation.every=null")
    run(capsys, "finetune", *words)
    shown = run(capsys, "data", "show", f"run={tmp_path / 'run'}", "max_samples=1")
    assert "⟦User: " in shown
    assert re.search(r"\nAssistant:⟧ It is \w+\.</s>⟦\n", re.sub(r"\n {4}", "\n", shown))
    run(capsys, "export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}")
    import transformers

    from llmtrain.chat.encoder import Encoder
    from llmtrain.chat.renderer import Renderer
    from llmtrain.chat.source import template_of
    from llmtrain.tokenizers.folder import load_tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = conversation(np.random.default_rng(1), 2)
    out = theirs.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = load_tokenizer(corpus)
    with Renderer(template_of(tokenizer)) as renderer:
        encoded = Encoder(tokenizer).conversation(renderer.conversation(messages))
    assert out["input_ids"] == encoded.ids.tolist()
    assert out["assistant_masks"] == encoded.trained.astype(int).tolist()


def test_the_forms_of_rows_are_the_same_conversation(
    chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"tell me about {colour}" for colour in ANSWERS for _ in range(5)]
    answers = [f"It is {ANSWERS[text.split()[-1]]}." for text in asked]
    pairs = list(zip(asked, answers, strict=True))
    forms: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
        "messages": ([{"messages": [message("user", q), message("assistant", a)]} for q, a in pairs], ()),
        "prompt": ([{"prompt": q, "completion": a} for q, a in pairs], ()),
        "named": (
            [{"q": q, "a": a} for q, a in pairs],
            ("data.prompt_field=q", "data.completion_field=a"),
        ),
        "lists": (
            [{"prompt": [message("user", q)], "completion": [message("assistant", a)]} for q, a in pairs],
            (),
        ),
        "instruction": ([{"instruction": q, "input": "", "output": a} for q, a in pairs], ()),
    }
    shown = {}
    for name, (rows, fields) in forms.items():
        talks = write(tmp_path / f"{name}.jsonl", rows)
        data = [f"data.path={talks}", f"data.tokenizer={chatml}", f"data.cache.dir={tmp_path / 'cache'}"]
        split = ["data.split.validation=0", "data.split.test=0", "objective.packing=false"]
        words = ["objective=instruct", "data=table", *data, *split, *fields, "sequence_length=96"]
        shown[name] = run(capsys, "data", "show", *words).partition("sample 0")[2]
    assert len({*shown.values()}) == 1, shown
    assert "⟦<|im_start|>user\n" in re.sub(r"\n {4}", "\n", shown["messages"])
    assert "⟧It is " in re.sub(r"\n {4}", "\n", shown["messages"])


def test_long_conversations_are_cut_at_turns(
    chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtrain.data.datasets.conversations import Conversations, PackedConversations
    from llmtrain.train.resolve import resolve
    from tests.support.training import compose, open_loader

    draw = np.random.default_rng(2)
    rows = [{"messages": conversation(draw, turns)} for turns in [1] * 20 + [8] * 6]
    rows += [{"messages": [message("user", "tell " * 200), message("assistant", "It is.")]}] * 3
    talks = write(tmp_path / "talks.jsonl", rows)
    none = ("data.split.validation=0", "data.split.test=0", "train.steps=2", "train.epochs=null")
    found = {}
    for packing in ("true", "false"):
        packed = f"objective.packing={packing}"
        words = settings(talks, chatml, tmp_path, *none, packed, "data.workers=0")
        resolved = resolve(compose(words, "finetune"))
        loader = open_loader(resolved)
        said = loader.stream.describe()
        assert "cut 6 at a turn to fit 96 tokens, left out 3 whose first answer does not fit" in said
        [dataset] = resolved.config.objective.open(
            resolved.config.model, resolved.config.data, resolved.corpora, "train", 96
        ).values()
        assert isinstance(dataset, PackedConversations if packing == "true" else Conversations)
        raw = dataset.get(np.arange(len(dataset)))
        tokens = raw["tokens"][raw["documents"] >= 0]
        trained = ~raw["contexts"] & (raw["documents"] >= 0)
        found[packing] = len(tokens), int(trained.sum()), np.bincount(tokens).tolist()
        ends = resolved.corpora.load_tokenizer().pieces().index("<|im_end|>")
        for row in range(len(dataset)):
            for number in range(raw["documents"][row].max() + 1):
                last = np.flatnonzero(raw["documents"][row] == number)[-1]
                assert raw["tokens"][row, last] == ends, "each ends with the end of an answer"
                assert trained[row, last]
    assert found["true"] == found["false"]


def test_packed_rows_and_single_ones_have_the_same_loss(
    talks: Path, chatml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = settings(talks, chatml, tmp_path, "train.epochs=null", "train.steps=3", "evaluation.every=null")
    run(capsys, "finetune", *words)
    packed = figures(capsys, tmp_path / "run")
    once = ("train.epochs=null", "train.steps=1", "optimizer.lr=1e-20", f"run.dir={tmp_path / 'single'}")
    start = (f"model.path={tmp_path / 'run'}", "model=pretrained", "objective.packing=false")
    single = settings(talks, chatml, tmp_path, *start, *once)
    run(capsys, "finetune", *[word for word in single if word not in TINY])
    found = figures(capsys, tmp_path / "single")
    assert found["targets"] == packed["targets"]
    assert found["loss"] == pytest.approx(packed["loss"], rel=1e-5)

"""`llmtrain evaluate suite=lm_eval`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli import main as cli
from llmtrain.interchange.huggingface import export_folder
from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from tests.support.harness_tasks import write_tasks
from tests.support.huggingface import GPT2


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=6)


@pytest.fixture(scope="module")
def model(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    gpt = GPT(replace(GPT2, vocab_size=320, max_sequence_length=64))
    initialize(gpt, seed=0)
    export_folder(gpt.config, dict(gpt.named_parameters()), corpus / "tokenizer.model", path)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run_verb("evaluate", ["suite=lm_eval", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_table_and_an_object(model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"checkpoint={model}", "tasks=[choice,t*]", f"tasks_path={tasks}", "limit=4"]
    code, shown, said = run(capsys, *words, f"output={tmp_path / 'found.json'}")
    assert code == 0, said
    rows = [re.split(r"  +", line) for line in shown.splitlines()[3:]]
    assert rows[0] == ["task", "shots", "figure", "value"]
    assert [row[0] for row in rows[1:]] == ["choice", "", "texts", ""]
    assert [row[-2] for row in rows[1:]] == ["acc", "acc_norm", "word_perplexity", "bits_per_byte"]
    assert re.fullmatch(r"\d\.\d{4} ± \d\.\d{4}", rows[1][-1])
    code, shown, _ = run(capsys, *words, "format=json")
    found = json.loads(shown)
    assert found == json.loads((tmp_path / "found.json").read_text())
    assert found["n-samples"]["choice"] == {"original": 6, "effective": 4}
    assert found["versions"] == {"choice": 1.0, "texts": 1.0}
    assert found["results"]["choice"]["acc,none"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found["suite"] == "lm_eval"


def test_solved_examples(model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"checkpoint={model}", "tasks=[letters]", f"tasks_path={tasks}", "format=json"]
    found = [json.loads(run(capsys, *words, f"num_fewshot={shots}")[1]) for shots in (0, 2)]
    assert [each["n-shot"]["letters"] for each in found] == [0, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tasks=[choise]", "tasks: got 'choise', which is no task.*similar: choice"),
        ("tasks=[]", "tasks: got nothing"),
        ("tasks=[choice] tasks_path=nowhere", "tasks_path: got nowhere, no such folder"),
        ("tasks=[choice] limit=0", "limit: got 0; allowed: 1 or more, or null"),
        ("tasks=[choice] num_fewshot=-1", "num_fewshot: got -1"),
        ("tasks=[choice] split=test", "split: got test; allowed: its default with suite=lm_eval"),
        ("tasks=[choice] data.path=corpus", "data.path: got corpus; allowed: none with a suite"),
        ("tasks=[choice] sequence_length=100", "sequence_length: got 100; allowed: 2 to 64"),
        ("tasks=[hellaswag]", "tasks: got hellaswag, whose data set .* cannot be fetched.*HF_HOME"),
        ("tasks=[ai2_arc]", "tasks: got ai2_arc, whose data are not on this machine and cannot be fetched"),
        ("tasks=[lost]", "tasks: got lost, which does not load .*relative to the folder"),
        ("tasks=[broken]", "tasks: got broken, which does not load"),
        ("tasks=[undefined]", "tasks: got undefined, which does not load .*no element 7"),
        ("tasks=[failing]", r"tasks: got a task that fails \(ValueError: no figures here\)"),
        ("tasks=[strange]", "tasks: got generation_kwargs with typical_p=0.5; allowed: until, max_gen_toks"),
        ("tasks=[long]", "tasks: got generation_kwargs of 64 new tokens; allowed: fewer than the 64"),
    ],
)
def test_refusals(words: str, message: str, model: Path, tasks: Path, capsys: pytest.CaptureFixture[str]):
    """Each one line, and exit code 2."""
    write_wrong_tasks(tasks)
    _, _, said = found = run(capsys, f"checkpoint={model}", f"tasks_path={tasks}", *words.split())
    assert found[0] == 2
    (line,) = said.splitlines()
    assert re.search(message, line), line


def write_wrong_tasks(folder: Path) -> None:
    right, writing = (folder / "choice.yaml").read_text(), (folder / "writing.yaml").read_text()
    changes = {
        "lost": right.replace("/choice.jsonl", "/nothing.jsonl"),
        "broken": right.replace("multiple_choice", "multiple_choices"),
        "undefined": right.replace("{{choices}}", "{{choices[7]}}"),
        "failing": right + "process_results: !function failing.fail\n",
        "strange": writing.replace("do_sample: false", "typical_p: 0.5"),
        "long": writing.replace("max_gen_toks: 8", "max_gen_toks: 64"),
    }
    (folder / "failing.py").write_text("def fail(doc, results):\n    raise ValueError('no figures here')\n")
    for name, text in changes.items():
        (folder / f"{name}.yaml").write_text(re.sub(r"^task: \w+", f"task: {name}", text))


def test_a_model_that_continues_no_texts_is_refused(
    corpus: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    bert = Bert(BertConfig(vocab_size=321, hidden_size=16, num_layers=1, num_heads=2, mask_id=320))
    initialize(bert, seed=0)
    weights = dict(bert.named_parameters())
    export_folder(bert.config, weights, corpus / "tokenizer.model", tmp_path / "bert")
    code, _, said = run(capsys, f"checkpoint={tmp_path / 'bert'}", "tasks=[choice]", f"tasks_path={tasks}")
    assert code == 2
    assert re.search(r"checkpoint: got .*of family bert \(encoder\); allowed: a decoder", said)


def test_keys_of_a_suite_without_one(corpus: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run_verb("evaluate", ["checkpoint=x", f"data.path={corpus}", "tasks=[choice]"]) == 2
    assert "tasks: got ['choice']; allowed: with suite=lm_eval alone" in capsys.readouterr().err


def test_all_keys_that_a_suite_heeds_are_those_of_the_verb():
    from dataclasses import fields

    from llmtrain.commands.evaluate import EvaluateConfig
    from llmtrain.harness.suite import KEYS, SuiteConfig

    usual: dict[str, Any] = {field.name: field.default for field in fields(EvaluateConfig)}
    of_suite = {field.name: field.default for field in fields(SuiteConfig) if field.name != "suite"}
    assert {name: usual[name] for name in of_suite} == of_suite
    assert {*KEYS} <= of_suite.keys()

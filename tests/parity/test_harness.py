"""Tasks of the lm-evaluation-harness: the figures of a model are those of the harness's own `hf` model on the
exported folder, and those of any layout."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtrain.cli import main as cli
from llmtrain.harness.conversing import Conversing
from llmtrain.interchange.huggingface import export_folder
from llmtrain.interchange.trained import load_trained
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from tests.support import warm
from tests.support.chat_templates import STYLES
from tests.support.harness_tasks import TASKS, numbers, write_tasks
from tests.support.huggingface import GPT2
from tests.support.imports import LLAMA
from tests.support.tokenizers import write_tokenizer

pytestmark = pytest.mark.slow

LENGTH = 48
"""Of the models: texts of the task are longer, and are read in windows; contexts of tasks are cut."""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def export(path: Path, config: GPTConfig, tokenizer: Path | None) -> Path:
    model = GPT(replace(config, max_sequence_length=LENGTH, init_std=0.3, dropout=0.0))
    initialize(model, seed=0)
    export_folder(model.config, dict(model.named_parameters()), tokenizer, path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported Llama whose tokenizer.json begins each text with <s>."""
    path = tmp_path_factory.mktemp("llama")
    tokenizer = write_tokenizer(path / "tokenizer", "llama")
    spec = json.loads((tokenizer / "tokenizer.json").read_text())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (tokenizer / "tokenizer.json").write_text(json.dumps(spec))
    return export(path / "model", LLAMA, tokenizer)


@pytest.fixture(scope="module")
def gpt2(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported GPT-2 with a sentencepiece model, as llmtrain trains it."""
    path = tmp_path_factory.mktemp("gpt2") / "model"
    return export(path, replace(GPT2, vocab_size=320), corpus / "tokenizer.model")


def evaluated(model: Path, tasks: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What `llmtrain evaluate` prints."""
    capsys.readouterr()
    words = [f"checkpoint={model}", "suite=lm_eval", f"tasks=[{','.join(TASKS)}]", f"tasks_path={tasks}"]
    assert cli.run_verb("evaluate", [*words, "format=json", *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def of_hf(folder: Path, tasks: Path, batch_size: int, **more: Any) -> dict[str, Any]:
    """What the harness's own model finds."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = simple_evaluate(
            HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size),
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            log_samples=False,
            **more,
        )
    assert found is not None
    return dict(found)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_figures_are_those_of_the_harness_s_own_model(
    name: str, tasks: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
):
    """To the last bit where both read one request at a time by the same operators of torch, as of a Llama.
    Otherwise the last bit of a log-probability differs, as between batches of transformers, and with it the
    last digits of a perplexity."""
    folder = request.getfixturevalue(name)
    alone = numbers(of_hf(folder, tasks, batch_size=1))
    for size, is_exact in (("1", name == "llama"), ("4096", False)):
        ours = numbers(evaluated(folder, tasks, capsys, f"batch_tokens={size}"))
        for task, figures in alone.items():
            assert ours[task].keys() == figures.keys()
            for figure, value in figures.items():
                is_sum = figure in ("word_perplexity,none", "bits_per_byte,none")
                expected = pytest.approx(value, rel=1e-6) if is_sum and not is_exact else value
                assert ours[task][figure] == expected, (task, figure)
    assert 0 < alone["choice"]["acc,none"] < 1
    assert alone["choice"]["acc_stderr,none"] > 0


def test_conversations_are_those_of_the_harness_s_own_model(
    llama: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By the folder's chat template; the model continues what a task begins of an answer."""
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(STYLES["chatml"].plain)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What? "}]
    answered = [*messages, {"role": "assistant", "content": "The answer is"}]
    rendered = AutoTokenizer.from_pretrained(folder).apply_chat_template
    with Conversing(load_trained(folder)) as conversing:
        theirs = rendered(messages, tokenize=False, add_generation_prompt=True)
        assert conversing.render(messages, True) == theirs
        theirs = rendered(answered, tokenize=False, continue_final_message=True)
        assert conversing.render(answered, False) == theirs
    own = write_tasks(tmp_path / "tasks")
    begun = (own / "choice.yaml").read_text() + 'gen_prefix: "The answer is"\n'
    (own / "choice.yaml").write_text(begun)
    ours = numbers(evaluated(folder, own, capsys, "chat=true", "batch_tokens=1", "num_fewshot=1"))
    assert ours == numbers(of_hf(folder, own, 1, apply_chat_template=True, num_fewshot=1))


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"])
def test_figures_at_any_layout(layout: str, llama: Path, tasks: Path, capsys: pytest.CaptureFixture[str]):
    """Two processes that share the model, or the requests."""
    alone = evaluated(llama, tasks, capsys)
    words = [f"checkpoint={llama}", "suite=lm_eval", f"tasks=[{','.join(TASKS)}]", f"tasks_path={tasks}"]
    done = warm.on_ranks(2, "evaluate", *words, "format=json", layout, HF_HUB_OFFLINE="1")
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[1].stdout == ""
    shared = json.loads(done[0].stdout)
    for task, figures in numbers(alone).items():
        for name, value in figures.items():
            found = shared["results"][task][name]
            assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), (
                task,
                name,
            )

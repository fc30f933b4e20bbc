"""Chat training in every layout equals one process, and transformers' loss over the same tokens and marks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmtrain.cli import main as cli
from tests.parity.matrix import TOLERANCES, deviation
from tests.support.chat_templates import STYLES, message
from tests.support.tokenizers import write_chat_tokenizer
from tests.support.training import Trace, train

STEPS = 3
LAYOUTS = {
    "ZeRO 3": (2, ("parallel.zero=3",)),
    "tensor": (2, ("parallel.tensor=2",)),
    "tensor, shared sequence": (2, ("parallel.tensor=2", "parallel.tensor_sequence=true")),
    "sequence": (2, ("parallel.sequence=2",)),
    "pipeline": (2, ("parallel.pipeline=2", "parallel.zero=1")),
    "recompute": (1, ("recompute=full",)),
}
SIZE = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=4", "model.dropout=0.1")
GROWN = "objective.new_tokens=['<|im_start|>','<|im_end|>']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, tokenizers with and without the tokens of their template, and a model of the latter."""
    folder, draw = tmp_path_factory.mktemp("chat"), np.random.default_rng(0)
    words = ["the", "film", "was", "a", "fine", "old", "tale", "of", "two", "men"]
    with open(folder / "talks.jsonl", "w") as file:
        for _ in range(80):
            messages = []
            for _ in range(int(draw.integers(1, 4))):
                said = [" ".join(draw.choice(words, draw.integers(2, 9))) for _ in range(2)]
                messages += [message("user", said[0]), message("assistant", said[1])]
            row = {
                "messages": messages,
                "prompt": messages[0]["content"],
                "chosen": said[0],
                "rejected": said[1] + " no",
            }
            file.write(json.dumps(row) + "\n")
    style = STYLES["chatml"]
    write_chat_tokenizer(folder / "chatml", "gpt2", style.tokens, style.plain)
    write_chat_tokenizer(folder / "bare", "gpt2", (), None)
    (folder / "chatml.jinja").write_text(style.plain)
    for tied in ("true", "false"):
        first = [
            *data(folder, "bare"),
            "model=gpt_tiny",
            *SIZE,
            f"model.tie_embeddings={tied}",
            "train.steps=1",
        ]
        first += ["train.epochs=null", "evaluation.every=null", f"run.dir={folder / f'base {tied}'}"]
        assert cli.run_verb("finetune", ["objective=instruct", *first]) == 0
    return folder


def data(folder: Path, tokenizer: str | None) -> list[str]:
    return [
        *("data=table", f"data.path={folder / 'talks.jsonl'}", f"data.cache.dir={folder / 'tables'}"),
        *([] if tokenizer is None else [f"data.tokenizer={folder / tokenizer}"]),
        *("data.split.validation=0.2", "batch.global_size=8", "batch.micro_size=2"),
        *("batch.sequence_length=64", "optimizer.lr=3e-3", "seed=7"),
    ]


def settings(folder: Path, case: str) -> tuple[str, ...]:
    if case.startswith("grown"):
        start = (
            "model=pretrained",
            f"model.path={folder / ' '.join(['base', case.split()[1]])}",
            "model.dropout=0.1",
        )
        template = f"objective.template={folder / 'chatml.jinja'}"
        method = ("method=lora",) if case.endswith("lora") else ()
        return ("objective=instruct", *start, *data(folder, None), template, GROWN, "train.steps=20", *method)
    more = (
        ("objective=dpo",)
        if case == "dpo"
        else ("objective=instruct", f"objective.packing={case == 'packed'}")
    )
    return (*more, "model=gpt_tiny", *SIZE, *data(folder, "chatml"), "train.steps=20")


@pytest.fixture(scope="module")
def references() -> dict[str, Trace]:
    return {}


@pytest.mark.slow
@pytest.mark.in_turns(4)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("case", ["packed", "single", "dpo", "grown true", "grown false", "grown false lora"])
def test_equals_one_process(case: str, layout: str, folder: Path, references: dict[str, Trace]) -> None:
    size, more = LAYOUTS[layout]
    divides = any("sequence" in key for key in more)
    if (case in ("single", "dpo") and divides) or (case == "dpo" and layout == "pipeline"):
        return  # refused, as tests of refusals show
    plain = settings(folder, case)
    if case not in references:
        [references[case]] = train(1, plain, STEPS)
    for trace in train(size, (*plain, *more), STEPS):
        found = deviation(trace, references[case])
        assert found.within(TOLERANCES["fp32"]), found


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["true", "false"])
def test_new_tokens_have_rows_of_the_mean(tied: str, folder: Path) -> None:
    [trace] = train(1, settings(folder, f"grown {tied}"), 1)
    from llmtrain.interchange.trained import load_trained

    before = load_trained(folder / f"base {tied}").weights
    for name, weight in trace.initial_weights.items():
        old = before[name].numpy()
        if weight.shape == old.shape:
            assert np.array_equal(weight, old)
            continue
        assert name in ("embedding.weight", "head.weight")
        assert weight.shape[0] == len(old) + 2
        assert np.array_equal(weight[: len(old)], old)
        assert weight[len(old) :] == pytest.approx(np.broadcast_to(old.mean(0), (2, old.shape[1])), abs=1e-6)


@pytest.mark.slow
def test_the_loss_is_that_of_transformers_and_grown_exports_load(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    import transformers

    words = [*settings(folder, "grown false"), "train.epochs=null", f"run.dir={tmp_path / 'run'}"]
    words = [word for word in words if word not in ("train.steps=20",)] + ["train.steps=3"]
    assert cli.run_verb("finetune", words) == 0
    assert cli.run_verb("export", [f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]) == 0
    capsys.readouterr()
    assert (
        cli.run_verb("evaluate", [f"checkpoint={tmp_path / 'run'}", "format=json", "sequence_length=256"])
        == 0
    )
    ours = json.loads(capsys.readouterr().out)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(tokenizer) == model.config.vocab_size
    marked, total, count = STYLES["chatml"].marked, 0.0, 0
    for messages in held_out(folder, tmp_path / "run"):
        out = tokenizer.apply_chat_template(
            messages, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor([out["input_ids"]]), torch.tensor([out["assistant_masks"]])
        labels = torch.where(mask == 1, ids, -100)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        targets = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * targets, count + targets
    assert count == ours["targets"]
    assert total / count == pytest.approx(ours["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["true", "false"])
def test_lora_with_new_tokens_goes_out_to_peft_and_back(tied: str, folder: Path, tmp_path: Path) -> None:
    """The rows of the new tokens train; logits of the merged folder, of the folder of PEFT over the larger
    base, and of that read again, are those of the run."""
    import peft
    import torch
    import transformers

    from llmtrain.interchange.trained import load_trained

    given = settings(folder, f"grown {tied} lora")
    words = [word for word in given if word not in ("train.steps=20", "model.dropout=0.1")]
    words += ["train.epochs=null", "train.steps=3", f"run.dir={tmp_path / 'run'}"]
    base, hf = folder / f"base {tied}", tmp_path / "hf"
    assert cli.run_verb("export", [f"checkpoint={base}", f"output={hf}"]) == 0
    assert cli.run_verb("finetune", [word.replace(str(base), str(hf)) for word in words]) == 0
    run = f"checkpoint={tmp_path / 'run'}"
    trained = load_trained(tmp_path / "run")
    changed = trained.weights["embedding.weight"]
    assert not torch.equal(changed[-2], changed[-1]), "both began as the mean"
    assert trained.left_out
    assert "embedding.weight" not in trained.left_out

    for form in ("merged", "peft"):
        assert cli.run_verb("export", [run, f"output={tmp_path / form}", f"form={form}"]) == 0
    again = [f"source={tmp_path / 'peft'}", f"base={hf}", f"output={tmp_path / 'again'}"]
    assert cli.run_verb("import", again) == 0
    tokens_BT = torch.arange(40).view(2, 20) * 3 % len(changed)
    tokens_BT[:, 3:5] = torch.tensor([len(changed) - 2, len(changed) - 1])
    cpu = torch.device("cpu")
    with torch.no_grad():
        wanted = trained.build(cpu).eval()(tokens_BT)
        read = load_trained(tmp_path / "again")
        torch.testing.assert_close(read.build(cpu).eval()(tokens_BT), wanted, atol=1e-5, rtol=1e-5)
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(tokens_BT).logits, wanted, atol=1e-5, rtol=1e-5)
        model = transformers.AutoModelForCausalLM.from_pretrained(hf)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "peft")
        assert len(tokenizer) == len(changed)
        assert tokenizer.chat_template
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
        torch.testing.assert_close(model(tokens_BT).logits, wanted, atol=1e-5, rtol=1e-5)
    assert read.tokenizer().vocab_size == len(changed)


def held_out(folder: Path, run: Path) -> list[list[dict[str, str]]]:
    """The conversations of the validation split, as `llmtrain prepare` would divide them."""
    from llmtrain.objectives.conversations import Conversation
    from llmtrain.prepare.clean import split_of
    from llmtrain.tables.build import text_hashes

    rows = [json.loads(line) for line in (folder / "talks.jsonl").read_text().splitlines()]
    texts = [Conversation(tuple(row["messages"])).text for row in rows]
    chosen = split_of(text_hashes(texts)[:, 1], 0.2, 0.05)
    found = [row["messages"] for row, split in zip(rows, chosen.tolist(), strict=True) if split == 1]
    assert found
    return found

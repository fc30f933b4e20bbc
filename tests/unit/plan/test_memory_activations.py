"""The estimated activations against what torch really keeps between the passes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain.models.bert.config import BertConfig
from llmtrain.models.bert.model import Bert
from llmtrain.models.convolutional.config import SimpleCNNConfig
from llmtrain.models.convolutional.model import SimpleCNN
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.model import EncoderDecoder
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.models.xlnet.config import XLNetConfig
from llmtrain.models.xlnet.model import XLNet
from llmtrain.nn import attention_choice, head
from llmtrain.nn import memory as nn_memory
from llmtrain.nn.memory import Conditions, Numbers
from llmtrain.nn.model_config import Row
from llmtrain.nn.recompute_config import RecomputeConfig
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.paired_text import PairedTextConfig
from llmtrain.objectives.permuted_lm import PermutedLM, PermutedLMConfig
from llmtrain.parallel.recompute import apply_recompute
from tests.support.memory import allocated
from tests.support.planned_memory import (
    GPT2_FORM,
    LLAMA_FORM,
    NUMBERS,
    B,
    T,
    V,
    all_steps,
    autocast,
    built,
    kept_by,
    kept_bytes,
    kept_copies,
    memory_of,
)

TOLERANCE = 0.03
"""The estimates' stated error where the arithmetic is this project's own; oneDNN's workspace is measured."""

QWEN3_FORM = {**LLAMA_FORM, "qk_norm": True, "head_dim": 32}

GEMMA2_FORM = {
    **LLAMA_FORM,
    "norm_place": "both",
    "norm_adds_one": True,
    "scale_embedding": True,
    "sliding_window": 20,
    "full_attention_layers": (1,),
    "attention_softcap": 50.0,
    "logit_softcap": 30.0,
}

GEMMA3_FORM = {
    **QWEN3_FORM,
    "norm_place": "both",
    "norm_adds_one": True,
    "scale_embedding": True,
    "sliding_window": 20,
    "full_attention_layers": (2,),
    "local_rope_theta": 1000.0,
}

OLMO2_FORM = {**QWEN3_FORM, "norm_place": "after", "qk_norm_over": "all_heads"}

CASES = {
    "gpt2": (GPT2_FORM, False),
    "gpt2 documents": (GPT2_FORM, True),
    "gpt2 dropout": ({**GPT2_FORM, "dropout": 0.1}, False),
    "gpt2 no bias": ({**GPT2_FORM, "bias": False, "tie_embeddings": False}, False),
    "llama": (LLAMA_FORM, False),
    "llama dropout": ({**LLAMA_FORM, "dropout": 0.1}, False),
    "llama documents": (LLAMA_FORM, True),
    "qwen3": (QWEN3_FORM, False),
    "qwen3 dropout": ({**QWEN3_FORM, "dropout": 0.1}, False),
    "gemma2": (GEMMA2_FORM, False),
    "gemma2 dropout": ({**GEMMA2_FORM, "dropout": 0.1}, False),
    "gemma3": (GEMMA3_FORM, False),
    "olmo2": (OLMO2_FORM, False),
    "olmo2 dropout": ({**OLMO2_FORM, "dropout": 0.1}, False),
}


@pytest.mark.in_turns(5)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("case", CASES)
def test_gpt_activations(case: str, precision: str) -> None:
    settings, with_documents = CASES[case]
    config = GPTConfig(**settings)
    model = built(GPT(config), precision)
    tokens_BT = torch.randint(V, (B, T))
    documents_BT = (torch.arange(T) // 20).expand(B, T) if with_documents else None

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=tokens_BT, documents_BT=documents_BT)

    numbers = NUMBERS[precision]
    expected = kept_by(config, numbers, B, T, document_mask=with_documents, exact_dropout=False)
    expected += B * T * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += kept_copies(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.in_turns(5)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bert_activations(precision: str, dropout: float) -> None:
    """Up to its heads, which work on the asked tokens alone."""
    settings = {
        "vocab_size": V,
        "max_sequence_length": 160,
        "hidden_size": 96,
        "num_layers": 3,
        "num_heads": 6,
    }
    config = BertConfig(**settings, dropout=dropout)  # type: ignore[arg-type]
    model = built(Bert(config), precision)
    tokens_BT = torch.randint(V, (B, 160))
    labels_BT = torch.full_like(tokens_BT, -100)

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(tokens_BT, labels_BT=labels_BT)

    expected = kept_by(config, NUMBERS[precision], B, 160, document_mask=False, exact_dropout=False)
    if precision == "autocast":
        expected += kept_copies(config)
    # The head's gradients lie there already.
    expected += 4 * V * config.hidden_size
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.in_turns(5)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize(("dropout", "has_segments"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_xlnet_activations(mode: str, dropout: float, has_segments: bool, precision: str) -> None:
    """Up to its head, of a batch as its objective makes it."""
    T = 100
    config = XLNetConfig(
        vocab_size=V, hidden_size=96, num_layers=3, num_heads=6, dropout=dropout, has_segments=has_segments
    )
    recompute = RecomputeConfig(mode)  # type: ignore[arg-type]
    model = built(XLNet(config), precision)
    apply_recompute(model, recompute)
    learned = PermutedLM(PermutedLMConfig(), has_segments=has_segments)
    raw = {"tokens": np.zeros((B, T + 1), np.int64), "documents": np.zeros((B, T + 1), np.int32)}
    batch = learned.collate(raw | {"keys": np.arange(B)})
    batch["labels"][:] = -100
    batch["dropout_keys"] = torch.arange(B)

    def loss() -> torch.Tensor:
        with autocast(precision):
            return learned(model, batch).loss_sum

    expected = kept_by(config, NUMBERS[precision], B, T, recompute=recompute) + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += kept_copies(config, recompute)
        if mode != "none":  # no block is at work between the passes
            expected -= kept_copies(replace(config, num_layers=1))
    assert allocated(loss).kept == pytest.approx(expected, rel=0.05)


PAIRS = Seq2SeqConfig(
    vocab_size=V,
    hidden_size=96,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=6,
)

T5_FORM = replace(
    PAIRS,
    norm="rmsnorm",
    norm_first=True,
    positions="relative",
    scale_attention=False,
    bias=False,
    gated_mlp=True,
    activation="gelu_tanh",
)

BART_FORM = replace(
    PAIRS, positions="learned", max_sequence_length=160, embedding_norm=True, activation="gelu"
)


@pytest.mark.in_turns(5)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("form", [PAIRS, T5_FORM, BART_FORM], ids=["transformer", "t5", "bart"])
def test_seq2seq_activations(form: Seq2SeqConfig, mode: Any, dropout: float, precision: str) -> None:
    config, S, targets = replace(form, dropout=dropout), 160, 72
    recompute = RecomputeConfig(mode)
    model = built(EncoderDecoder(config), precision)
    apply_recompute(model, recompute)
    sources_BS, tokens_BT = torch.randint(V, (B, S)), torch.randint(V, (B, targets))

    def loss() -> torch.Tensor:
        keys_B = torch.arange(B)
        with autocast(precision):
            return model(tokens_BT, sources_BS=sources_BS, labels_BT=tokens_BT, dropout_keys_B=keys_B)

    numbers = NUMBERS[precision]
    row = PairedTextConfig(target_length=targets).row(S)
    expected = kept_by(config, numbers, B, S, row, document_mask=False, recompute=recompute)
    expected += B * targets * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast" and mode == "none":
        expected += kept_copies(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.05)


@pytest.mark.in_turns(3)
@pytest.mark.parametrize("precision", NUMBERS)
@pytest.mark.parametrize("encoder_only", [False, True])
@pytest.mark.parametrize("form", [T5_FORM, BART_FORM], ids=["t5", "bart"])
def test_activations_of_a_task_over_an_encoder_decoder(
    form: Seq2SeqConfig, encoder_only: bool, precision: str
) -> None:
    head = TaskHeadConfig("classes", 3, pooling="last", dropout=0.0, encoder_only=encoder_only)
    config, S = replace(form, dropout=0.1, task=head, start_id=1), 160
    model = built(EncoderDecoder(config), precision)
    tokens_BS, lengths_B, labels_B = torch.randint(V, (B, S)), torch.full((B,), S), torch.zeros(B).long()

    def loss() -> torch.Tensor:
        keys_B = torch.arange(B)
        with autocast(precision):
            return model(tokens_BS, lengths_B=lengths_B, labels_BT=labels_B, dropout_keys_B=keys_B)

    numbers = NUMBERS[precision]
    expected = kept_by(config, numbers, B, S, Row(S, predicted=1), document_mask=False)
    if precision == "autocast":
        expected += kept_copies(config)
    assert kept_bytes(model, loss) == pytest.approx(expected, rel=0.05)


@pytest.mark.in_turns(5)
@pytest.mark.parametrize(
    "form",
    [GPT2_FORM, LLAMA_FORM, QWEN3_FORM, {**LLAMA_FORM, "sliding_window": 40}],
    ids=["gpt2", "llama", "qwen3", "window"],
)
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("longest", [100, 4096])
def test_gpt_activations_of_longer_sequences(
    longest: int, with_documents: bool, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens are two blocks of attention, or past the longest that is done in blocks. Documents as long
    as these leave no key out of a block: the estimate is of the most."""
    monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", longest)
    config = GPTConfig(**{**form, "max_sequence_length": 200})
    model = built(GPT(config), "fp32")
    tokens_BT = torch.randint(V, (2, 200))
    documents_BT = (torch.arange(200) // 150).expand(2, 200) if with_documents else None
    expected = kept_by(config, NUMBERS["fp32"], 2, 200, document_mask=with_documents)
    expected += 400 * config.hidden_size * 4 + 4 * V * config.hidden_size
    found = kept_bytes(model, lambda: model(tokens_BT, labels_BT=tokens_BT, documents_BT=documents_BT))
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.in_turns(5)
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
@pytest.mark.parametrize(
    ("tokens", "hidden_size", "vocab_size"), [(512, 64, 2000), (512, 256, 2000), (64, 64, 500)]
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_peak_of_the_head(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    precision: str,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (head, nn_memory):
        monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 2**18)
    model = head.LanguageModelHead(hidden_size, vocab_size, softcap=softcap)
    torch.nn.init.normal_(model.weight, std=0.02)
    hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
    labels = torch.randint(vocab_size, (1, tokens))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        with autocast(precision):
            loss = model(hidden, labels)
        loss.backward()
    now = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    config = GPTConfig(vocab_size=vocab_size, hidden_size=hidden_size, logit_softcap=softcap)
    expected = memory_of(config, NUMBERS[precision], 1, tokens, Conditions("cpu")).head_bytes()
    assert 0.4 * expected <= peak <= 1.05 * expected, "an upper estimate"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_cnn_activations(dropout: float) -> None:
    config = SimpleCNNConfig(dropout=dropout)
    model = built(SimpleCNN(config), "fp32")
    images, labels = torch.randn(16, 1, 28, 28), torch.zeros(16, dtype=torch.long)
    expected = kept_by(config, NUMBERS["fp32"], 16, 1)
    assert kept_bytes(model, lambda: model(images, labels)) == pytest.approx(expected, rel=TOLERANCE)


FORMS = {"gpt2": GPT2_FORM, "llama": LLAMA_FORM}


@pytest.mark.in_turns(5)
@pytest.mark.parametrize(("mode", "every"), [("none", 1), ("selective", 1), ("full", 1), ("full", 2)])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize(("dropout", "with_documents"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("form", FORMS)
def test_what_recomputation_keeps(
    form: str, dropout: float, with_documents: bool, precision: str, every: int, mode: str
) -> None:
    config = GPTConfig(**{**FORMS[form], "num_layers": 5, "dropout": dropout})
    recompute = RecomputeConfig(mode, every)  # type: ignore[arg-type]
    model = built(GPT(config), precision)
    apply_recompute(model, recompute)
    tokens_BT = torch.randint(V, (B, T))
    arguments = {"tokens_BT": tokens_BT, "labels_BT": tokens_BT, "dropout_keys_B": torch.arange(B)}
    if with_documents:
        arguments["documents_BT"] = (torch.arange(T) // 20).expand(B, T)

    def loss() -> torch.Tensor:
        with autocast(precision):
            return model(**arguments)

    numbers = NUMBERS[precision]
    expected = kept_by(config, numbers, B, T, document_mask=with_documents, recompute=recompute)
    expected += B * T * config.hidden_size * numbers.compute + 4 * V * config.hidden_size
    if precision == "autocast":
        expected += kept_copies(config, recompute)
        if mode != "none":  # no block is at work between the passes
            expected -= kept_copies(replace(config, num_layers=1))
    assert allocated(loss).kept == pytest.approx(expected, rel=0.05)


def test_only_documents_that_no_kernel_takes_one_by_one_have_a_mask() -> None:
    """On a GPU, where the kernel is: each layer keeps the mask in its own type, T numbers a token."""

    def kept(compute: int, document_mask: bool, **settings: Any) -> int:
        model = GPTConfig(**{**GPT2_FORM, "hidden_size": 96, "num_heads": 4, **settings})
        conditions = Conditions("cuda", document_mask, exact_dropout=False)
        return memory_of(model, Numbers(compute, 4), B, T, conditions).activations(all_steps(model)).kept

    def mask(compute: int, **settings: Any) -> int:
        return kept(compute, True, **settings) - kept(compute, False, **settings)

    layers = GPT2_FORM["num_layers"] * B * T * T
    assert mask(2) == 0
    assert mask(4) == layers * 4
    assert mask(2, dropout=0.1) == layers * 2
    assert mask(2, num_heads=8) == layers * 2  # heads of 12

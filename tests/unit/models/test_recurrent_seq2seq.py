"""The recurrent encoder-decoder against the paper's equations; packing and padding change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.generation.beam import beam_search
from llmtrain.generation.config import GenerateConfig
from llmtrain.generation.rows import Rows
from llmtrain.models.recurrent_seq2seq.config import RecurrentSeq2SeqConfig
from llmtrain.models.recurrent_seq2seq.model import RecurrentSeq2Seq
from llmtrain.nn.initialize import initialize
from tests.unit.models.test_recurrent import states_of, step

V, EOS, START = 30, 2, 1


def made(**keys: Any) -> RecurrentSeq2Seq:
    keys = {"hidden_size": 8, "embedding_size": 6, "num_layers": 2, "dropout": 0.0, **keys}
    config = RecurrentSeq2SeqConfig(vocab_size=V, start_id=START, eos_id=EOS, **keys)
    model = RecurrentSeq2Seq(config)
    initialize(model, seed=3)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    assert max(p.numel() for p in model.parameters()) == config.largest_parameter_count()
    assert {name for level in model.levels() for name in level} == {
        name for name, module in model.named_modules() if module in _levels(model)
    }
    return model.eval()


def _levels(model: RecurrentSeq2Seq) -> list[Any]:
    return [model.get_submodule(name) for level in model.levels() for name in level]


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_it_equals_its_equations(cell: str) -> None:
    model = made(cell=cell)
    source_S, target_T = torch.randint(V, (7,)), torch.randint(V, (5,))
    h_SW: Tensor = model.embedding(source_S)
    for cells, from_end in zip(model.encoder, model.reversed_encoder, strict=True):
        back_SD = states_of(cell, from_end, h_SW.flip(0)).flip(0)
        h_SW = torch.cat((states_of(cell, cells, h_SW), back_SD), dim=-1)
    firsts = torch.tanh(model.bridge.weight @ h_SW[0, 8:] + model.bridge.bias).view(2, 8)
    own: Any = model.attention
    lower, upper = ((firsts[i], torch.zeros(8)) for i in range(2))
    # The names that `step` knows.
    first: Any = _Cell(model.decoder_cell)
    logits = []
    for embedded_E in model.embedding(target_T):
        scores = torch.tanh(own.query.weight @ lower[0] + h_SW @ own.key.weight.T + own.key.bias) @ own.score
        context_W = scores.softmax(0) @ h_SW
        lower = step(cell, first, torch.cat((embedded_E, context_W)), lower)
        upper = step(cell, model.decoder[0], lower[0], upper)
        read = model.readout.weight @ torch.cat((upper[0], embedded_E, context_W)) + model.readout.bias
        logits.append(model.embedding.weight @ read.view(6, 2).amax(1))
    found = model(target_T[None], sources_BS=source_S[None])
    torch.testing.assert_close(found[0], torch.stack(logits))


class _Cell:
    def __init__(self, cell: Any) -> None:
        for name, value in cell.named_parameters():
            setattr(self, f"{name}_l0", value)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pairs_of_a_packed_row_are_read_as_if_alone(cell: str, dropout: float) -> None:
    """Their losses and gradients are those of single pairs; the first of a row has the masks of its row."""
    model = made(cell=cell, dropout=dropout, label_smoothing=0.1).double().train()
    lengths = [[(4, 3), (2, 5)], [(6, 2)]]
    sources, targets = torch.randint(V, (2, 8)), torch.randint(V, (2, 10))
    of_sources, of_targets = torch.full((2, 8), -1), torch.full((2, 10), -1)
    alone = torch.zeros(())
    keys = torch.tensor([5, 9])
    for row, pairs in enumerate(lengths):
        s = t = 0
        for number, (S, T) in enumerate(pairs):
            of_sources[row, s : s + S] = of_targets[row, t : t + T] = number
            of_pair = [targets[row : row + 1, t : t + T], sources[row : row + 1, s : s + S]]
            key = (keys[row : row + 1] + number * 0x9E3779B1) & 0x7FFFFFFF
            alone = alone + model(of_pair[0], sources_BS=of_pair[1], labels_BT=of_pair[0], dropout_keys_B=key)
            s, t = s + S, t + T
    arguments: dict[str, Any] = {
        "sources_BS": sources,
        "source_documents_BS": of_sources,
        "documents_BT": of_targets,
        "dropout_keys_B": keys,
    }
    labels = torch.where(of_targets >= 0, targets, -100)
    packed = model(targets, labels_BT=labels, **arguments)
    torch.testing.assert_close(packed, alone)
    sums = model(targets, labels_BT=labels, with_metrics=True, **arguments)
    torch.testing.assert_close(sums["loss"], alone)
    assert sums["token_loss"] != sums["loss"]
    found = torch.autograd.grad(packed, list(model.parameters()))
    expected = torch.autograd.grad(alone, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_padding_of_single_pairs_changes_nothing() -> None:
    model = made(cell="gru")
    sources, targets = torch.randint(V, (2, 9)), torch.randint(V, (2, 6))
    marks = torch.where(torch.arange(9) < torch.tensor([[9], [4]]), 0, -1)
    found = model(targets, sources_BS=sources, source_documents_BS=marks)
    torch.testing.assert_close(found[1], model(targets[1:], sources_BS=sources[1:, :4])[0])


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_cache_continues_and_beams_are_the_best_texts(cell: str) -> None:
    model = made(cell=cell)
    sources = [[5, 6, 7, EOS], [8, EOS], [9, 10, EOS]]
    targets = torch.randint(V, (1, 6))
    with torch.no_grad():
        cache = model.new_cache(6, sources_BS=torch.tensor(sources[:1]))
        parts = [model(part, cache=cache) for part in targets.split((1, 2, 3), dim=1)]
        whole = model(targets, sources_BS=torch.tensor(sources[:1]))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)
        assert cache.length == 6

        config = GenerateConfig(max_new_tokens=4, num_beams=3)
        together = beam_search(Rows(model, sources, 4), config, [EOS])
        assert [beam_search(Rows(model, [s], 4), config, [EOS])[0] for s in sources] == together
        # As many beams as there are beginnings: the best text of three tokens is found.
        wide = GenerateConfig(max_new_tokens=2, num_beams=V, length_penalty=0.0)
        [best] = beam_search(Rows(model, sources[:1], 2), wide, [])
        every = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        starts = torch.cat((torch.full((len(every), 1), START), every[:, :1]), dim=1)
        logits = model(starts, sources_BS=torch.tensor(sources[:1]).expand(len(every), -1))
        scores = logits.log_softmax(-1).gather(2, every[..., None]).sum((1, 2))
        assert best == every[scores.argmax()].tolist()


def test_autocast_runs_on_any_processor() -> None:
    for cell in ("rnn", "gru", "lstm"):
        model = made(cell=cell)
        sources, targets = torch.randint(V, (2, 9)), torch.randint(V, (2, 6))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(targets, sources_BS=sources, labels_BT=targets)
        expected = model(targets, sources_BS=sources, labels_BT=targets)
        torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.1)
        loss.backward()

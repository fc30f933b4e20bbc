"""What an encoder–decoder sees of a row, where its distances fall, and how its loss adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.labels import IGNORE_INDEX
from llmtrain.models.encoder_decoder.config import Seq2SeqConfig
from llmtrain.models.encoder_decoder.model import EncoderDecoder, sinusoids
from llmtrain.nn import attention_choice
from llmtrain.nn.dropout import Dropout, sample_keys
from llmtrain.nn.initialize import initialize, match_initializers
from llmtrain.nn.relative import RelativePositions
from llmtrain.nn.task_config import TaskHeadConfig

S, T, V = 23, 17, 40
TRANSFORMER = Seq2SeqConfig(
    vocab_size=V, hidden_size=24, num_layers=2, num_decoder_layers=3, num_heads=3, dropout=0.0
)
T5 = replace(
    TRANSFORMER,
    head_dim=10,
    norm="rmsnorm",
    norm_first=True,
    positions="relative",
    relative_buckets=8,
    relative_max_distance=16,
    scale_embedding=False,
    scale_attention=False,
    scale_logits=True,
    bias=False,
)
BART = replace(
    TRANSFORMER,
    positions="learned",
    position_offset=2,
    max_sequence_length=S,
    embedding_norm=True,
    scale_embedding=False,
    activation="gelu",
    init_std=0.3,
)
FORMS = {
    "transformer": TRANSFORMER,
    "smoothed": replace(TRANSFORMER, label_smoothing=0.2),
    "t5": T5,
    "t5 1.1": replace(T5, gated_mlp=True, activation="gelu_tanh", tie_embeddings=False, scale_logits=False),
    "bart": BART,
    "bart, head bias": replace(BART, head_bias=True, tie_embeddings=False, num_decoder_layers=None),
}
EACH = pytest.mark.parametrize("form", FORMS)
CLASSES = TaskHeadConfig("classes", 3, dense=True)
TAGS = TaskHeadConfig("tags", 5, encoder_only=True)
OF_TASKS = {
    f"{form}, {head.kind}": replace(FORMS[form], task=head, start_id=1)
    for form in ("t5", "t5 1.1", "bart", "bart, head bias")
    for head in (CLASSES, TAGS)
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "BLOCK", 4)


def make(config: Seq2SeqConfig) -> EncoderDecoder:
    model = EncoderDecoder(config)
    initialize(model, seed=5)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def packed(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pairs one behind the other in one row, with padding behind the last."""
    row: dict[str, Tensor] = {}
    for name, width, texts in (
        ("source", S, [source for source, _ in pairs]),
        ("target", T, [target for _, target in pairs]),
    ):
        rest = width - sum(map(len, texts))
        numbers = [torch.full((len(text),), n, dtype=torch.int32) for n, text in enumerate(texts)]
        padding = torch.full((rest,), -1, dtype=torch.int32)
        row[f"{name}s"] = torch.cat([*texts, torch.zeros(rest, dtype=torch.int64)])[None]
        row[f"{name}_documents"] = torch.cat([*numbers, padding])[None]
        row[f"{name}_positions"] = torch.cat([torch.arange(len(t)) for t in [*texts, padding]])[None]
    return {
        "tokens_BT": row["targets"],
        "documents_BT": row["target_documents"],
        "positions_BT": row["target_positions"],
        "sources_BS": row["sources"],
        "source_documents_BS": row["source_documents"],
        "source_positions_BS": row["source_positions"],
    }


PAIRS = [(random_ids(n, seed=n), random_ids(m, seed=m + 50)) for n, m in ((9, 3), (1, 6), (8, 5))]


@pytest.mark.parametrize("form", [*FORMS, *OF_TASKS])
def test_counts_names_and_initializers_agree(form: str) -> None:
    config = {**FORMS, **OF_TASKS}[form]
    assert not list(config.problems())
    model = make(config)
    match_initializers(model.initializers(), [name for name, _ in model.named_parameters()])
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    held = [
        sum(p.numel() for m in stage.modules.values() for p in m.parameters()) for stage in model.stages()
    ]
    assert held == config.step_parameter_counts()
    assert max(p.numel() for p in model.parameters()) == config.largest_parameter_count()


@EACH
@pytest.mark.parametrize("blockwise", [True, False])
def test_packed_pairs_are_as_each_alone(form: str, blockwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not blockwise:
        monkeypatch.setattr(attention_choice, "LONGEST_BLOCKWISE", 0)
    model = make(FORMS[form])
    row = packed(PAIRS)
    alone = [model(target[None], sources_BS=source[None])[0] for source, target in PAIRS]
    found = model(row.pop("tokens_BT"), **row)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, : sum(map(len, alone))], torch.cat(alone), rtol=1e-4, atol=1e-4)


@EACH
def test_losses_and_gradients_of_packed_pairs_add_up(form: str) -> None:
    """With padding, and a row of nothing else."""
    model = make(FORMS[form])
    row = packed(PAIRS)
    empty = packed([])
    rows = {name: torch.cat([row[name], empty[name]]) for name in row}
    is_token_BT = rows["documents_BT"] >= 0
    labels_BT = random_ids(2, T, seed=9).where(is_token_BT, torch.tensor(IGNORE_INDEX))
    loss = model(**rows, labels_BT=labels_BT)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    alone = torch.zeros(())
    for (source, target), labels in zip(PAIRS, labels_BT[0].split([3, 6, 5, 3])[:3], strict=True):
        alone = alone + model(target[None], sources_BS=source[None], labels_BT=labels[None])
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients, torch.autograd.grad(alone, parameters), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@EACH
def test_a_target_sees_all_sources_of_its_pair_and_targets_before(form: str) -> None:
    model = make(FORMS[form])
    row = packed(PAIRS)
    before = model(**row)
    owner, place = 1, 4  # the second pair's targets stand at places 3 to 8
    changed = {**row, "tokens_BT": row["tokens_BT"].clone(), "sources_BS": row["sources_BS"].clone()}
    changed["tokens_BT"][0, 3 + place] += 1
    changed["tokens_BT"] %= V
    moved = ((model(**changed) - before).abs().amax(-1) > 1e-6)[0]
    assert moved.nonzero().flatten().tolist() == [7, 8]
    changed = {**row, "sources_BS": row["sources_BS"].clone()}
    changed["sources_BS"][0, 9] = (changed["sources_BS"][0, 9] + 1) % V
    moved = ((model(**changed) - before).abs().amax(-1) > 1e-6)[0]
    assert moved.tolist() == (row["documents_BT"][0] == owner).tolist()


@EACH
def test_a_cache_gives_what_a_whole_forward_gives(form: str) -> None:
    model = make(FORMS[form])
    sources_BS, tokens_BT = random_ids(2, S), random_ids(2, T, seed=1)
    documents_BS = (torch.arange(S) < torch.tensor([[S], [5]])).int() - 1
    whole = model(tokens_BT, sources_BS=sources_BS, source_documents_BS=documents_BS)
    cache = model.new_cache(T, sources_BS=sources_BS, source_documents_BS=documents_BS)
    steps = [tokens_BT[:, :3], *tokens_BT[:, 3:].split(1, dim=1)]
    found = torch.cat([model(step_BT, cache=cache) for step_BT in steps], dim=1)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="either sources or a cache"):
        model(tokens_BT, sources_BS=sources_BS, cache=cache)


def test_metrics() -> None:
    model = make(FORMS["smoothed"])
    row: dict[str, Any] = packed(PAIRS)
    labels_BT = random_ids(1, T, seed=9).where(row["documents_BT"] >= 0, torch.tensor(IGNORE_INDEX))
    logits, labels = model(**row)[0], labels_BT[0]
    labels[0] = logits[0].argmax()
    sums = model(**row, labels_BT=labels_BT, with_metrics=True)
    loss, plain, correct = sums["loss"], sums["token_loss"], sums["correct"]
    expected = [F.cross_entropy(logits, labels, reduction="sum", label_smoothing=x) for x in (0.2, 0.0)]
    torch.testing.assert_close(torch.stack([loss, plain]), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert correct == (logits.argmax(-1) == labels).sum() > 0


def test_sinusoids_by_hand() -> None:
    found = sinusoids(torch.tensor([[0, 3]]), 4)
    angles = torch.tensor([3.0, 3.0 / 100])
    expected = [[0.0, 1.0, 0.0, 1.0], torch.stack((angles.sin(), angles.cos()), -1).flatten().tolist()]
    torch.testing.assert_close(found[0], torch.tensor(expected))


def test_buckets_are_found_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the weight is: a GPU's logarithm may round to another bucket at a border."""
    seen: list[str] = []
    plain = RelativePositions.buckets

    def buckets(self: RelativePositions, distances: Tensor, *, both_ways: bool) -> Tensor:
        seen.append(distances.device.type)
        return plain(self, distances, both_ways=both_ways)

    monkeypatch.setattr(RelativePositions, "buckets", buckets)
    bias = RelativePositions(8, 16).bias(torch.empty(3, 8, device="meta"), 5, 5, both_ways=True)
    assert (bias.shape, bias.device.type, seen) == ((3, 5, 5), "meta", ["cpu"])


def test_buckets_by_hand() -> None:
    """Of 8 buckets up to a distance of 16 (arXiv:1910.10683, section 2.1; mesh-tensorflow's rounding)."""
    positions = RelativePositions(8, 16)
    causal = [7, 7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 4, 4, 3, 2, 1, 0, 0, 0, 0]
    assert positions.buckets(torch.arange(-16, 4), both_ways=False).tolist() == causal
    both = positions.buckets(torch.arange(-16, 17), both_ways=True).tolist()
    assert both[16] == 0
    assert [bucket - 4 for bucket in both[17:]] == both[15::-1]
    assert both[17:] == [5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]


@pytest.mark.parametrize(("T", "S"), [(5, 5), (1, 7), (3, 8)])
@pytest.mark.parametrize("both_ways", [True, False])
def test_biases_stand_at_their_distances(T: int, S: int, both_ways: bool) -> None:
    positions = RelativePositions(8, 16)
    weight_NR = torch.randn(2, 8, requires_grad=True, generator=torch.Generator().manual_seed(0))
    distances_TS = torch.arange(S) - torch.arange(S - T, S)[:, None]
    expected = weight_NR[:, positions.buckets(distances_TS, both_ways=both_ways)]
    found = positions.bias(weight_NR, T, S, both_ways=both_ways)
    assert torch.equal(found, expected)
    gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        *(torch.autograd.grad(bias, weight_NR, gradient)[0] for bias in (found, expected))
    )


def test_no_two_layers_drop_the_same() -> None:
    """Masks go by (layer, kind), of self-attention, cross-attention and what they and MLPs add."""
    model = EncoderDecoder(replace(TRANSFORMER, dropout=0.5))
    places = [(m.layer, m.kind) for m in model.modules() if isinstance(m, Dropout)]
    layers = [m.layer for m in model.modules() if hasattr(m, "first_head")]
    assert len(set(places)) == len(places)
    assert len(set(layers)) == len(layers) == 2 + 2 * 3
    initialize(model, seed=5)
    row, keys = packed(PAIRS), sample_keys(0, [4])
    twice = [model.train()(**row, dropout_keys_B=keys) for _ in range(2)]
    assert torch.equal(*twice)
    assert not torch.equal(twice[0], model(**row, dropout_keys_B=keys + 1))


@EACH
@pytest.mark.parametrize("with_keys", [True, False])
def test_dropout_hides_nothing_else(form: str, with_keys: bool) -> None:
    """Weights that are dropped with a probability of almost 0 are all there."""
    row = packed(PAIRS)
    expected = make(FORMS[form])(**row)
    model = make(replace(FORMS[form], dropout=1e-9)).train()
    found = model(**row, dropout_keys_B=torch.arange(1) if with_keys else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_scores_keep_their_scale_without_division() -> None:
    """T5's queries start smaller by what others divide by."""
    model = make(replace(T5, hidden_size=96, head_dim=64))
    qkv = model.encoder[0].attention.qkv.weight.detach().unflatten(0, (3, 3, 64))
    q, k, v = (float(part.std()) for part in qkv.unbind(1))
    assert q == pytest.approx((96 * 64) ** -0.5, rel=0.05)
    assert (k, v) == pytest.approx((96**-0.5, 96**-0.5), rel=0.05)

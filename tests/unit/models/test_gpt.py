"""The decoder in both forms: cache, packing, loss, stages, dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.initialize import initialize
from llmtrain.nn.rope_config import RopeScaling
from llmtrain.nn.rotary import rotary_frequencies

V, T = 64, 24
GPT2 = GPTConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, max_sequence_length=T, init_std=0.2)
LLAMA = replace(
    GPT2,
    num_kv_heads=2,
    mlp_hidden_size=48,
    positions="rope",
    norm="rmsnorm",
    gated_mlp=True,
    activation="silu",
    bias=False,
    tie_embeddings=False,
)
GEMMA = replace(
    LLAMA,
    norm_place="both",
    norm_adds_one=True,
    scale_embedding=True,
    qk_norm=True,
    sliding_window=7,
    full_attention_layers=(1,),
    local_rope_theta=100.0,
    attention_softcap=2.0,
    logit_softcap=3.0,
    query_pre_attn_scalar=5,
)
FORMS = pytest.mark.parametrize("config", [GPT2, LLAMA, GEMMA], ids=["gpt2", "llama", "gemma"])


def build(config: GPTConfig) -> GPT:
    model = GPT(config)
    initialize(model, seed=3)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(5))


@FORMS
def test_future_tokens_do_not_matter(config: GPTConfig) -> None:
    model, x = build(config), tokens(2, T)
    changed = x.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % V
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@FORMS
def test_cached_logits_equal_full_logits(config: GPTConfig) -> None:
    model, x = build(config).eval(), tokens(2, T)
    cache = model.new_cache(T)
    pieces = [x[:, :5], x[:, 5:12], *x[:, 12:].split(1, dim=1)]
    with torch.no_grad():
        cached = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
        torch.testing.assert_close(cached, model(x), rtol=1e-5, atol=1e-5)
    assert cache.length == T
    with pytest.raises(ValueError, match="24 tokens cannot take 25"):
        model(x[:, :1], cache=cache, positions_BT=torch.zeros(1, 1, dtype=torch.int64))


@FORMS
def test_packed_documents_equal_separate_ones(config: GPTConfig) -> None:
    model = build(config)
    lengths = [7, 1, 11, 5]
    x = tokens(1, sum(lengths))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(x, positions_BT=positions, documents_BT=documents)
    separate = torch.cat([model(piece) for piece in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


@FORMS
def test_packed_gradients_equal_separate_ones(config: GPTConfig) -> None:
    lengths = [7, 1, 11, 5]
    x = tokens(1, sum(lengths))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed, separate = build(config), build(config)
    packed(x, positions_BT=positions, documents_BT=documents, labels_BT=x).backward()
    for piece in x.split(lengths, dim=1):
        separate(piece, labels_BT=piece).backward()
    for (name, a), b in zip(packed.named_parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@FORMS
def test_rows_may_pack_differently(config: GPTConfig) -> None:
    model, x = build(config), tokens(2, T)
    documents = torch.zeros(2, T, dtype=torch.int64)
    documents[1, 9:] = 1
    both = model(x, documents_BT=documents)
    torch.testing.assert_close(both[:1], model(x[:1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1:], model(x[1:], documents_BT=documents[1:]), rtol=1e-5, atol=1e-5)


def test_rotary_logits_depend_on_distance_only() -> None:
    model, x = build(LLAMA), tokens(1, T)
    shifted = model(x, positions_BT=torch.arange(T)[None] + 1000)
    torch.testing.assert_close(shifted, model(x), rtol=1e-3, atol=1e-3)


@FORMS
def test_loss_is_the_sum_over_labels_that_count(config: GPTConfig) -> None:
    model, x = build(config), tokens(2, T)
    labels = tokens(2, T).roll(1)
    labels[:, ::3] = -100
    loss = model(x, labels_BT=labels)
    expected = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)


@FORMS
def test_stages_are_the_whole_model(config: GPTConfig) -> None:
    model, x = build(config), tokens(2, T)
    named = {
        f"{name}.{parameter}": value
        for stage in model.stages()
        for name, module in stage.modules.items()
        for parameter, value in module.named_parameters()
    }
    canonical = dict(model.named_parameters(remove_duplicate=False))
    assert named.keys() == canonical.keys()
    assert all(named[name] is canonical[name] for name in named)
    context, state = model.context(x, labels_BT=x), x
    for stage in model.stages():
        state = stage.run(state, context)
    assert torch.equal(state, model(x, labels_BT=x))


@FORMS
def test_a_slice_of_whole_groups_is_a_shard_of_attention(config: GPTConfig) -> None:
    """Two halves of the heads, run apart by the same forward, sum to the whole."""
    attention = build(config).blocks[0].attention
    if config.bias:
        torch.nn.init.zeros_(attention.output.bias)
        torch.nn.init.normal_(attention.qkv.bias)
    x_BTD = torch.randn(2, T, config.hidden_size)
    context = build(config).context(tokens(2, T))
    whole, total = attention(x_BTD, context), torch.zeros(())
    rows, columns = attention.qkv.weight.shape[0] // 2, attention.output.weight.shape[1] // 2
    for half in range(2):
        shard = build(config).blocks[0].attention
        shard.qkv.weight.data = attention.qkv.weight.data[half * rows : (half + 1) * rows]
        if config.bias:
            shard.qkv.bias.data = attention.qkv.bias.data[half * rows : (half + 1) * rows]
        shard.output.weight.data = attention.output.weight.data[:, half * columns : (half + 1) * columns]
        total = total + shard(x_BTD, context)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


@FORMS
def test_dropout_only_in_training_and_by_the_generator(config: GPTConfig) -> None:
    model, x = build(replace(config, dropout=0.3)), tokens(2, T)
    without = build(config)(x)
    assert torch.equal(model.eval()(x), without)
    model.train()
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    assert not torch.allclose(model(x), first)
    assert not torch.allclose(first, without)


@FORMS
def test_bf16_autocast_is_near_fp32(config: GPTConfig) -> None:
    config = replace(config, init_std=0.05)
    model, x = build(config), tokens(2, T)
    exact = model(x, labels_BT=x)
    exact.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels_BT=x)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    for parameter, reference in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - reference).norm() < 0.05 * reference.norm() + 1e-3


def test_rope_scaling_keeps_short_and_stretches_long_wavelengths() -> None:
    plain = rotary_frequencies(128, 500_000.0, None)
    scaled = rotary_frequencies(128, 500_000.0, RopeScaling())
    assert torch.equal(scaled[:20], plain[:20])
    torch.testing.assert_close(scaled[-20:], plain[-20:] / 8)
    assert (scaled <= plain).all()
    assert (scaled >= plain / 8.0001).all()


def test_norms_over_all_heads_stand_after() -> None:
    """OLMo 2."""
    model = build(replace(LLAMA, norm_place="after", qk_norm=True, qk_norm_over="all_heads"))
    assert model.config.parameter_count() == sum(p.numel() for p in model.parameters())
    block, x_BTD = model.blocks[0], torch.randn(1, T, 32)
    torch.nn.init.normal_(block.attention.query_norm.weight)
    q_BTNH = torch.randn(1, T, 4, 8)
    expected = torch.nn.functional.rms_norm(
        q_BTNH.flatten(2), (32,), block.attention.query_norm.weight, eps=1e-5
    )
    torch.testing.assert_close(block.attention.query_norm(q_BTNH), expected.view(q_BTNH.shape))
    context = model.context(tokens(1, T))
    middle = x_BTD + block.attention_output_norm(block.attention(x_BTD, context))
    torch.testing.assert_close(
        block(x_BTD, context), middle + block.mlp_output_norm(block.mlp(middle)), rtol=0, atol=0
    )


def test_each_layer_has_its_window_and_rotary_base() -> None:
    config = replace(
        LLAMA, num_layers=4, sliding_window=7, full_attention_layers=(0, 2), local_rope_theta=9.0
    )
    attentions = [block.attention for block in build(config).blocks]
    assert [attention.window for attention in attentions] == [None, 7, None, 7]
    assert [attention.has_local_rotary for attention in attentions] == [False, True, False, True]


def test_embeddings_are_scaled_by_a_number_of_their_type() -> None:
    """As transformers' Gemma rounds sqrt(3072) to 55.5 in bf16."""
    config = replace(
        LLAMA, hidden_size=3072, num_heads=4, num_layers=1, mlp_hidden_size=8, scale_embedding=True
    )
    model = build(config).bfloat16()
    x = tokens(1, 4)
    found = model.stages()[0].run(x, model.context(x))
    assert torch.equal(found, model.embedding(x) * 55.5)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("full_attention_layers", {"full_attention_layers": (2,)}),
        ("local_rope_theta", {"local_rope_theta": 100.0}),
        ("norm", {"norm_adds_one": True, "norm": "layernorm"}),
        ("attention_softcap", {"attention_softcap": 0.0}),
    ],
)
def test_settings_that_do_not_fit_are_refused(key: str, changes: dict[str, object]) -> None:
    assert [problem.where for problem in replace(LLAMA, **changes).problems()] == [key]
    assert not list(LLAMA.problems())


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="not resolved"):
        GPT(replace(GPT2, vocab_size=None))
    model = build(GPT2)
    with pytest.raises(ValueError, match="documents_BT and a cache"):
        model(tokens(1, 4), documents_BT=torch.zeros(1, 4), cache=model.new_cache(4))

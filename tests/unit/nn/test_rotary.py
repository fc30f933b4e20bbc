"""Rotary positions that are stretched, or turn a part of a head. tests/parity compares with transformers."""

from __future__ import annotations

import re

import pytest
import torch

from llmtrain.cli.main import run_verb
from llmtrain.config import decode
from llmtrain.errors import ConfigError
from llmtrain.models.gpt.config import GPTConfig
from llmtrain.models.gpt.model import GPT
from llmtrain.nn.documents import Documents
from llmtrain.nn.rope_config import RopeScaling
from llmtrain.nn.rotary import rotary_tables, rotate

SMALL = {"vocab_size": 32, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "positions": "rope"}
DYNAMIC = RopeScaling("dynamic", factor=2.0, original_max_sequence_length=4)


def test_the_rest_of_a_head_is_not_turned() -> None:
    config = GPTConfig(**SMALL, partial_rotary_factor=0.25)
    assert config.rotary_width == 4
    x_BTNH = torch.randn(1, 5, 4, 16)
    turned = rotate(x_BTNH, *rotary_tables(config, torch.arange(5)[None]))
    assert torch.equal(turned[..., 4:], x_BTNH[..., 4:])
    assert not torch.equal(turned[:, 1:, :, :4], x_BTNH[:, 1:, :, :4])
    torch.testing.assert_close(turned.norm(dim=-1), x_BTNH.norm(dim=-1))


def test_angles_by_length_are_those_of_each_document_alone() -> None:
    """Whatever else stands in its row or in other rows."""
    config = GPTConfig(**SMALL, rope_scaling=DYNAMIC)
    lengths = (9, 3, 6)
    positions_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    ids_BT = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    packed = rotary_tables(config, positions_BT, Documents(ids_BT))[0]
    for part, n in zip(packed.split(lengths, dim=1), lengths, strict=True):
        torch.testing.assert_close(part, rotary_tables(config, torch.arange(n)[None])[0])
    rows_BT = torch.stack([torch.arange(9), torch.arange(9) % 3])
    torch.testing.assert_close(rotary_tables(config, rows_BT)[1][1], rotary_tables(config, rows_BT[1:])[1][0])


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("qkv", [True, False])
@pytest.mark.parametrize("rest", [True, False])
def test_biases_are_counted(rest: bool, qkv: bool, output: bool) -> None:
    config = GPTConfig(
        **SMALL, norm="rmsnorm", bias=rest, qkv_bias=qkv, output_bias=output, gated_mlp=True, num_kv_heads=2
    )
    with torch.device("meta"):
        model = GPT(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameter_count()
    names = {name.removeprefix("blocks.0.") for name, _ in model.named_parameters() if "blocks.0" in name}
    assert ("attention.qkv.bias" in names, "attention.output.bias" in names) == (qkv, output)
    assert ("mlp.down.bias" in names) == rest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: got 1.5; allowed: above 0, up to 1"),
        ({"partial_rotary_factor": 0.2}, "0.2, 3 of a head's 16 dims.; allowed: an even number of dims"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 0.5}},
            "rope_scaling.factor: got 0.5; allowed: 1",
        ),
        (
            {"rope_scaling": {"kind": "dynamic"}, "head_dim": 2},
            "rope_scaling.kind: got 'dynamic'; allowed: another with 2 rotary dims",
        ),
        ({"rope_scaling": {"kind": "su"}}, "rope_scaling.kind: got 'su'"),
    ],
)
def test_what_cannot_be_turned(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(GPTConfig, {**SMALL, "family": "gpt", **changes})


def test_presets_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    """The CLI's overrides reach them, and a plan counts what they add."""
    plain = ["model=llama_tiny", "model.vocab_size=4096", "world_size=2", "batch.global_size=16"]
    assert run_verb("plan", plain) == 0
    without = capsys.readouterr().out
    keys = ["model.partial_rotary_factor=0.5", "model.rope_scaling.kind=dynamic", "model.output_bias=true"]
    assert run_verb("plan", [*plain, *keys]) == 0
    assert parameters(capsys.readouterr().out) == parameters(without) + 6 * 256
    assert run_verb("plan", [*plain, *keys, "parallel.sequence=2"]) == 2
    assert re.search(r"parallel\.sequence: got '2 with .* depends on the length", capsys.readouterr().err)


def parameters(plan: str) -> int:
    found = re.search(r"([\d,]+) parameters", plan)
    assert found
    return int(found[1].replace(",", ""))

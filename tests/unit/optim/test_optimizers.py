import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from llmtrain.config import decode
from llmtrain.errors import ConfigError
from llmtrain.optim.config import OptimizerConfig, ScheduleConfig
from llmtrain.optim.optimizers import Adagrad, build_optimizer, parameter_groups

CONF = Path(__file__).parents[3] / "conf"
NAMES = ["adamw", "adam", "sgd", "adagrad", "rmsprop"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=True)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.frozen(self.norm(self.embedding(tokens_BT))))


def test_groups_decay_matrices_only_and_take_shared_parameters_once() -> None:
    model = Tied()
    decayed, undecayed = parameter_groups(model.named_parameters(remove_duplicate=False), 0.3)
    assert decayed["weight_decay"] == 0.3
    assert undecayed["weight_decay"] == 0.0
    assert decayed["params"] == [model.embedding.weight]
    assert {id(p) for p in undecayed["params"]} == {
        id(p) for p in (*model.norm.parameters(), model.head.bias)
    }


def test_an_empty_group_is_left_out() -> None:
    (group,) = parameter_groups(nn.Linear(3, 3, bias=False).named_parameters(), 0.1)
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("path", sorted((CONF / "optimizer").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_decode(path: Path) -> None:
    name = {"momentum": "sgd", "plain_sgd": "sgd"}.get(path.stem, path.stem)
    assert decode(OptimizerConfig, yaml.safe_load(path.read_text())).name == name


@pytest.mark.parametrize("path", sorted((CONF / "schedule").glob("*.yaml")), ids=lambda p: p.stem)
def test_schedule_presets_decode(path: Path) -> None:
    assert decode(ScheduleConfig, yaml.safe_load(path.read_text())).name == path.stem


def reference(name: str, groups: list[dict], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's own optimizer, unfused, with the settings spelled out."""
    adam = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    return {
        "adamw": lambda: torch.optim.AdamW(groups, **adam),
        "adam": lambda: torch.optim.Adam(groups, **adam),
        "sgd": lambda: torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr=config.lr, eps=config.eps),
        "rmsprop": lambda: torch.optim.RMSprop(
            groups, lr=config.lr, alpha=config.alpha, eps=config.eps, momentum=config.momentum
        ),
    }[name]()


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_torch(name: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    other = copy.deepcopy(model)
    config = OptimizerConfig(
        name, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, momentum=0.5, alpha=0.7
    )
    optimizer = build_optimizer(config, model.named_parameters(), "cpu")
    expected = reference(name, parameter_groups(other.named_parameters(), 0.2), config)
    tokens_BT = torch.randint(7, (2, 5))
    for _ in range(4):
        for m, o in ((model, optimizer), (other, expected)):
            o.zero_grad()
            m(tokens_BT).square().sum().backward()
            o.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_save_and_load(name: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    config = OptimizerConfig(name, lr=0.01, momentum=0.5)
    optimizer = build_optimizer(config, model.named_parameters(), "cpu")

    def step(m: nn.Module, o: torch.optim.Optimizer) -> None:
        o.zero_grad()
        m(torch.arange(6).view(2, 3)).square().sum().backward()
        o.step()

    step(model, optimizer)
    resumed = copy.deepcopy(model)
    resumed_optimizer = build_optimizer(config, resumed.named_parameters(), "cpu")
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(resumed, resumed_optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_fused_where_torch_has_it() -> None:
    named = list(nn.Linear(2, 2).named_parameters())
    for name in NAMES[:-1]:
        assert build_optimizer(OptimizerConfig(name), named, "cpu").defaults["fused"] is True
        assert build_optimizer(OptimizerConfig(name, fused=False), named, "cpu").defaults["fused"] is False
        assert build_optimizer(OptimizerConfig(name), named, "meta").defaults["fused"] is False


def test_adagrad_keeps_groups_apart_when_parameters_are_swapped_before_the_first_step() -> None:
    """What ZeRO does: it replaces the groups' parameters by flat pieces after the optimizer is built."""
    optimizer = build_optimizer(
        OptimizerConfig("adagrad", lr=0.1, weight_decay=0.5), nn.Linear(2, 2).named_parameters(), "cpu"
    )
    flat = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    for group, piece in zip(optimizer.param_groups, flat, strict=True):
        group["params"] = [piece]
        piece.grad = torch.zeros(3)
    optimizer.step()
    assert isinstance(optimizer, Adagrad)
    assert torch.all(flat[0] < 1)
    assert torch.equal(flat[1], torch.ones(3))


def test_config_names_every_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        decode(
            OptimizerConfig,
            {"name": "rmsprop", "lr": -1, "betas": [0.9, 1.5], "max_grad_norm": -2, "fused": True},
        )
    assert [p.where for p in caught.value.problems] == ["lr", "betas[1]", "max_grad_norm", "fused"]

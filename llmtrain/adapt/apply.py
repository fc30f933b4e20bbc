"""Add the parameters of an adaptation to an ordinary model, by patterns of the names of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from llmtrain.adapt.config import Adaptation, AdapterConfig, LoraConfig, PrefixConfig, PromptConfig
from llmtrain.adapt.modules import AdaptedLinear, Bottleneck, LowRank, Packing
from llmtrain.adapt.virtual import (
    Prefix,
    PrefixedAttention,
    PromptedEmbedding,
    SoftPrompt,
    begin_with,
    count_positions_from,
)
from llmtrain.errors import ConfigError, Problem, nearest
from llmtrain.nn.initialize import Initializer, Normal, added_to
from llmtrain.nn.linear import Linear
from llmtrain.nn.stages import HasLevels
from llmtrain.nn.transformer import Attention, CrossAttention

LORA, ADAPTER, PREFIX, PROMPT = "lora", "adapter", "prefix", "prompt"
"""Names of the added modules within the layer that they are added to."""


@dataclass(frozen=True)
class Site:
    """A matrix of the layers of a model."""

    name: str
    """Name of the module that holds it."""
    layer: Linear
    packing: Packing | None
    """The parts that its rows hold, if it holds several matrices."""

    @property
    def targets(self) -> list[str]:
        """Return the names by which patterns select it: its parts', or its own."""
        return [self.name] if self.packing is None else [f"{self.name}.{part}" for part in self.packing.units]


def adapt(model: nn.Module, config: Adaptation) -> None:
    """Add to `model`, which is on the meta device, what `config` describes.

    The names of its own parameters stay. `model.added` has the initial values of the new ones by name.
    Raise ConfigError for a model without layers, a pattern that matches nothing, and a rank that is larger
    than a matrix.
    """
    sites = _sites(model)
    if not sites:
        got = f"{config.method} with a model that has no layers of attention and MLPs"
        raise ConfigError(Problem("method", got, "full"))
    added = _ADD[config.method](model, config, sites)
    model.added = {**added_to(model), **added}  # type: ignore[assignment]


def _sites(model: nn.Module) -> list[Site]:
    """Return the matrices of the layers of a model, in its order."""
    if not isinstance(model, HasLevels):
        return []
    modules = dict(model.named_modules())
    layers = tuple(f"{name}." for level in model.levels()[1:-1] for name in level)
    return [
        Site(name, module, _packing_of(modules[name.rpartition(".")[0]], name.rpartition(".")[2]))
        for name, module in modules.items()
        if isinstance(module, Linear) and name.startswith(layers)
    ]


def _packing_of(parent: Any, key: str) -> Packing | None:
    """Return how the matrix `key` of a module is packed; see nn/transformer.py and models/xlnet/model.py."""
    if key == "qkv":
        return Packing({"query": parent.queries_per_kv, "key": 1, "value": 1}, parent.head_dim)
    if key == "key_value":
        return Packing({"key": 1, "value": 1}, parent.head_dim)
    return None


def _add_products(model: nn.Module, config: LoraConfig, sites: list[Site]) -> dict[str, Initializer]:
    if problems := list(_target_problems(config, sites)):
        raise ConfigError(problems)
    added: dict[str, Initializer] = {}
    for number, site in enumerate(sites):
        chosen = [name for name in site.targets if _is_chosen(name, config)]
        if not chosen and not (site.packing and config.targets and _is_chosen(site.name, config)):
            continue
        parts = [] if site.packing is None else [name.rpartition(".")[2] for name in chosen]
        product = LowRank(site.layer, config, number, site.packing, parts)
        model.set_submodule(site.name, AdaptedLinear(site.layer, lora=product))
        added |= product.initializers(f"{site.name}.{LORA}")
    if config.dropout > 0:
        _pass_keys(model)
    return added


def _is_chosen(name: str, config: LoraConfig) -> bool:
    return not config.targets or any(_matches(name, pattern) for pattern in config.targets)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _target_problems(config: LoraConfig, sites: list[Site]) -> Iterator[Problem]:
    names = [name for site in sites for name in dict.fromkeys([*site.targets, site.name])]
    for i, pattern in enumerate(config.targets):
        if not any(_matches(name, pattern) for name in names):
            ends = list(dict.fromkeys(".".join(name.split(".")[2:]) for name in names))
            got = f"{pattern!r}, which no matrix of the layers matches"
            yield Problem(f"lora.targets[{i}]", got, nearest(pattern, ends))
    for site in sites:
        for name in site.targets:
            rows = site.layer.out_features
            if site.packing is not None:
                part = site.packing.units[name.rpartition(".")[2]]
                rows = rows // site.packing.units_of_group * part
            least = min(rows, site.layer.in_features)
            if _is_chosen(name, config) and config.rank > least:
                got = f"{config.rank}, with {name} of {rows} × {site.layer.in_features}"
                yield Problem(
                    "lora.rank", got, f"1 to {least}", "lower it, or leave that matrix out of lora.targets"
                )
                return


def _pass_keys(model: Any) -> None:
    """Let the forward pass of each layer give its products the keys of the batch for their dropout.

    Its `forward` is replaced, not hooked, since a recomputation calls that alone, maybe after the forward
    pass of another batch.
    """
    for block in model.blocks:
        inside = [module for module in block.modules() if isinstance(module, LowRank)]
        if inside:
            block.gives_what_is_read = False  # their masks are those of all tokens
            block.forward = _with_keys(block.forward, inside)


def _with_keys(forward: Callable[..., Any], products: list[LowRank]) -> Callable[..., Any]:
    def run(x: Any, context: Any, *others: Any) -> Any:
        for product in products:
            product.keys = context.dropout_keys
        return forward(x, context, *others)

    return run


def _add_bottlenecks(model: nn.Module, config: AdapterConfig, sites: list[Site]) -> dict[str, Initializer]:
    ends = ("mlp.down",) if config.kind == "pfeiffer" else ("mlp.down", "attention.output")
    added: dict[str, Initializer] = {}
    for site in sites:
        if site.name.endswith(ends):
            bottleneck = Bottleneck(site.layer.out_features, config)
            model.set_submodule(site.name, AdaptedLinear(site.layer, adapter=bottleneck))
            added |= bottleneck.initializers(f"{site.name}.{ADAPTER}")
    return added


def _add_prefixes(model: Any, config: PrefixConfig, _: list[Site]) -> dict[str, Initializer]:
    added: dict[str, Initializer] = {}
    for name, attention in _self_attentions(model, config.method).items():
        heads = attention.num_heads // attention.queries_per_kv
        attention.prefix = Prefix(heads, config.length, attention.head_dim)
        attention.attend = PrefixedAttention(attention.attend, attention.prefix)
        model.get_submodule(name.rpartition(".")[0]).gives_what_is_read = False
        added[f"{name}.{PREFIX}.weight"] = Normal(model.config.init_std)
    count_positions_from(model, config.length)
    return added


def _add_prompt(model: Any, config: PromptConfig, _: list[Site]) -> dict[str, Initializer]:
    _self_attentions(model, config.method)
    prompt = SoftPrompt(config.length, model.config.hidden_size)
    model.embedding = PromptedEmbedding(model.embedding, prompt)
    begin_with(model, prompt)
    return {f"embedding.{PROMPT}.vectors": Normal(model.config.init_std)}


def _self_attentions(model: nn.Module, method: str) -> dict[str, Attention]:
    """Return name → attention of each layer. Raise ConfigError for a model with other attention than that of
    decoders and encoders."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not found or any(isinstance(module, CrossAttention) for module in model.modules()):
        got = f"{method} with a model.family={model.config.family}"  # type: ignore[union-attr]
        raise ConfigError(
            Problem("method", got, "lora, adapter, full", "virtual tokens are for decoders and encoders")
        )
    return found


_ADD: Mapping[str, Callable[[nn.Module, Any, list[Site]], dict[str, Initializer]]] = {
    LORA: _add_products,
    ADAPTER: _add_bottlenecks,
    PREFIX: _add_prefixes,
    PROMPT: _add_prompt,
}
"""Method → what adds its modules to a model and returns their initial values by name."""

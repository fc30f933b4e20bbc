"""Outside models/ and objectives/ no code asks for a family, an objective's kind, or the type of a config."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import llmtrain
from llmtrain.config import kinds_of
from llmtrain.data.config import DATA_CONFIGS
from llmtrain.models.registry import FAMILIES
from llmtrain.nn.layer_config import LayerConfig, OfLayers
from llmtrain.nn.model_config import ModelConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.registry import OBJECTIVES

PACKAGE = Path(llmtrain.__file__).parent
CONFIGS = {cls.__name__ for base in (ModelConfig, ObjectiveConfig) for cls in kinds_of(base)}
CONFIGS |= {cls.__name__ for cls in DATA_CONFIGS.values()} | {LayerConfig.__name__, OfLayers.__name__}
NAMES = {family.name for family in FAMILIES} | set(OBJECTIVES)
OPEN = {f"llmtrain.models.{name}" for name in ("registry", "family", "skeleton", "huggingface")}
"""What of models/ speaks of all families alike."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(("models/", "objectives/")):
            yield name, ast.parse(path.read_text())


def questions(tree: ast.Module) -> Iterator[str]:
    """What code asks: `isinstance(x, BertConfig)`, `case BertConfig()`, `x.family == "bert"`, an import."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("isinstance"), args=[_, kinds]):
                named = {n.id for n in ast.walk(kinds) if isinstance(n, ast.Name)}
                yield from (f"isinstance of {name}" for name in named & CONFIGS)
            case ast.MatchClass(cls=ast.Name(name)) if name in CONFIGS:
                yield f"case {name}"
            case ast.Compare(left=left, comparators=others):
                sides = [left, *(n for other in others for n in ast.walk(other))]
                asks = any(isinstance(n, ast.Attribute) and n.attr in ("family", "kind") for n in sides)
                values = {n.value for n in sides if isinstance(n, ast.Constant)}
                yield from (f"comparison with {value!r}" for value in values & NAMES if asks)
            case ast.ImportFrom(module=str(module)) if module.startswith("llmtrain.models"):
                if not any(module == name or module.startswith(f"{name}.") for name in OPEN):
                    yield f"import of {module}"
            case ast.ImportFrom(module=str(module)) if module.startswith("llmtrain.objectives."):
                yield from (f"import of {a.name}" for a in node.names if a.name in CONFIGS)


def test_nobody_asks() -> None:
    found = [f"{name}: {question}" for name, tree in modules() for question in questions(tree)]
    assert not found


def test_the_test_sees_who_asks() -> None:
    code = """
from llmtrain.models.bert.config import BertConfig
if isinstance(x, GPTConfig | BertConfig) or x.family == "seq2seq" or o.kind in ("mlm", "seq2seq"):
    match x:
        case XLNetConfig():
            pass
"""
    assert len(list(questions(ast.parse(code)))) == 7


def test_the_registry_is_a_list() -> None:
    """Short, and it opens no data."""
    text = (PACKAGE / "models/registry.py").read_text()
    assert len(text.splitlines()) < 80
    assert "corpus" not in text

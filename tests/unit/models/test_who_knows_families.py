"""Outside models/ and objectives/ no code asks for a family, an objective's kind, or the type of a config."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import llmtrain
from llmtrain.adapt.config import Adaptation, Addition
from llmtrain.config import kinds_of
from llmtrain.corpus.config import OneSource
from llmtrain.data.config import DATA_CONFIGS
from llmtrain.models.family import Kind
from llmtrain.models.registry import FAMILIES
from llmtrain.nn.layer_config import LayerConfig, OfLayers
from llmtrain.nn.model_config import ModelConfig, OfVocabulary
from llmtrain.nn.task_config import TaskHeadConfig
from llmtrain.objectives.base import ObjectiveConfig
from llmtrain.objectives.registry import OBJECTIVES
from llmtrain.vectors.config import VECTORS_CONFIGS, VocabularyKeys

PACKAGE = Path(llmtrain.__file__).parent
BASES = (ModelConfig, ObjectiveConfig, Addition, VocabularyKeys, LayerConfig, OneSource)
CONFIGS = {cls for base in (ModelConfig, ObjectiveConfig) for cls in kinds_of(base)}
CONFIGS |= {
    *BASES,
    OfLayers,
    OfVocabulary,
    *DATA_CONFIGS.values(),
    *VECTORS_CONFIGS.values(),
    *get_args(Adaptation),
}
CLASSES = {cls.__name__ for cls in CONFIGS}
KEYS = {key for cls in CONFIGS for key in (*vars(cls), *getattr(cls, "__dataclass_fields__", ()))}
KEYS = {key for key in KEYS if not key.startswith("__")} - {"problems"}
"""What a config of one type has and another may lack."""
HEADS = set(get_args(get_type_hints(TaskHeadConfig)["kind"]))
NAMES = {family.name for family in FAMILIES} | set(OBJECTIVES) | set(DATA_CONFIGS) | set(VECTORS_CONFIGS)
NAMES |= set(get_args(Kind)) | HEADS | {cls.method for cls in get_args(Adaptation)}
OPEN = {f"llmtrain.models.{name}" for name in ("registry", "family", "skeleton", "huggingface")}
"""What of models/ speaks of all families alike."""
OWN = ("nn/task_config.py", "nn/task_head.py")
"""Files of the heads of tasks, which ask for their own kinds."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(("models/", "objectives/")):
            yield name, ast.parse(path.read_text())


def names_in(node: ast.AST) -> set[str]:
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def asks_kind(node: ast.AST) -> bool:
    """Whether an expression is `kind`, `x.kind`, `x["kind"]` or `x.get("kind", …)`."""
    match node:
        case ast.Name("family" | "kind") | ast.Attribute(attr="family" | "kind" | "method"):
            return True
        case ast.Subscript(slice=ast.Constant("family" | "kind" | "method")):
            return True
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant("family" | "kind" | "method"), *_]):
            return True
    return False


def questions(tree: ast.Module) -> Iterator[str]:
    """What code asks: `isinstance(x, BertConfig)`, `case BertConfig()`, `type(x) is BertConfig`,
    `x.family == "bert"`, `getattr(x, "adaptation", None)`, an import."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("isinstance" | "issubclass" as call), args=[_, kinds]):
                yield from (f"{call} of {name}" for name in names_in(kinds) & CLASSES)
            case ast.Call(func=ast.Name("hasattr"), args=[_, ast.Constant(str(key))]) if key in KEYS:
                yield f"hasattr of {key}"
            case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(str(key)), _]) if key in KEYS:
                yield f"getattr of {key}"
            case ast.MatchClass(cls=cls):
                yield from (f"case {name}" for name in names_in(cls) & CLASSES)
            case ast.Match(subject=subject, cases=cases) if asks_kind(subject):
                values = {
                    n.value for case in cases for n in ast.walk(case.pattern) if isinstance(n, ast.Constant)
                }
                yield from (f"case {value!r}" for value in values & NAMES)
            case ast.Compare(left=left, comparators=others):
                sides = [left, *(n for other in others for n in ast.walk(other))]
                values = {n.value for n in sides if isinstance(n, ast.Constant)}
                yield from (
                    f"comparison with {value!r}" for value in values & NAMES if any(map(asks_kind, sides))
                )
                calls = [n for n in sides if isinstance(n, ast.Call) and "type" in names_in(n.func)]
                yield from (f"type {name}" for side in sides if calls for name in names_in(side) & CLASSES)
            case ast.Import(names=aliases):
                yield from (f"import of {a.name}" for a in aliases if is_closed(a.name))
            case ast.ImportFrom(module=str(module)) if is_closed(module):
                yield f"import of {module}"
            case ast.ImportFrom(module=str(module)) if module.startswith("llmtrain.objectives."):
                yield from (
                    f"import of {a.name}"
                    for a in node.names
                    if a.name in CLASSES and a.name not in BASE_NAMES
                )


def is_closed(module: str) -> bool:
    if not module.startswith("llmtrain.models."):
        return False
    return not any(module == name or module.startswith(f"{name}.") for name in OPEN)


BASE_NAMES = {base.__name__ for base in BASES}


def test_nobody_asks() -> None:
    found = [(name, question) for name, tree in modules() for question in questions(tree)]
    own = {(name, f"comparison with {value!r}") for name in OWN for value in HEADS}
    assert [f"{name}: {question}" for name, question in found if (name, question) not in own] == []


def test_the_test_sees_who_asks() -> None:
    code = """
import llmtrain.models.gpt.config
from llmtrain.models.bert.config import BertConfig
if isinstance(x, GPTConfig | BertConfig) or x.family == "seq2seq" or o.kind in ("mlm", "seq2seq"):
    match x:
        case XLNetConfig():
            pass
if type(x) is config.GPTConfig or issubclass(type(x), LoraConfig) or section["kind"] == "table":
    match x.kind:
        case "decoder":
            pass
if getattr(x, "adaptation", None) or hasattr(x, "embedding_size") or section.get("family") == "word2vec":
    pass
"""
    assert len(list(questions(ast.parse(code)))) == 15


def test_the_registry_is_a_list() -> None:
    """Short, and it opens no data."""
    text = (PACKAGE / "models/registry.py").read_text()
    assert len(text.splitlines()) < 80
    assert "corpus" not in text

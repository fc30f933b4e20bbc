"""Texts and labels in the fields of a table's rows.

What raises ValueError says two phrases: what was got, and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtrain.tables.records import field_of

if TYPE_CHECKING:
    from llmtrain.tables.build import Example
    from llmtrain.tables.config import TableDataConfig

_WHOLE_NUMBER = re.compile("-?[0-9]{1,18}")


def text_of(values: Mapping[str, Any], name: str) -> str:
    """Return a field as text: a number as it is written, a list with spaces between its items."""
    return _as_text(field_of(values, name), name)


def _as_text(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list):
        return " ".join(_as_text(item, name) for item in value)
    raise ValueError(f"{kind_of(value)} in the field {name}", "text, a number or a list of them")


def kind_of(value: Any) -> str:
    """Return in words what kind of value a file has."""
    kinds: dict[type, str] = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "an object", type(None): "nothing"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def label_of(value: Any, name: str) -> str:
    """Return a label as text: whole numbers without a fraction, so that 1, "1" and 1.0 are the same."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip() if isinstance(value, int | float | str) else ""
    if text.lower() == "nan":  # as other programs write what is missing
        raise ValueError(f"NaN in the field {name}", "a label")
    if text:
        return text
    got = "nothing" if value == "" else kind_of(value)
    raise ValueError(f"{got} in the field {name}", "a label: a word or a number")


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Return each label once: whole numbers by size, else by the alphabet."""
    found = sorted(set(labels))
    if all(_WHOLE_NUMBER.fullmatch(label) for label in found):
        found.sort(key=int)
    return tuple(found)


def given_names(found: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """Return the labels that were given, or else those found. Raise ValueError if one found was not given, or
    if there are none."""
    if not given:
        if not found:
            raise ValueError("no row to train on", "rows of the training split, which tell the labels")
        return tuple(found)
    unknown = [label for label in found if label not in given]
    if unknown:
        raise ValueError(
            f"the labels {', '.join(unknown[:6])}",
            f"{', '.join(given[:12])}, as objective.labels or the model's head has them; "
            "objective.new_head=true makes a new head",
        )
    return tuple(given)


def examples_of(texts: tuple[str, ...], label: Any) -> Example | None:
    """Return a row of one text or two, None without any text."""
    from llmtrain.tables.build import Example

    return Example(texts, texts, label) if any(text.strip() for text in texts) else None


def texts_of(values: Mapping[str, Any], data: TableDataConfig) -> tuple[str, ...]:
    """Return the one or two texts of a row."""
    names = [data.text_field] + ([] if data.text_pair_field is None else [data.text_pair_field])
    return tuple(text_of(values, name) for name in names)

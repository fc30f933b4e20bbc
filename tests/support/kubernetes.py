"""The API server's check of a manifest against the schema of its kind, unknown fields refused.

Structural schemas alone: type, properties, required, items, enum, pattern and bounds (Kubernetes, "Specifying
a structural schema"). Rules in CEL are not read.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parent / "schemas"
TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
}  # fmt: skip


def problems(manifest: Mapping[str, Any]) -> list[str]:
    """What the API server would say of a manifest."""
    stored = json.loads(gzip.decompress((SCHEMAS / f"{manifest['kind']}.json.gz").read_bytes()))
    if manifest["apiVersion"] != stored["apiVersion"]:
        return [f"apiVersion: {manifest['apiVersion']}, not {stored['apiVersion']}"]
    return list(_problems(manifest, stored["schema"], manifest["kind"]))


def _problems(value: Any, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, (int, str)):
            yield f"{where}: {value!r} is no integer or string"
        return
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (kind != "boolean" and isinstance(value, bool))):
        yield f"{where}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{where}: {value!r} does not match {schema['pattern']}"
    for name, is_beyond in (("minimum", lambda v, b: v < b), ("maximum", lambda v, b: v > b)):
        if name in schema and is_beyond(value, schema[name]):
            yield f"{where}: {value!r} is beyond the {name} {schema[name]}"
    if "maxItems" in schema and len(value) > schema["maxItems"]:
        yield f"{where}: more than {schema['maxItems']} items"
    if isinstance(value, dict):
        yield from (f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value)
        open_to = schema.get("additionalProperties")
        keeps = schema.get("x-kubernetes-preserve-unknown-fields") or not schema.keys() - {"type"}
        for name, item in value.items():
            of_item = schema.get("properties", {}).get(name, open_to if isinstance(open_to, dict) else None)
            if of_item is not None:
                yield from _problems(item, of_item, f"{where}.{name}")
            elif not keeps and open_to is not True:
                yield f"{where}.{name} is unknown"
    if isinstance(value, list) and "items" in schema:
        for number, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{where}[{number}]")

"""The architectures of transformers that can be imported and exported."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import Any

from llmtrain.errors import ConfigError, Problem
from llmtrain.models.huggingface.form import Form
from llmtrain.models.registry import families


@cache
def forms() -> dict[str, Form]:
    """Return model_type of config.json → form; the first that a model fits is what it is exported as."""
    return {form.model_type: form for family in families().values() for form in family.huggingface()}


def form_of(config: Any, came_from: str | None = None) -> Form:
    """Return the form that computes the same as a model of this config.

    came_from: model_type of the folder that the model was imported from; preferred if it still fits.
    Raise ConfigError that names the keys that prevent an export.
    """
    misfits = {
        name: form.misfits(config)
        for name, form in forms().items()
        if form.is_of(config) and form.part is None
    }
    fitting = [name for name, keys in misfits.items() if not keys]
    if fitting:
        return forms()[came_from if came_from in fitting else fitting[0]]
    elsewhere = "such a model can be trained and used here, not exported"
    if not misfits:
        exported = sorted(family.name for family in families().values() if family.huggingface())
        raise ConfigError(
            Problem("checkpoint", f"a model of family {config.family}", ", ".join(exported), elsewhere)
        )
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    got = ", ".join(f"{key}={attrgetter(key)(config)}" for key in misfits[nearest])
    allowed = ", ".join(f"{key}={has}" for key, has in misfits[nearest].items())
    raise ConfigError(
        Problem(
            "model",
            f"{got}: a form that transformers does not have",
            allowed,
            f"the nearest is {nearest}; {elsewhere}",
        )
    )

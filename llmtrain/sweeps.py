"""Where the jobs of a sweep keep their runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence

MOST_CHARACTERS = 100
"""File systems allow 255 bytes."""


CHANGES_NO_TRAINING = (
    "run",
    "track",
    "cluster",
    "checkpoint",
    "device",
    "model.path",
    "data.path",
    "data.cache",
)
"""Sections and keys of names and paths, of what watches and what keeps."""


def job_folder(overrides: Sequence[str], swept: Collection[str]) -> str:
    """The folder of a job, named by its values of the `swept` keys and then of others that a person gave, in
    any order of them: with another value, the sweep makes other runs. Empty where nothing is swept.

    What a folder's name had better not hold, or is too long, is told apart by a hash.
    """

    def matters(key: str) -> bool:
        return not any(key == name or key.startswith(f"{name}.") for name in CHANGES_NO_TRAINING)

    typed = sorted(override.lstrip("+") for override in overrides)
    given = [override for override in typed if override.partition("=")[0] in swept]
    if given:
        given += [
            override for override in typed if override not in given and matters(override.partition("=")[0])
        ]
    # Free text comes quoted.
    given = [re.sub(r"='(.*)'$", r"=\1", override, flags=re.DOTALL) for override in given]
    plain = [re.sub(r"[^\w.+=-]", "_", override, flags=re.ASCII) for override in given]
    name = ",".join(plain)
    if plain == given and len(name) <= MOST_CHARACTERS:
        return name
    digest = hashlib.sha256("\n".join(given).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:MOST_CHARACTERS]}-{digest[:10]}"

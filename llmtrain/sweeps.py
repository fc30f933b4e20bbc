"""Name the run folders of the jobs of a sweep, and what its table is made of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence

FIGURES_FILE = "figures.json"
"""File of a run folder: the figures of the last and of the best evaluation."""
MOST_CHARACTERS = 100
"""Maximum length of a folder name; file systems allow 255 bytes."""


CHANGES_NO_TRAINING = (
    "run",
    "track",
    "cluster",
    "checkpoint",
    "watch",
    "debug",
    "device",
    "model.path",
    "data.path",
    "data.cache",
)
"""Sections and keys that do not affect training: names and paths, tracking, saving and watching."""


def job_folder(overrides: Sequence[str], swept: Collection[str]) -> str:
    """Return the name of a job's folder: its values of the `swept` keys, then the other overrides that affect
    training, sorted. Empty if no key is swept.

    Special characters are replaced and long names truncated; a hash then keeps the names distinct.
    """

    def matters(key: str) -> bool:
        return not any(key == name or key.startswith(f"{name}.") for name in CHANGES_NO_TRAINING)

    typed = sorted(override.lstrip("+") for override in overrides)
    given = [override for override in typed if override.partition("=")[0] in swept]
    if given:
        given += [
            override for override in typed if override not in given and matters(override.partition("=")[0])
        ]
    # Text values are quoted.
    given = [re.sub(r"='(.*)'$", r"=\1", override, flags=re.DOTALL) for override in given]
    plain = [re.sub(r"[^\w.+=-]", "_", override, flags=re.ASCII) for override in given]
    name = ",".join(plain)
    if plain == given and len(name) <= MOST_CHARACTERS:
        return name
    digest = hashlib.sha256("\n".join(given).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:MOST_CHARACTERS]}-{digest[:10]}"

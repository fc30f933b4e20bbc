"""Where the jobs of a sweep keep their runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence

MOST_CHARACTERS = 100
"""File systems allow 255 bytes."""


def job_folder(overrides: Sequence[str], swept: Collection[str]) -> str:
    """The folder of a job, named by its values of the `swept` keys, in any order of them.

    What a folder's name had better not hold, or is too long, is told apart by a hash.
    """
    given = sorted(o.lstrip("+") for o in overrides if o.lstrip("+").partition("=")[0] in swept)
    # Free text comes quoted.
    given = [re.sub(r"='(.*)'$", r"=\1", override, flags=re.DOTALL) for override in given]
    plain = [re.sub(r"[^\w.+=-]", "_", override, flags=re.ASCII) for override in given]
    name = ",".join(plain)
    if plain == given and len(name) <= MOST_CHARACTERS:
        return name
    digest = hashlib.sha256("\n".join(given).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name[:MOST_CHARACTERS]}-{digest[:10]}"

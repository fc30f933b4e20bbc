"""Files of safetensors, of whoever wrote them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llmtrain.errors import CheckpointError, Problem
from llmtrain.reading import open_regular, parse_object

HEADER_BYTES = 16 << 20
"""What a file says of its tensors: 100 bytes for each."""
_LENGTH_BYTES = 8


def open_safetensors(file: Path) -> Any:
    """Open a file of safetensors, from which tensors are read when asked for. The library checks that they
    lie within it, one behind the other, each as long as its shape and type say.

    Raises CheckpointError for a damaged one.
    """
    try:
        _check_header(file)
        return safe_open(file, framework="pt")
    except OSError as error:
        got, remedy = str(error.strerror), ""
    except (SafetensorError, ValueError) as error:
        got, remedy = f"a damaged file ({error})", "copy it again"
    raise CheckpointError(Problem(str(file), got, "safetensors", remedy))


def _check_header(file: Path) -> None:
    """Raise OSError for what is no file, ValueError for a header that is too long or names a tensor twice,
    of which the library would take either."""
    with open(file, "rb", opener=open_regular) as opened:
        room = os.fstat(opened.fileno()).st_size - _LENGTH_BYTES
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if room < 0 or length > min(room, HEADER_BYTES):
            raise ValueError(f"a header of {length:,} bytes, more than {min(max(room, 0), HEADER_BYTES):,}")
        parse_object(opened.read(length), unique=True, utf8=True)

"""Arrays of .npy files that somebody else may have written."""

from __future__ import annotations

import io
import re

import numpy as np

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LONGEST_REASON = 200
_ADDRESS = re.compile(r" (object )?at 0x[0-9a-f]+")


def parse_array(data: bytes) -> np.ndarray:
    """Return the array of a .npy, which lies in `data` itself: a header that promises more than the file
    holds takes no memory.

    Raises ValueError, whose text is a phrase for `Problem.got`, for what is no whole .npy of plain numbers.
    """
    stream = io.BytesIO(data)
    try:
        shape, in_columns, dtype = _READERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:
        # numpy evaluates the header as Python: whatever is wrong with it may be raised.
        reason = _ADDRESS.sub("", " ".join(str(error).split()))[:_LONGEST_REASON]
        raise ValueError(f"no array ({reason})") from error
    if dtype.hasobject:
        raise ValueError("an array of Python's objects")
    count, place = 1, stream.tell()
    for length in shape:
        count *= length
    # numpy takes True for a length.
    if (
        any(type(length) is not int or length < 0 for length in shape)
        or len(data) - place != count * dtype.itemsize
    ):
        sides = " × ".join(f"{length:,}" for length in shape)
        raise ValueError(f"{len(data) - place:,} bytes of an array of {sides} {dtype}")
    array = np.frombuffer(data, dtype, count, place)
    return array.reshape(shape, order="F" if in_columns else "C")

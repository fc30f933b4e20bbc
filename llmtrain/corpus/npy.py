"""Parse .npy files from untrusted sources."""

from __future__ import annotations

import io
import re

import numpy as np

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LONGEST_REASON = 200
_ADDRESS = re.compile(r" (object )?at 0x[0-9a-f]+")


def parse_array(data: bytes) -> np.ndarray:
    """Return the array of a .npy as a view of `data`: a header that announces more than the file holds
    allocates nothing.

    Raises ValueError, whose message is a phrase for `Problem.got`, for anything but a complete .npy of
    numbers.
    """
    stream = io.BytesIO(data)
    try:
        shape, in_columns, dtype = _READERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:
        # numpy evaluates the header as Python, which may raise anything.
        reason = _ADDRESS.sub("", " ".join(str(error).split()))[:_LONGEST_REASON]
        raise ValueError(f"no array ({reason})") from error
    if dtype.hasobject:
        raise ValueError("an array of Python's objects")
    count, begin = 1, stream.tell()
    for length in shape:
        count *= length
    # numpy accepts True as a length.
    if (
        any(type(length) is not int or length < 0 for length in shape)
        or len(data) - begin != count * dtype.itemsize
    ):
        sides = " × ".join(f"{length:,}" for length in shape)
        raise ValueError(f"{len(data) - begin:,} bytes of an array of {sides} {dtype}")
    array = np.frombuffer(data, dtype, count, begin)
    return array.reshape(shape, order="F" if in_columns else "C")

"""The values of a pickle, read without running it.

A pickle is a program, which may call any function. Here the instructions that build plain values and arrays
of numpy are followed; what any other call would make is a Record that holds nothing but its name."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Record:
    """Stands for the result of a class or function that is not called: its name, and the attributes of an
    object."""

    cls: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    name: str


class _Array:
    """An array until its state is known."""

    value: np.ndarray | None = None


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SKIPPED = ("PROTO", "FRAME")
_ARRAYS = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
_BUFFERS = {f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")}
_SCALARS = {f"numpy.{core}.multiarray scalar" for core in ("core", "_core")}


def read(content: bytes) -> Any:
    """Return the value of a pickle. Raise ValueError for one that holds more than plain values and arrays."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return finished(stack.pop())
            _follow(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__})") from error
    raise ValueError("a pickle without an end")


def _follow(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _SKIPPED:
        return
    if name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name in _TUPLES:
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "TUPLE":
        stack.append(tuple(_marked(stack)))
    elif name == "FROZENSET":
        stack.append(frozenset(_marked(stack)))
    elif name == "ADDITEMS":
        added = _marked(stack)
        stack[-1].update(added)
    elif name in ("SETITEM", "SETITEMS"):
        items = _marked(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name in ("APPEND", "APPENDS"):
        added = _marked(stack) if name == "APPENDS" else [stack.pop()]
        stack[-1].extend(added)
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[int(argument)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[int(argument)])
    elif name == "GLOBAL":
        stack.append(_Name(argument))
    elif name == "STACK_GLOBAL":
        last = stack.pop()
        stack.append(_Name(f"{stack.pop()} {last}"))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments = stack.pop()
        stack.append(_called(stack.pop(), arguments))
    elif name == "BUILD":
        state = stack.pop()
        _build(stack[-1], state)
    elif argument is not None and name not in ("PERSID", "INST", "EXT1", "EXT2", "EXT4"):
        stack.append(argument)  # a text, bytes or a number
    else:
        raise ValueError(f"a pickle with the instruction {name}")


def _marked(stack: list[Any]) -> list[Any]:
    """Pop everything above the last mark, and the mark."""
    at = max(i for i, value in enumerate(stack) if value is _MARK)
    taken = stack[at + 1 :]
    del stack[at:]
    return taken


def _called(called: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(called, _Name):
        raise ValueError("a pickle that calls what is no function")
    if called.name in _ARRAYS:
        return _Array()
    if called.name == "numpy dtype":
        return _dtype(arguments[0])
    if called.name in _BUFFERS:
        data, dtype, shape, order = arguments
        return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)
    if called.name in _SCALARS:
        dtype, data = arguments
        return np.frombuffer(data, dtype=dtype, count=1)[0]
    if called.name == "_codecs encode" and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    return Record(called.name)


def _dtype(code: Any) -> np.dtype:
    if not isinstance(code, str) or code.lstrip("<>=|")[:1] not in "fiub":
        raise ValueError(f"an array of {code!r}")
    return np.dtype(code)


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Record):
        target.state.update(state if isinstance(state, dict) else {})
    elif isinstance(target, _Array):
        _, shape, dtype, is_fortran, data = state
        array = np.frombuffer(data, dtype=dtype)
        target.value = array.reshape(shape, order="F" if is_fortran else "C")
    elif not isinstance(target, np.dtype):
        raise ValueError("a pickle that sets the state of a plain value")
    elif state[1] == ">":
        raise ValueError("an array whose bytes are in the other order")


def finished(value: Any) -> Any:
    """Return the value with arrays in place of what stood for them."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, Record):
        return Record(value.cls, {key: finished(each) for key, each in value.state.items()})
    if isinstance(value, dict):
        return {key: finished(each) for key, each in value.items()}
    return value

"""Results as bytes: trees of dataclasses, lists, tuples and dictionaries of arrays, numbers and text, and back.

A line of JSON with the tree, in which an array is its type, shape and place, and then all arrays' bytes. What is read
is built by the types that the caller asks for, never by what the bytes name.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

ARRAY = {"dtype", "shape", "place"}
KINDS = "biufU"
"""Of the arrays that are packed: numbers and text."""


def pack(value: Any) -> bytes:
    """A value as bytes. Raises TypeError where there is anything in it but the above.

    >>> unpack(dict[str, tuple[np.ndarray, float]], pack({"a": (np.arange(2), float("inf"))}))
    {'a': (array([0, 1]), inf)}
    """
    arrays: list[bytes] = []
    place = 0

    def tree(value: Any) -> Any:
        nonlocal place
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.ndarray | np.generic):
            if value.dtype.kind not in KINDS:
                raise TypeError(f"arrays of {value.dtype} are not packed")
            arrays.append(value.tobytes())
            found = {"dtype": value.dtype.str, "shape": value.shape, "place": place}
            place += len(arrays[-1])
            return found
        if is_dataclass(value):
            return {field.name: tree(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, list | tuple):
            return [tree(item) for item in value]
        if isinstance(value, dict):
            return [[tree(key), tree(item)] for key, item in value.items()]
        raise TypeError(f"{type(value).__name__} is not packed")

    return json.dumps(tree(value)).encode() + b"\n" + b"".join(arrays)


def unpack(kind: Any, data: bytes | memoryview) -> Any:
    """The value of this type that was packed. Raises ValueError where the bytes are no such value."""
    view = memoryview(data)
    end = bytes(view).find(b"\n")
    try:
        return _built(kind, json.loads(bytes(view[: max(end, 0)])), view[end + 1 :])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no {getattr(kind, '__name__', kind)}: {error}") from error


def _built(kind: Any, tree: Any, data: memoryview) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if tree is None and type(None) in inner:
            return None
        parts = [part for part in inner if part is not type(None)]
        array = isinstance(tree, dict) and tree.keys() == ARRAY
        (only,) = parts if len(parts) == 1 else (part for part in parts if (part is np.ndarray) == array)
        return _built(only, tree, data)
    if isinstance(tree, dict) and tree.keys() == ARRAY:
        return _array(tree, data) if kind is np.ndarray else _array(tree, data)[()]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if tree.keys() != {field.name for field in fields(kind)}:
            raise ValueError(f"{kind} has other fields")
        return kind(**{name: _built(hints[name], part, data) for name, part in tree.items()})  # pyright: ignore
    if origin is list:
        return [_built(inner[0], part, data) for part in tree]
    if origin is tuple:
        each = [inner[0]] * len(tree) if inner[-1] is Ellipsis else inner
        return tuple(_built(part, item, data) for part, item in zip(each, tree, strict=True))
    if origin is dict:
        return {_built(inner[0], key, data): _built(inner[1], item, data) for key, item in tree}
    if kind not in (bool, int, float, str) or not isinstance(tree, (int, float) if kind is float else kind):
        raise ValueError(f"{tree!r} is no {kind}")
    return tree


def _array(tree: dict[str, Any], data: memoryview) -> np.ndarray:
    dtype, shape, place = np.dtype(tree["dtype"]), tuple(map(int, tree["shape"])), int(tree["place"])
    if dtype.kind not in KINDS or place < 0 or min(shape, default=0) < 0:
        raise ValueError("an array is none")
    count = math.prod(shape)
    return np.frombuffer(data, dtype, count, place).reshape(shape).copy() if count else np.empty(shape, dtype)

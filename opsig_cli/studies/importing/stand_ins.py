"""What stands in for the objects of a pickle: inert ones that keep what they were given, and descriptions of tensors,
storages and arrays, which say where their numbers lie."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from opsig_cli.studies.importing.entries import SIZES, Entry

MAX_AXES, MAX_KEY = 64, 16


class StandIn(dict):
    """An object of a class that is not loaded: what it was made of (`args`), what was put into it as into a dictionary
    or a list (`listed`), and its `state`. `kind` is the dotted name of the class."""

    __slots__ = ("args", "listed", "state")
    kind = ""

    def __new__(cls, *args: Any, **_: Any) -> StandIn:
        made = super().__new__(cls)
        made.args, made.listed, made.state = args, [], None
        return made

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **_: Any) -> StandIn:
        return StandIn(*args)

    def append(self, value: Any) -> None:
        self.listed.append(value)

    def extend(self, values: Any) -> None:
        self.listed.extend(values)

    add = append

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Inert:
    """Keeps nothing of the state that a pickle gives it."""

    __slots__ = ()

    def __setstate__(self, _: Any) -> None:
        pass


class Maker(Inert):
    """A function of ours that a pickle may call by the name of another."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)


class Storage(Inert):
    """Numbers in a file, not read: `offset` in bytes is None until it is known, and where there are none at all."""

    __slots__ = ("dtype", "file", "offset", "size")

    def __init__(self, dtype: str, size: int, file: Any = None, offset: int | None = None):
        self.dtype, self.size, self.file, self.offset = dtype, size, file, offset


class StoredTensor(Inert, Entry):
    """A tensor over a storage: shape, strides and first element; `file` of the storage reads it."""

    def __init__(self, storage: Any, first: int, shape: Any, strides: Any, dtype: str | None = None):
        if not isinstance(storage, Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        shape, strides = tuple(shape), tuple(strides)
        numbers = (first, *shape, *strides)
        if len(shape) != len(strides) or len(shape) > MAX_AXES or not all(type(n) is int for n in numbers):
            raise pickle.UnpicklingError("a tensor whose shape or strides are no numbers")
        if min(numbers) < 0:
            raise pickle.UnpicklingError("a tensor that begins before its storage")
        self.shape, self.strides, self.first, self.storage = shape, strides, first, storage
        self.dtype = dtype or storage.dtype
        last = first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * SIZES[self.dtype] > storage.size * SIZES[storage.dtype]:
            raise pickle.UnpicklingError("a tensor that ends after its storage")

    __hash__ = object.__hash__

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def held(self) -> bool:
        """Whether the file holds its numbers."""
        return self.storage.file is not None

    def read(self) -> Any:
        return self.storage.file.tensor(self)

    def pieces(self) -> Any:
        return self.storage.file.pieces(self) if self.held else None


class Dtype(Inert):
    """Stands for a numpy dtype: its code ("f8") and byte order. Numbers only."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "="

    def numpy(self) -> np.dtype:
        """The dtype; two bytes without a type for bfloat16. Raises ValueError where it is not of numbers."""
        if getattr(self.code, "kind", None) == "ml_dtypes.bfloat16":
            return np.dtype("V2")
        if not (isinstance(self.code, str) and re.fullmatch(r"[biufc]\d{1,2}", self.code)):
            raise ValueError(f"an array of type {self.code}")
        return np.dtype(self.order + self.code)


class StoredArray(Inert):
    """Stands for a numpy array, kept as its bytes until `array` is called."""

    def __init__(self, *_: Any) -> None:
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._state[1])

    def array(self) -> np.ndarray:
        """The array. Raises ValueError where it is not of numbers, or holds another number of bytes than it says."""
        _, shape, dtype, fortran, data = self._state
        data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote it
        values = np.frombuffer(data, dtype.numpy())
        return values.reshape(shape, order="F" if fortran else "C")


def plain_key(key: Any) -> Any:
    """A key that costs little to hash: itself, or a stand-in for what would not."""
    if isinstance(key, tuple):
        flat = len(key) <= MAX_KEY and not any(isinstance(each, tuple | frozenset) for each in key)
        return tuple(map(plain_key, key)) if flat else StandIn()
    if isinstance(key, int):
        return key if key.bit_length() <= 64 else StandIn()
    return key if isinstance(key, str | bytes | float | StandIn | StoredTensor | None) else StandIn()


def pairs_of(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A dictionary's content; that of a stand-in for an OrderedDict or Counter is what it was made of."""
    if isinstance(value, StandIn) and not value and len(value.args) == 1 and value.kind.startswith("collections."):
        (given,) = value.args
        if isinstance(given, Mapping):
            return given
        if isinstance(given, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in given):
            return {plain_key(key): inner for key, inner in given}
    return value


def state_of(value: Any) -> Mapping[Any, Any] | None:
    """The attributes of an object that is stood in for; None where it has none."""
    state = value.state if isinstance(value, StandIn) else None
    if isinstance(state, tuple) and len(state) == 2:  # of a class with slots
        parts = [part for part in state if isinstance(part, dict)]
        return {name: inner for part in parts for name, inner in part.items()} if parts else None
    return state if isinstance(state, Mapping) else None

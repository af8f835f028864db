"""What a pickle holds, without running anything that it names.

Every class and function that it asks for is an inert stand-in, which keeps what it was given; tensors, storages and
arrays are descriptions of where their numbers lie. Python's own unpickler in Python does the reading: that in C makes
room for as many objects as a file says it has.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from opsig_cli.studies.importing.entries import SIZES, Entry, Split

MAX_CLASSES = 10_000
"""Names that a file may ask for: each makes a class of its own."""
MAX_AXES, MAX_KEY = 64, 16
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip


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
    __hash__ = object.__hash__

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
        """The dtype. Raises ValueError where it is not of numbers."""
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


def _array(*_: Any) -> StoredArray:
    return StoredArray()


def _array_of_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> StoredArray:
    made = StoredArray()
    made.__setstate__((1, shape, dtype, order == "F", bytes(data) if isinstance(data, bytes | bytearray) else b""))
    return made


def _scalar(dtype: Any, data: Any = b"") -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    try:
        return np.frombuffer(data, dtype.numpy())[0].item()
    except (ValueError, TypeError, AttributeError, IndexError):
        return None  # text and dates say nothing about a run


def _encoded(text: Any, encoding: Any = "latin1") -> Any:
    """How bytes are written in protocol 2."""
    return text.encode("latin1") if isinstance(text, str) and encoding == "latin1" else b""


def _tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return StoredTensor(storage, first, shape, strides)


def _typed_tensor(storage: Any, first: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Any:
    name = str(getattr(dtype, "kind", "")).removeprefix("torch.")
    return StoredTensor(storage, first, shape, strides, name) if name in SIZES else StandIn()


def _same(data: Any, *_: Any) -> Any:
    """A parameter is its tensor here."""
    return data


def _new(kind: Any, *args: Any) -> Any:
    """What copyreg's functions make: an object of a class, by no more than its own __new__."""
    return kind(*args) if isinstance(kind, type) and issubclass(kind, StandIn) else StandIn()


def _size(*args: Any) -> Any:
    return tuple(args[0]) if args and isinstance(args[0], list | tuple) else ()


NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
    "torch.Size": _size,
    "_codecs.encode": _encoded,
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), lambda kind, *_: _new(kind)),
    **dict.fromkeys(("copyreg.__newobj__", "copy_reg.__newobj__"), _new),
    **dict.fromkeys((f"{module}.scalar" for module in NUMPY), _scalar),
    **dict.fromkeys((f"{module}._reconstruct" for module in NUMPY), _array),
    **dict.fromkeys(("numpy._core.numeric._frombuffer", "numpy.core.numeric._frombuffer"), _array_of_buffer),
    "numpy.dtype": Dtype,
}
"""What is made of what a pickle asks for by these names. Everything else is a StandIn."""


class Reader(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue] - the one in Python
    """Reads one pickle of a file; `path` is for messages, `storage` makes a Storage of a persistent id."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # pyright: ignore[reportAttributeAccessIssue]

    def __init__(self, file: Any, path: str, storage: Callable[[Any], Any] | None = None):
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._path, self._storage, self._found = path, storage, dict[str, Any]()

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._found:
            if len(self._found) >= MAX_CLASSES:
                raise pickle.UnpicklingError(f"it names more than {MAX_CLASSES:,} classes")
            if full == "torch._tensor._rebuild_from_type_v2":
                self._found[full] = Maker(self._subclass)
            elif full in MAKERS:
                self._found[full] = Maker(MAKERS[full])
            else:
                self._found[full] = type("StandIn", (StandIn,), {"kind": full, "__slots__": ()})
        return self._found[full]

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise pickle.UnpicklingError("it refers to what lies outside of it")
        return self._storage(pid)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension {code} is not known")

    def _subclass(self, make: Any, kind: Any, args: Any, state: Any) -> Any:
        """A tensor of a class of its own; of one that is spread over processes, the part that is here if it is all."""
        if isinstance(make, Maker) and isinstance(args, tuple):
            return make(*args)
        parts = [part for part in (state if isinstance(state, tuple) else (state,)) if isinstance(part, dict)]
        local = next((part["_local_tensor"] for part in parts if "_local_tensor" in part), None)
        if isinstance(local, StoredTensor) and isinstance(args, tuple) and len(args) > 2 and isinstance(args[2], tuple):
            return local if local.shape == args[2] else Split(args[2], self._path)
        return StandIn()

    def load_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        self.append(_new(kind, *args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    # Keys are plain: one of a tower of tuples takes forever to hash.

    def _put(self, target: Any, pairs: list[Any]) -> None:
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"a {type(target).__name__} that is filled as a dictionary")
        for place in range(0, len(pairs) - 1, 2):
            target[plain_key(pairs[place])] = pairs[place + 1]

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    def load_dict(self) -> None:
        made: dict[Any, Any] = {}
        self._put(made, self.pop_mark())
        self.append(made)

    def load_additems(self) -> None:
        items = self.pop_mark()
        for item in items:
            self.stack[-1].add(plain_key(item))

    def load_frozenset(self) -> None:
        self.append(frozenset(map(plain_key, self.pop_mark())))

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset


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

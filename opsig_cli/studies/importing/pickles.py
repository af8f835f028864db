"""What a pickle holds, without running anything that it names.

Every class and function that it asks for is an inert stand-in, which keeps what it was given; tensors, storages and
arrays are descriptions of where their numbers lie. Python's own unpickler in Python does the reading: that in C makes
room for as many objects as a file says it has.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from opsig_cli.studies.importing.entries import SIZES, Split
from opsig_cli.studies.importing.stand_ins import Dtype, Maker, StandIn, StoredArray, StoredTensor, plain_key

MAX_CLASSES = 10_000
"""Names that a file may ask for: each makes a class of its own."""
STORAGES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip


def _array(*_: Any) -> StoredArray:
    return StoredArray()


def _array_of_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> StoredArray:
    made = StoredArray()
    made.__setstate__((1, shape, dtype, order == "F", bytes(data) if isinstance(data, bytes | bytearray) else b""))
    return made


def _jax_array(_: Any, __: Any, state: Any, *___: Any) -> StoredArray:
    """An array of JAX is written as one of numpy."""
    made = StoredArray()
    made.__setstate__(state)
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
    "jax._src.array._reconstruct_array": _jax_array,
}
"""What is made of what a pickle asks for by these names. Everything else is a StandIn."""


PYTHONS: Any = vars(pickle)["_Unpickler"]
"""The unpickler that is written in Python."""


class Reader(PYTHONS):
    """Reads one pickle of a file; `path` is for messages, `storage` makes a Storage of a persistent id."""

    dispatch: ClassVar[dict[int, Any]] = dict(PYTHONS.dispatch)

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

    def load_bytearray8(self) -> None:  # without making room for what it says it has
        self.append(self.read(int.from_bytes(self.read(8), "little")))

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
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch[pickle.FROZENSET[0]] = load_frozenset

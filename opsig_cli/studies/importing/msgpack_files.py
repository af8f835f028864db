"""Files of `flax.serialization`: msgpack, whose arrays are extensions that hold a shape, a type and the numbers.

The reader is opsig's own. It makes nothing but containers, numbers and descriptions of where arrays lie, so that a file
costs no more memory than it has objects, and arrays are read when they are asked for.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from functools import partial
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.entries import SIZES, Entry, Piece, cut
from opsig_cli.studies.importing.torch_files import first_words

SUFFIXES = (".msgpack", ".flax", ".mpk")
MAPS = frozenset((*range(0x81, 0x90), 0xDE, 0xDF))
"""First bytes of a map, which no pickle, archive or HDF5 file begins with."""
MAX_DEPTH, MAX_OBJECTS = 64, 1_000_000
ARRAY, SCALAR = 1, 3
"""Extensions of an array and of a numpy scalar."""
NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
           0xD3: ">q"}  # fmt: skip
LENGTHS = {0: ">B", 1: ">H", 2: ">I"}
CHUNKED = "__msgpack_chunked_array__"


class _Damaged(Exception):
    pass


def is_msgpack(path: str) -> bool:
    """Whether a file is named as one of msgpack, or, with a name that tells no format, begins as one."""
    if path.endswith(SUFFIXES):
        return True
    with open(path, "rb") as file:
        first = file.read(1)
    return bool(first) and first[0] in MAPS


def load(path: str) -> Any:
    """What a file holds: dictionaries, lists, numbers, text and entries. Raises OpsigError where it is damaged."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else file as data:
            reader = _Reader(data, path, size)
            value = reader.value(0)
            if reader.place < size:
                raise _Damaged(f"{size - reader.place:,} bytes follow on its end")
        return value
    except _Damaged as error:
        raise OpsigError(f"{path} is not a readable file of flax.serialization: {error}") from error
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise OpsigError(f"{path} is not a readable file of flax.serialization ({first_words(error)})") from error


class _Reader:
    """Reads values one after the other from `place` on; none may end after `stop`."""

    def __init__(self, data: Any, path: str, stop: int):
        self._data, self._path, self._stop = data, path, stop
        self.place, self._left = 0, MAX_OBJECTS

    def value(self, depth: int) -> Any:
        self._left -= 1
        if depth > MAX_DEPTH or self._left < 0:
            raise _Damaged(f"more than {MAX_DEPTH} levels or {MAX_OBJECTS:,} objects, as no parameters have")
        first = self._number(">B")
        match first:
            case _ if first < 0x80:
                return first
            case _ if first >= 0xE0:
                return first - 0x100
            case _ if first < 0x90:
                return self._map(first & 0x0F, depth)
            case _ if first < 0xA0:
                return self._list(first & 0x0F, depth)
            case _ if first < 0xC0:
                return self._text(first & 0x1F)
            case 0xC0:
                return None
            case 0xC2 | 0xC3:
                return first == 0xC3
            case 0xC4 | 0xC5 | 0xC6:
                self._skip(self._number(LENGTHS[first - 0xC4]))
                return None  # bytes: neither weights nor numbers
            case 0xC7 | 0xC8 | 0xC9:
                length = self._number(LENGTHS[first - 0xC7])
                return self._extension(self._number(">b"), length, depth)
            case _ if first in NUMBERS:
                return self._number(NUMBERS[first])
            case 0xD4 | 0xD5 | 0xD6 | 0xD7 | 0xD8:
                return self._extension(self._number(">b"), 1 << (first - 0xD4), depth)
            case 0xD9 | 0xDA | 0xDB:
                return self._text(self._number(LENGTHS[first - 0xD9]))
            case 0xDC | 0xDD:
                return self._list(self._number(LENGTHS[first - 0xDB]), depth)
            case 0xDE | 0xDF:
                return self._map(self._number(LENGTHS[first - 0xDD]), depth)
        raise _Damaged(f"a byte {first:#x} at {self.place - 1:,} begins no value")

    def _skip(self, count: int) -> int:
        """Go on behind so many bytes; where they begin."""
        begin = self.place
        if count > self._stop - begin:
            raise _Damaged("it ends in the middle")
        self.place += count
        return begin

    def _number(self, form: str) -> Any:
        begin = self._skip(struct.calcsize(form))
        return struct.unpack(form, self._data[begin : self.place])[0]

    def _text(self, count: int) -> str:
        begin = self._skip(count)
        return bytes(self._data[begin : self.place]).decode("utf-8", "replace")

    def _list(self, count: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(count)]

    def _map(self, count: int, depth: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str | int | float | None):
                raise _Damaged("a key that is neither text nor a number")
            found[key] = self.value(depth + 1)
        return self._whole(found) if CHUNKED in found else found

    def _extension(self, kind: int, length: int, depth: int) -> Any:
        begin = self._skip(length)
        if kind not in (ARRAY, SCALAR):
            return None
        inside = _Reader(self._data, self._path, begin + length)
        inside.place = begin
        return inside.array(depth)

    def array(self, depth: int) -> Entry:
        """An array: a list of its shape, the name of its type, and its bytes."""
        if self._number(">B") != 0x93:
            raise _Damaged("an array without a shape and a type")
        shape, name = self.value(depth + 1), self.value(depth + 1)
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > MAX_DEPTH:
            raise _Damaged("an array whose shape is no list of numbers")
        name = {"bool_": "bool", "float": "float64", "int": "int64"}.get(str(name), str(name))
        head = self._number(">B")
        if head not in (0xC4, 0xC5, 0xC6):
            raise _Damaged("an array without numbers")
        length = self._number(LENGTHS[head - 0xC4])
        begin, count = self._skip(length), math.prod(shape)
        if name in SIZES and count * SIZES[name] != length:
            raise _Damaged(f"an array of {count:,} {name} has {length:,} bytes")
        pieces = [Piece(self._path, begin, name, 0, count)]
        return Entry(shape, partial(_read, self._path, begin, length, name, tuple(shape)), pieces)

    def _whole(self, found: dict[Any, Any]) -> Entry:
        """An array of more than a gigabyte, which is written in flat parts."""
        shape, chunks = found.get("shape"), found.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict):
            raise _Damaged("an array in parts without its shape or its parts")
        lengths, parts = ([each[key] for key in sorted(each, key=lambda key: int(key))] for each in (shape, chunks))
        if not all(type(n) is int and n >= 0 for n in lengths) or not all(isinstance(part, Entry) for part in parts):
            raise _Damaged("an array in parts whose shape or parts are none")
        if sum(part.numel() for part in parts) != math.prod(lengths):
            raise _Damaged("an array in parts that lacks some")
        return cut(parts, 0, lengths)


def _read(path: str, begin: int, length: int, name: str, shape: tuple[int, ...]) -> Any:
    import torch

    if name not in SIZES:
        raise OpsigError(f"{path} holds an array of type '{name[:40]}', which is none of numbers")
    with open(path, "rb") as file:
        file.seek(begin)
        data = bytearray(file.read(length))
    if len(data) < length:
        raise OpsigError(f"{path} has become shorter while it was read")
    dtype = getattr(torch, name)
    return torch.frombuffer(data, dtype=dtype).view(shape) if length else torch.empty(shape, dtype=dtype)

"""Files of arrays: safetensors and npz by name, equinox's one after the other. Their numbers lie in the file as they
are."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from functools import partial
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.content import Content, collect_numbers
from opsig_cli.studies.importing.entries import Entry, Piece, tensor_of
from opsig_cli.studies.importing.torch_files import LOCAL_HEADER, WRAPPERS, check_expansion, first_words

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Names of types in safetensors' header."""
MAX_LINE = 1 << 20
"""Bytes of the options before a file of equinox."""


def open_safetensors(path: str, content: Content, stack: contextlib.ExitStack) -> None:
    """Raises OpsigError where the file is damaged, or the library is absent."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise OpsigError(f"{path} needs the library safetensors: pip install 'opsig[safetensors]'") from error
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        places = _places(path)
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            shape = tuple(file.get_slice(name).get_shape())
            content.tensors[_dotted(name)] = Entry(shape, partial(file.get_tensor, name), places.get(name))
        collect_numbers(file.metadata() or {}, content)
    except OSError:
        raise
    except Exception as error:  # the library's own classes
        raise OpsigError(f"{path} is not a readable safetensors file ({first_words(error)})") from error


def _places(path: str) -> dict[str, list[Piece]]:
    """Where each tensor lies: the header is JSON of that length which the first eight bytes say."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    found = {}
    for name, about in header.items():
        if name != "__metadata__" and about["dtype"] in DTYPES:
            count = int(np.prod(about["shape"], dtype=np.int64))
            found[name] = [Piece(path, 8 + length + about["data_offsets"][0], DTYPES[about["dtype"]], 0, count)]
    return found


def open_npz(path: str, content: Content, stack: contextlib.ExitStack) -> None:
    """Raises OpsigError where the file is damaged or holds other things than arrays."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        check_expansion(archive, path)
        real: set[str] = set()
        for part in archive.infolist():
            with archive.open(part) as file:
                shape, fortran, dtype = _header(file)
                begins = file.tell()
            name = part.filename.removesuffix(".npy")
            if _is_real(dtype):
                real.add(name)
            if shape == ():
                collect_numbers({name: _read(archive, part.filename).item()}, content)
            pieces = None
            if part.compress_type == zipfile.ZIP_STORED and not fortran and dtype.byteorder in "<=|":
                count = int(np.prod(shape, dtype=np.int64))
                kind = "bfloat16" if dtype.str[1:] == "V2" else dtype.name
                pieces = [Piece(path, _data(path, part) + begins, kind, 0, count)]
            content.tensors[_dotted(name)] = Entry(shape, partial(_tensor, archive, part.filename), pieces)
        if set(content.tensors) == {f"arr_{i}" for i in range(len(content.tensors))}:
            ordered = [f"arr_{i}" for i in range(len(content.tensors))]
            content.unnamed = [content.tensors[name] for name in ordered if name in real]
    except (OSError, OpsigError):
        raise
    except Exception as error:  # a malformed header can raise anything
        raise OpsigError(f"{path} is not a readable npz file of arrays ({first_words(error)})") from error


def open_equinox(path: str, content: Content) -> None:
    """Arrays as numpy.save writes them, behind a line of JSON with the model's options, if there is one.

    Raises OpsigError where the file is damaged, or holds other things than arrays.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            line = file.readline(MAX_LINE) if file.peek(1)[:1] == b"{" else b""
            if line:
                options = json.loads(line)
                collect_numbers(options if isinstance(options, dict) else {}, content)
            while file.tell() < size:
                shape, fortran, dtype = _header(file)
                begins, count = file.tell(), math.prod(shape)
                kind = "bfloat16" if dtype.str[1:] == "V2" else dtype.name
                if min(shape, default=0) < 0 or dtype.hasobject or begins + count * dtype.itemsize > size:
                    raise ValueError("an array that is not whole, or of objects")
                file.seek(count * dtype.itemsize, os.SEEK_CUR)
                pieces = None if fortran or dtype.byteorder == ">" else [Piece(path, begins, kind, 0, count)]
                read = partial(_part, path, begins, shape, fortran, dtype)
                if _is_real(dtype):  # counters, keys and tables are no parameters
                    content.unnamed.append(Entry(shape, read, pieces))
    except OSError:
        raise
    except Exception as error:  # a malformed header can raise anything
        raise OpsigError(f"{path} is not a readable file of equinox ({first_words(error)})") from error
    if not content.unnamed:
        raise OpsigError(f"{path} holds no arrays")


def _is_real(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.str[1:] == "V2"


def _part(path: str, begins: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> Any:
    count = math.prod(shape)
    with open(path, "rb") as file:
        file.seek(begins)
        values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    return tensor_of(values.reshape(shape, order="F" if fortran else "C"))


def _dotted(name: str) -> str:
    """A name by dots: those of JAX's trees are often written as paths, with slashes."""
    return WRAPPERS.sub("", name.replace("/", "."))


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _data(path: str, part: zipfile.ZipInfo) -> int:
    """Where in the file a part's bytes begin."""
    with open(path, "rb") as file:
        file.seek(part.header_offset)
        name, extra = struct.unpack("<HH", file.read(LOCAL_HEADER)[26:30])
    return part.header_offset + LOCAL_HEADER + name + extra


def _read(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _tensor(archive: zipfile.ZipFile, member: str) -> Any:
    return tensor_of(_read(archive, member))


def read_json(path: str) -> dict[str, Any]:
    """A JSON object. Raises OpsigError for anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise OpsigError(f"{path} is not JSON ({first_words(error)})") from error
    if not isinstance(value, dict):
        raise OpsigError(f"{path} is not a JSON object")
    return value

"""Files of arrays by name: safetensors and npz. Their numbers lie in the file as they are."""

from __future__ import annotations

import contextlib
import json
import struct
import zipfile
from functools import partial
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.content import Content, collect_numbers
from opsig_cli.studies.importing.entries import Entry, Piece
from opsig_cli.studies.importing.torch_files import LOCAL_HEADER, WRAPPERS, check_expansion, first_words

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Names of types in safetensors' header."""


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
            content.tensors[WRAPPERS.sub("", name)] = Entry(shape, partial(file.get_tensor, name), places.get(name))
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
        for part in archive.infolist():
            with archive.open(part) as file:
                shape, fortran, dtype = _header(file)
                begins = file.tell()
            name = part.filename.removesuffix(".npy")
            if shape == ():
                collect_numbers({name: _read(archive, part.filename).item()}, content)
            pieces = None
            if part.compress_type == zipfile.ZIP_STORED and not fortran and dtype.byteorder in "<=|":
                count = int(np.prod(shape, dtype=np.int64))
                pieces = [Piece(path, _data(path, part) + begins, dtype.name, 0, count)]
            content.tensors[WRAPPERS.sub("", name)] = Entry(shape, partial(_tensor, archive, part.filename), pieces)
    except (OSError, OpsigError):
        raise
    except Exception as error:  # a malformed header can raise anything
        raise OpsigError(f"{path} is not a readable npz file of arrays ({first_words(error)})") from error


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
    import torch

    return torch.from_numpy(_read(archive, member))


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

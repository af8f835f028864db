"""Checkpoints as people have them, opened one at a time: torch.save, safetensors, Hugging Face folders, npz.

Whatever the format, what is inside comes out as one flat list of tensors under dotted names, such as
`model.module.fc.weight` for `{"model": {"module.fc.weight": ...}}`, each read when it is asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.torch_files import (
    WRAPPERS,
    StoredArray,
    check_expansion,
    first_words,
    is_plain,
    load,
    number_of,
)

TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar")
SUFFIXES = (*TORCH, ".safetensors", ".npz")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
"""Names of the weights in a Hugging Face folder; sharded, they are listed by NAME.index.json."""
MAX_DEPTH = 6
OPTIONS = ("args", "config", "cfg", "hparams", "hyper_parameters", "opt", "options", "params")
"""Keys under which scripts keep what they were asked to do; a `step` there is no step that was reached."""
DIGITS = 18
"""Of a whole number that may be a step."""


@dataclass(frozen=True)
class Entry:
    """A tensor that has not been read yet. `read` returns a torch tensor on the CPU."""

    shape: tuple[int, ...]
    read: Callable[[], Any]


@dataclass
class Content:
    """What one checkpoint holds: tensors by dotted name, whole numbers by their key, and optimizers' state_dict()s."""

    tensors: dict[str, Entry] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    optimizers: list[Mapping[str, Any]] = field(default_factory=list)


def find(paths: list[str]) -> list[str]:
    """The checkpoints that paths name: files, folders that are one, and folders that hold some.

    They keep the order they are given in, but a shell's alphabetical order becomes that of the numbers in the names.
    Raises OpsigError for a path that is absent or holds no checkpoint.
    """
    found = [checkpoint for path in paths for checkpoint in _expand(path)]
    return sorted(found, key=natural) if found == sorted(found) else found


def natural(path: str) -> list[Any]:
    """A key that sorts ckpt_9 before ckpt_10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", path)]


def _expand(path: str) -> list[str]:
    if not os.path.exists(path):
        raise OpsigError(f"{path} does not exist")
    if not os.path.isdir(path):
        return [path]
    inside = sorted((os.path.join(path, name) for name in os.listdir(path)), key=natural)
    folders = [each for each in inside if os.path.isdir(each) and (_weights(each) or _is_distributed(each))]
    if folders:
        return folders
    if _weights(path) or _is_distributed(path):
        return [path]
    files = [each for each in inside if each.endswith(SUFFIXES) and os.path.isfile(each)]
    if not files:
        raise OpsigError(
            f"{path} holds no checkpoint: none of {', '.join(WEIGHTS[:2])} and no file that ends in "
            f"{', '.join(SUFFIXES)}"
        )
    return files


def _weights(folder: str) -> str | None:
    names = [name for weights in WEIGHTS for name in (weights, f"{weights}.index.json")]
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def _is_distributed(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, ".metadata"))


@contextlib.contextmanager
def opened(path: str) -> Iterator[Content]:
    """A checkpoint's content, whose tensors can be read inside.

    Raises OpsigError, in one line, where it is damaged, of no known format, or would have to run code.
    """
    with contextlib.ExitStack() as stack:
        content = Content()
        try:
            _open(path, content, stack)
        except OpsigError:
            raise
        except OSError as error:
            raise OpsigError(f"{path}: {error.strerror or first_words(error)}") from error
        try:
            yield content
        finally:  # a checkpoint's memory is given back before the next is opened
            content.tensors.clear()
            content.optimizers.clear()


def _open(path: str, content: Content, stack: contextlib.ExitStack) -> None:
    if os.path.isdir(path):
        _open_folder(path, content, stack)
    elif path.endswith(".safetensors"):
        _open_safetensors(path, content, stack)
    elif path.endswith(".npz"):
        _open_npz(path, content, stack)
    elif path.endswith(".distcp"):
        raise OpsigError(_convert(os.path.dirname(path) or "."))
    else:
        _collect(load(path), content, path)


def _open_folder(folder: str, content: Content, stack: contextlib.ExitStack) -> None:
    for file in weight_files(folder):
        _open(file, content, stack)
    state = os.path.join(folder, "trainer_state.json")
    if os.path.isfile(state):
        _collect_numbers(_json(state), content)
    optimizer = os.path.join(folder, "optimizer.pt")
    if os.path.isfile(optimizer):
        _collect({"optimizer": load(optimizer)}, content, optimizer)


def weight_files(path: str) -> list[str]:
    """Files that hold a checkpoint's weights: itself, or those of a folder. OpsigError where a folder names others."""
    if not os.path.isdir(path):
        return [path]
    if _is_distributed(path):
        raise OpsigError(_convert(path))
    name = _weights(path)
    if name is None:
        raise OpsigError(f"{path} holds neither {' nor '.join(WEIGHTS[:2])}")
    if not name.endswith(".index.json"):
        return [os.path.join(path, name)]
    index = os.path.join(path, name)
    parts = _json(index).get("weight_map")
    names = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
    if not names or any(os.path.basename(part) != part or not part.endswith(SUFFIXES) for part in names):
        raise OpsigError(f"{index} does not list files of weights in its own folder")
    for part in names:
        if not os.path.isfile(os.path.join(path, part)):
            raise OpsigError(f"{path} lacks {part}, which its index names")
    return [os.path.join(path, part) for part in names]


def _convert(folder: str) -> str:
    return (
        f"{folder} is a distributed checkpoint, whose .metadata may run code when it is read. If you trust it, convert "
        f"it and import the file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt"
    )


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise OpsigError(f"{path} is not JSON ({first_words(error)})") from error
    if not isinstance(value, dict):
        raise OpsigError(f"{path} is not a JSON object")
    return value


def _open_safetensors(path: str, content: Content, stack: contextlib.ExitStack) -> None:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise OpsigError(f"{path} needs the library safetensors: pip install 'opsig[safetensors]'") from error
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            shape = tuple(file.get_slice(name).get_shape())
            content.tensors[WRAPPERS.sub("", name)] = Entry(shape, partial(file.get_tensor, name))
        _collect_numbers(file.metadata() or {}, content)
    except OSError:
        raise
    except Exception as error:  # the library's own classes
        raise OpsigError(f"{path} is not a readable safetensors file ({first_words(error)})") from error


def _open_npz(path: str, content: Content, stack: contextlib.ExitStack) -> None:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        check_expansion(archive, path)
        for member in archive.namelist():
            with archive.open(member) as file:
                shape = _npy_shape(file)
            name = member.removesuffix(".npy")
            if shape == ():
                _collect_numbers({name: _read_npy(archive, member).item()}, content)
            content.tensors[WRAPPERS.sub("", name)] = Entry(shape, partial(_npz_tensor, archive, member))
    except (OSError, OpsigError):
        raise
    except Exception as error:  # a malformed header can raise anything
        raise OpsigError(f"{path} is not a readable npz file of arrays ({first_words(error)})") from error


def _npy_shape(file: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)[0]


def _read_npy(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _npz_tensor(archive: zipfile.ZipFile, member: str) -> Any:
    import torch

    return torch.from_numpy(_read_npy(archive, member))


def _collect(loaded: Any, content: Content, path: str) -> None:
    """Everything of interest in nested containers; each container is looked at once, to a bounded depth."""
    import torch

    seen: set[int] = set()

    def walk(value: Any, name: str, depth: int) -> None:
        if is_plain(value):
            content.tensors[WRAPPERS.sub("", name)] = Entry(tuple(value.shape), lambda: value)
        elif isinstance(value, StoredArray):
            with contextlib.suppress(TypeError, IndexError):
                content.tensors[name] = Entry(value.shape, lambda: torch.from_numpy(value.array().copy()))
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen and depth < MAX_DEPTH:
            seen.add(id(value))
            if isinstance(value, Mapping):
                if isinstance(value.get("param_groups"), list) and isinstance(value.get("state"), Mapping):
                    content.optimizers.append(value)
                    return
                if depth < 2 and name not in OPTIONS:
                    _collect_numbers(value, content)
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, inner in pairs:
                walk(inner, f"{name}.{key}" if name else str(key), depth + 1)

    if not isinstance(loaded, Mapping | list | tuple):
        raise OpsigError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    walk(loaded, "", 0)


def _collect_numbers(values: Mapping[Any, Any], content: Content) -> None:
    """Whole numbers by key: ints, floats and text of integers, tensors of one number. The first of a name stays."""
    for key, value in values.items():
        number = _number(value)
        if number is not None:
            content.numbers.setdefault(str(key), number)


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < DIGITS else None
    number = number_of(value)
    return int(number) if number is not None and abs(number) < 10**DIGITS and number == int(number) else None


@dataclass(frozen=True)
class Source:
    """A checkpoint's weights as files: their bytes, their SHA-256 in order of name, and what in them is damaged."""

    bytes: int
    sha256: str
    damaged: str | None


def source_of(path: str) -> Source:
    """Read a checkpoint's files once through. A part of a zip archive whose checksum is wrong is named: torch does not
    look at these where it maps a file. Raises OSError."""
    total, summed, damaged = 0, hashlib.sha256(), None
    for name in weight_files(path):
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                total += len(block)
                summed.update(block)
        if zipfile.is_zipfile(name):
            with contextlib.suppress(zipfile.BadZipFile, NotImplementedError, RuntimeError), zipfile.ZipFile(name) as z:
                damaged = damaged or z.testzip()
    return Source(total, summed.hexdigest(), damaged)

"""Checkpoints as people have them, opened one at a time: files of torch.save, safetensors, npz and msgpack, and the
folders that Hugging Face's libraries, torch.distributed.checkpoint, DeepSpeed, Megatron and orbax write."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import array_files, distributed, msgpack_files, orbax_folders, partitions
from opsig_cli.studies.importing.content import Content, collect, collect_numbers
from opsig_cli.studies.importing.pytrees import collect_tree
from opsig_cli.studies.importing.torch_files import first_words, load

TORCH = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl")
SUFFIXES = (*TORCH, ".safetensors", ".npz", ".eqx", *msgpack_files.SUFFIXES)
WEIGHTS = (
    "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors",
    "adapter_model.bin", "flax_model.msgpack",
)  # fmt: skip
"""Names of the weights in a Hugging Face folder; sharded, they are listed by NAME.index.json."""
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
"""What Hugging Face's Trainer and Accelerate call the optimizer's state in a folder."""
INSIDE = ("pytorch_model_fsdp_0", "checkpoint")
"""Folders in which a folder's weights may lie: of FSDP in a Hugging Face folder, of DeepSpeed under Lightning."""
NUMBERS = ("meta.pt", "common.pt")
"""Files beside a distributed checkpoint that hold its step: Lightning's and Megatron's."""
FLAX = re.compile(r"checkpoint_\d+")
"""What flax called its files of msgpack, without a suffix."""
MEMBER = re.compile(r"(.+)\[(-?\d+)\]")


def find(paths: list[str]) -> list[str]:
    """The checkpoints that paths name: files, folders that are one, folders that hold some, and each of a list in one
    file, as FILE[0].

    They keep the order they are given in, but a shell's alphabetical order becomes that of the numbers in the names.
    Raises OpsigError for a path that is absent or holds no checkpoint.
    """
    found = [checkpoint for path in paths for checkpoint in _expand(path)]
    found = sorted(found, key=natural) if found == sorted(found) else found
    return [member for path in found for member in _members(path)]


def natural(path: str) -> list[Any]:
    """A key that sorts ckpt_9 before ckpt_10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", path)]


def _expand(path: str) -> list[str]:
    if not os.path.exists(path):
        raise OpsigError(f"{path} does not exist")
    if not os.path.isdir(path):
        return [path]
    if orbax_folders.UNFINISHED in os.path.basename(os.path.normpath(path)):
        raise OpsigError(f"{path} is a checkpoint that orbax had not finished writing. Leave it out")
    if orbax_folders.is_checkpoint(path):
        return [path]
    inside = sorted((os.path.join(path, name) for name in os.listdir(path)), key=natural)
    if os.path.isfile(os.path.join(path, "trainer_state.json")) and _kind(path):
        return [path]
    folders = [each for each in inside if os.path.isdir(each) and os.path.basename(each) not in INSIDE and _kind(each)]
    files = [each for each in inside if _is_named_as_one(each) and os.path.isfile(each)]
    if folders and not _kind(path, own=True):
        return folders
    if folders or _kind(path):
        return folders or [path]
    if not files:
        raise OpsigError(
            f"{path} holds no checkpoint: none of {', '.join(WEIGHTS[:2])} and no file that ends in "
            f"{', '.join(SUFFIXES)}"
        )
    return files


def _is_named_as_one(path: str) -> bool:
    return path.endswith(SUFFIXES) or bool(FLAX.fullmatch(os.path.basename(path)))


def _members(path: str) -> list[str]:
    """A file that holds a list of checkpoints, or one by each of several numbers, gives each of them."""
    if os.path.isdir(path) or not path.endswith(TORCH):
        return [path]
    try:
        return [f"{path}[{number}]" for number in _several(path, _stamp(path))] or [path]
    except OpsigError:
        return [path]  # which is said when it is opened


def _stamp(path: str) -> tuple[int, ...]:
    """What tells whether a file is still the one that was read. Raises OSError."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _several(path: str, stamp: tuple[int, ...]) -> Mapping[int, Any]:
    """The checkpoints of a file that holds several, taken apart once for all of them: its tensors are not read yet."""
    return _listed(load(path))


def _listed(loaded: Any) -> Mapping[int, Any]:
    """Checkpoints by their place in a list, or by the number under which they lie: several of one model; empty for a
    single one."""
    found: dict[int, Any] = {}
    if isinstance(loaded, list) and len(loaded) > 1:
        found = dict(enumerate(loaded))
    elif isinstance(loaded, Mapping) and all(type(key) is int and key >= 0 for key in loaded):
        found = dict(loaded)
    models = {_names(each) for each in found.values()}
    return found if len(models) == 1 and frozenset() not in models else {}


def _names(value: Any) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors; empty for what is none."""
    inside = Content()
    if isinstance(value, Mapping):
        with contextlib.suppress(OpsigError):
            collect(value, inside, "")
    return frozenset((name, entry.shape) for name, entry in inside.tensors.items())


def _weights(folder: str) -> str | None:
    names = [name for weights in WEIGHTS for name in (weights, f"{weights}.index.json")]
    return next((name for name in names if os.path.isfile(os.path.join(folder, name))), None)


def _kind(folder: str, own: bool = False) -> str | None:
    """How a folder keeps weights; `own`: itself, and not in a folder of its own for them."""
    if os.path.isfile(os.path.join(folder, distributed.METADATA)):
        return "distributed"
    if orbax_folders.is_checkpoint(folder):
        return "orbax"
    names = os.listdir(folder)
    if any(map(partitions.ZERO_MODEL.fullmatch, names)):
        return "deepspeed"
    if any(os.path.isfile(os.path.join(folder, name, partitions.MEGATRON_FILE)) for name in names):
        return "megatron"
    if _weights(folder):
        return "weights"
    return None if own or _inner(folder) is None else "inside"


def _inner(folder: str) -> str | None:
    """The folder in which a folder's weights lie: one of INSIDE, or what DeepSpeed's `latest` names."""
    names: list[str] = [*INSIDE]
    latest = os.path.join(folder, "latest")
    if os.path.isfile(latest) and os.path.getsize(latest) < 1000:
        with open(latest, encoding="utf-8", errors="replace") as file:
            names.append(os.path.basename(file.read().strip()))
    inside = [os.path.join(folder, name) for name in names if name]
    return next((each for each in inside if os.path.isdir(each) and _kind(each, own=True)), None)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Content]:
    """A checkpoint's content, whose tensors can be read inside.

    Raises OpsigError, in one line, where it is damaged or of no known format.
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
            content.clear()


def _open(path: str, content: Content, stack: contextlib.ExitStack) -> None:
    if os.path.isdir(path):
        _open_folder(path, content, stack)
    elif path.endswith(".safetensors"):
        array_files.open_safetensors(path, content, stack)
    elif path.endswith(".npz"):
        array_files.open_npz(path, content, stack)
    elif path.endswith(".eqx"):
        array_files.open_equinox(path, content)
    elif os.path.isfile(path) and not path.endswith(TORCH) and msgpack_files.is_msgpack(path):
        collect_tree(msgpack_files.load(path), content)
    elif path.endswith(".distcp"):
        raise OpsigError(f"{path} is a part of a checkpoint: import its folder, {os.path.dirname(path) or '.'}")
    elif not os.path.exists(path) and (found := MEMBER.fullmatch(path)):
        collect(_several(found[1], _stamp(found[1]))[int(found[2])], content, path)
    else:
        collect(load(path), content, path)


def _open_folder(folder: str, content: Content, stack: contextlib.ExitStack) -> None:
    match _kind(folder):
        case "distributed":
            for name in filter(lambda name: os.path.isfile(os.path.join(folder, name)), NUMBERS):
                path = os.path.join(folder, name)
                numbers = load(path)
                collect_numbers(numbers if isinstance(numbers, Mapping) else {}, content)
            distributed.open_distributed(folder, content)
        case "deepspeed":
            partitions.open_deepspeed(folder, content)
        case "orbax":
            orbax_folders.open_orbax(folder, content)
        case "megatron":
            for file in partitions.megatron_files(folder):
                partitions.open_megatron(file, content)
        case "inside":
            _open_folder(_inner(folder) or "", content, stack)
        case _:
            for file in weight_files(folder):
                _open(file, content, stack)
    state = os.path.join(folder, "trainer_state.json")
    if os.path.isfile(state):
        about = array_files.read_json(state)
        content.numbers |= {"global_step": about["global_step"]} if isinstance(about.get("global_step"), int) else {}
        collect_numbers(about, content)
        history = about.get("log_history")
        content.log += [each for each in history if isinstance(each, dict)] if isinstance(history, list) else []
    optimizer = next((path for name in OPTIMIZERS if os.path.isfile(path := os.path.join(folder, name))), None)
    beside = os.path.join(folder, "optimizer_0")  # of FSDP
    if optimizer is not None:
        collect({"optimizer": load(optimizer)}, content, optimizer)
    elif os.path.isfile(os.path.join(beside, distributed.METADATA)):
        inside = Content()
        distributed.open_distributed(beside, inside)
        content.optimizers += inside.optimizers


def weight_files(path: str) -> list[str]:
    """Files that hold a checkpoint's weights: itself, or those of a folder. OpsigError where a folder names others."""
    if not os.path.isdir(path):
        found = MEMBER.fullmatch(path)
        return [found[1] if found and not os.path.exists(path) else path]
    match _kind(path):
        case "distributed":
            return sorted(each.path for each in os.scandir(path) if each.is_file() and each.name.endswith(".distcp"))
        case "deepspeed":
            return partitions.deepspeed_files(path)
        case "megatron":
            return partitions.megatron_files(path)
        case "orbax":
            return orbax_folders.files(path)
        case "inside":
            return weight_files(_inner(path) or "")
        case None:
            raise OpsigError(f"{path} holds neither {' nor '.join(WEIGHTS[:2])}")
    name = _weights(path) or ""
    if not name.endswith(".index.json"):
        return [os.path.join(path, name)]
    index = os.path.join(path, name)
    parts = array_files.read_json(index).get("weight_map")
    names = sorted({str(part) for part in parts.values()}) if isinstance(parts, dict) else []
    if not names or any(os.path.basename(part) != part or not part.endswith(SUFFIXES) for part in names):
        raise OpsigError(f"{index} does not list files of weights in its own folder")
    for part in names:
        if not os.path.isfile(os.path.join(path, part)):
            raise OpsigError(f"{path} lacks {part}, which its index names")
    return [os.path.join(path, part) for part in names]


@dataclass(frozen=True)
class Source:
    """A checkpoint's weights as files: their bytes, their SHA-256 in order of name, that of each by its path where it
    is known, and what in them is damaged."""

    bytes: int
    sha256: str
    damaged: str | None
    hashes: Mapping[str, str] = field(default_factory=dict)


def source_of(path: str, each: bool = False) -> Source:
    """Read a checkpoint's files once through, several checkpoints of one file once for all; `each`: sum up every file
    by itself, too.

    A part of a zip archive whose checksum is wrong is named: torch does not look at these where it maps a file. Raises
    OSError.
    """
    return _read_through(tuple((name, _stamp(name)) for name in weight_files(path)), each)


@lru_cache(maxsize=1)
def _read_through(files: tuple[tuple[str, tuple[int, ...]], ...], each: bool) -> Source:
    total, summed, damaged, hashes = 0, hashlib.sha256(), None, {}
    for number, (name, _) in enumerate(files):
        own = hashlib.sha256() if each and number else None  # of the first file both are the same
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                total += len(block)
                summed.update(block)
                if own is not None:
                    own.update(block)
        if own is not None or not number:
            hashes[os.path.abspath(name)] = (own or summed).hexdigest()
        if zipfile.is_zipfile(name) and not name.endswith(".distcp"):
            with contextlib.suppress(zipfile.BadZipFile, NotImplementedError, RuntimeError), zipfile.ZipFile(name) as z:
                damaged = damaged or z.testzip()
    return Source(total, summed.hexdigest(), damaged, hashes)

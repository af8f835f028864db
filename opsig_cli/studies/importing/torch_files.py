"""torch.save files, read without running code that they name.

A pickle names classes and functions, and loading calls them. Here torch's restricted unpickler makes tensors and plain
containers; the few other things that people keep in checkpoints become stand-ins from this module, so that even their
own classes are never called. Anything else is refused by name.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that torch.compile, FSDP and activation checkpointing put anywhere into a name."""
MAX_EXPANSION, SPARE_BYTES = 100, 64 << 20
"""An archive may unpack to so many times its size, and to this much in any case."""
REMEDY = "Save the model's state_dict() alone, with torch.save, and import that"


class Ignored:
    """Stands for an object whose content is of no use here: it takes everything and keeps nothing."""

    def __new__(cls, *_: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class PlainDict:
    """Stands for kinds of dictionaries: making one gives an empty dict, which the unpickler fills."""

    def __new__(cls, *_: Any) -> Any:
        return {}


class StoredDtype:
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


class StoredArray:
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
        values = np.frombuffer(data, dtype.numpy())
        return values.reshape(shape, order="F" if fortran else "C")


def _array(*_: Any) -> StoredArray:
    return StoredArray()


def _scalar(dtype: Any, data: Any) -> Any:
    try:
        return np.frombuffer(data, dtype.numpy())[0].item()
    except (ValueError, TypeError, AttributeError, IndexError):
        return None  # text and dates say nothing about a run


_NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_IGNORED = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in (
        "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"datetime.{kind}" for kind in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"builtins.{kind}" for kind in ("list", "dict", "int", "float", "str", "bool", "tuple", "frozenset", "slice")),
    "collections.deque",
    "fractions.Fraction",
    "decimal.Decimal",
    "uuid.UUID",
    "functools.partial",
    "torch.Generator",
)  # fmt: skip
_DICTS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
STAND_INS: list[Any] = [
    *((Ignored, name) for name in _IGNORED),
    *((PlainDict, name) for name in _DICTS),
    *((_scalar, f"{module}.scalar") for module in _NUMPY),
    *((_array, f"{module}._reconstruct") for module in _NUMPY),
    (StoredArray, "numpy.ndarray"),
    (StoredDtype, "numpy.dtype"),
]
"""What stands for what is named. torch's own tensors, devices, sizes, OrderedDict, Counter and set need none."""


def load(path: str) -> Any:
    """What a torch.save file holds: plain containers, numbers, tensors (mapped from the file where its format allows)
    and stand-ins. Raises OpsigError, in one line, where it is damaged, another kind of file, or needs other classes.
    """
    import torch

    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _check_stored(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or error}") from error
    except (MemoryError, OpsigError):
        raise
    except Exception as error:  # a malformed pickle can raise anything
        raise OpsigError(_explain(path, error)) from error


def check_expansion(archive: zipfile.ZipFile, path: str) -> None:
    """Raise OpsigError where an archive unpacks to far more than it is, as numbers of a run never do."""
    whole = sum(part.file_size for part in archive.infolist())
    if whole > MAX_EXPANSION * os.path.getsize(path) + SPARE_BYTES:
        raise OpsigError(f"{path} would unpack to {whole:,} bytes, more than {MAX_EXPANSION} times its size")


def _check_stored(path: str) -> None:
    """Raise OpsigError where tensors are compressed: torch maps the bytes as they lie, and takes them for weights."""
    with zipfile.ZipFile(path) as archive:
        check_expansion(archive, path)
        tensors = [part for part in archive.infolist() if "/data/" in part.filename]
        if any(part.compress_type != zipfile.ZIP_STORED for part in tensors):
            raise OpsigError(f"{path} holds compressed tensors, as torch.save writes none. Load it and save it again")


def _explain(path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "TorchScript" in text:
        return f"{path} is a TorchScript program, which is not run here. {REMEDY}"
    if found := re.search(r"GLOBAL ([\w.<>]+)", text):
        return f"{path} needs the class {found.group(1)}, which a data file is no reason to load. {REMEDY}"
    return f"{path} is not a readable torch.save file ({first_words(error)})"


def is_plain(value: Any) -> bool:
    """Whether this is a tensor of numbers in memory: not a sparse or a nested one, nor one without data."""
    import torch

    if not isinstance(value, torch.Tensor):
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested


def number_of(value: Any) -> int | float | None:
    """A number, or that in a tensor of one; None for anything else."""
    if is_plain(value) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def first_words(error: BaseException) -> str:
    """An error in a few words: its first sentence, without torch's advice on how to load code after all."""
    text = " ".join(str(error).split())
    if "WeightsUnpickler error:" in text:
        text = text.split("WeightsUnpickler error:")[1]
    text = re.split(r"(?<=[a-z0-9)])\. | Please | Check the documentation", text.strip())[0]
    return (f"{type(error).__name__}: {text}" if text else type(error).__name__)[:160]

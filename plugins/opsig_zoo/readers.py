"""Files that image data comes in: IDX, CIFAR-10's binary and python versions, and the shipped subset.

S images, (S, H, W, C) uint8. Data files are never trusted: sizes are checked and pickles may hold arrays only.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError

CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar.html"
MAX_BYTES = 1 << 30
"""No file of this kind holds more once it is unpacked; more is a decompression bomb."""


def read_idx(path: Path) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, gzipped or not.

    Raises OpsigError where the file is damaged or holds another type.
    """
    data = _unpacked(path)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != 8:
        raise OpsigError(f"{path} is not an IDX file of unsigned bytes")
    axes = data[3]
    start = 4 + 4 * axes
    if axes == 0 or len(data) < start:
        raise OpsigError(f"{path} is cut short: its header is not complete")
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes))
    if len(data) != start + math.prod(shape):
        raise OpsigError(f"{path} declares {shape} bytes of data and holds {len(data) - start}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def find_idx(root: Path, stem: str) -> Path:
    """The file of this stem under `root`, plain or gzipped. Raises OpsigError where there is neither."""
    for name in (stem, stem + ".gz", stem.replace("-idx", ".idx")):
        if (root / name).is_file():
            return root / name
    raise OpsigError(f"{root} has no {stem} or {stem}.gz. root=DIR must hold the four IDX files")


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise OpsigError(f"{path} is a damaged gzip file: {error}") from error
    if len(data) > MAX_BYTES:
        raise OpsigError(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB")
    return data


def read_cifar10(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's images (S, 32, 32, 3) and labels (S,) from a person's copy, its binary or its python version.

    Raises OpsigError where there is no copy, saying where to get one, or where a file is damaged.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for folder in (root, root / "cifar-10-batches-bin", root / "cifar-10-batches-py"):
        for suffix, read in ((".bin", _binary_batch), ("", _python_batch)):
            if (folder / (names[0] + suffix)).is_file():
                missing = [name for name in names if not (folder / (name + suffix)).is_file()]
                if missing:
                    raise OpsigError(f"{folder} lacks {missing[0]}{suffix}. Unpack the archive again")
                parts = [read(folder / (name + suffix)) for name in names]
                pixels = np.concatenate([images for images, _ in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                return np.ascontiguousarray(pixels), np.concatenate([labels for _, labels in parts])
    raise OpsigError(
        f"{root} holds no CIFAR-10. Unpack the binary or the python version there, from {CIFAR_HOME}, or give root=DIR"
    )


def _binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    data = np.frombuffer(path.read_bytes(), np.uint8)
    if data.size == 0 or data.size % 3073:
        raise OpsigError(f"{path} is not a CIFAR-10 batch: {data.size} bytes are not a multiple of 3073")
    rows = data.reshape(-1, 3073)
    return rows[:, 1:], _checked_labels(path, rows[:, 0])


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and nothing else: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
        ):  # fmt: skip
            return _reconstruct
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2 readers
            return _latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> np.ndarray:
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it builds something other than an array")
    return np.ndarray((0,), np.uint8)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding}")
    return text.encode("latin1")


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(path, "rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"])
    except Exception as error:  # a damaged pickle raises almost anything
        raise OpsigError(f"{path} is not a CIFAR-10 batch: {' '.join(str(error).split())}") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or labels.shape != images.shape[:1]:
        raise OpsigError(f"{path} is not a CIFAR-10 batch: it holds {images.dtype} {images.shape}")
    return images, _checked_labels(path, labels)


def _checked_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise OpsigError(f"{path} is not a CIFAR-10 batch: its labels are not 0 to 9")
    return labels.astype(np.int64)


def shipped(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file of the checkout's sample_data, which opsig installs beside its packages."""
    try:
        place = files("opsig_sample_data") / name
    except ModuleNotFoundError as error:
        raise OpsigError(f"this installation of opsig lacks {name}. Install opsig again, or give root=DIR") from error
    with place.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}

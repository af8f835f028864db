"""What the rows of a trajectory are made of: their places in the file, their bytes, fills and checksums."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from h5py import h5s  # pyright: ignore[reportAttributeAccessIssue]

from opsig_cli.trajectory.schema import FIELDS, Field


class Rows:
    """The rows of a group: their steps in the order of appending."""

    def __init__(self, steps: np.ndarray):
        self.steps: list[int] = steps.tolist()
        self._known = set(self.steps)
        self.in_order = bool(np.all(np.diff(steps) > 0))
        self._columns: dict[str, Any] | None = None
        self._order: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.steps)

    def __contains__(self, step: int) -> bool:
        return step in self._known

    def add(self, step: int) -> None:
        self.in_order = self.in_order and (not self.steps or step > self.steps[-1])
        self.steps.append(step)
        self._known.add(step)
        self._order = None

    def order(self) -> np.ndarray:
        """Places of the rows in order of step."""
        if self._order is None:
            self._order = np.argsort(np.array(self.steps, np.int64), kind="stable")
        return self._order

    def place(self, position: int) -> int:
        """Where in the file the row lies that is at this position in order of step."""
        return position if self.in_order else int(self.order()[position])

    def sorted_steps(self) -> np.ndarray:
        return np.sort(np.array(self.steps, np.int64))

    def columns(self, file: Any, group: str) -> dict[str, Any]:
        """The group's datasets with a row for every step, by name."""
        if self._columns is None:
            names = (name for name in FIELDS if name.startswith(group + "/"))
            self._columns = {name: file[name] for name in names if FIELDS[name].dims[0] == "step" and name in file}
        return self._columns


def write_row(dataset: Any, place: int, value: np.ndarray) -> None:
    """Extend the dataset to hold the row at `place` and write it; h5py's own indexing costs ten times this."""
    shape = (1, *value.shape)
    dataset.id.set_extent((place + 1, *value.shape))
    space = dataset.id.get_space()
    space.select_hyperslab((place, *(0 for _ in value.shape)), shape)
    dataset.id.write(h5s.create_simple(shape), space, value)


def write_fill(dataset: Any, place: int) -> None:
    """Write a row in which nothing was measured."""
    write_row(dataset, place, np.full(dataset.shape[1:], fill_of(dataset.dtype), dataset.dtype))


def as_array(value: Any) -> np.ndarray:
    """A value to be written, text as its bytes."""
    return np.asarray(value.encode() if isinstance(value, str) else value)


def column_checksum(name: str, value: np.ndarray) -> int:
    """crc32 of a dataset's name and of its bytes in one row."""
    if value.dtype.kind == "S":  # numpy drops a text's padding when it reads it
        return zlib.crc32(value.tobytes().rstrip(b"\0"), zlib.crc32(name.encode()))
    return zlib.crc32(value.tobytes() if value.ndim == 0 else value.data, zlib.crc32(name.encode()))


def fill_of(dtype: np.dtype) -> Any:
    """What stands where nothing was measured."""
    return Field("", (), dtype.kind + str(dtype.itemsize), "", "").fill


def stated_fill(dtype: np.dtype) -> Any:
    """The fill as an attribute of a new dataset. Text has HDF5's own, which is the same: netCDF4 overruns its memory
    on any other."""
    return None if dtype.kind == "S" else fill_of(dtype)


def is_fill(value: Any) -> bool:
    """Whether all of a row stands for nothing measured."""
    fill = fill_of(value.dtype)
    if fill != fill:
        first = value if value.ndim == 0 else value.flat[0] if value.size else fill
        return bool(np.isnan(first)) and bool(np.isnan(value).all())
    return bool(np.all(value == fill))


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16, ties to even, as its 16 bits in uint16.

    >>> from_bfloat16(to_bfloat16(np.array([1.0, 3.14159265], np.float32))).tolist()
    [1.0, 3.140625]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0xFFFF, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits, uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

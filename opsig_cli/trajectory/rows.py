"""What the rows of a trajectory are made of: their places in the file, their bytes, fills and checksums."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np
from h5py import h5s  # pyright: ignore[reportAttributeAccessIssue]

from opsig_cli.trajectory.schema import FIELDS, Field, field_of

SELDOM = 8
"""Times that steps may fall in the order of recording before that is taken for the way the run was recorded."""


class Rows:
    """The rows of a group: their steps by their places in the file, and which of them are presented, in order of step.

    A row that was left out, since it is damaged, keeps its place and is presented no more.
    """

    def __init__(self, steps: np.ndarray):
        self.steps: list[int] = steps.tolist()
        self._place = dict(zip(self.steps, range(len(self.steps)), strict=True))
        self._left_out: set[int] = set()
        self._columns: dict[str, Any] | None = None
        self._order: np.ndarray | None = None
        self._sorted: np.ndarray | None = None
        self._suspicious: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Places in the file, those of rows that were left out among them."""
        return len(self.steps)

    def __contains__(self, step: int) -> bool:
        return step in self._place

    def place_of(self, step: int) -> int:
        """Where in the file the row of this step lies; the next free place where there is none."""
        return self._place.get(step, self.count)

    def put(self, step: int, place: int) -> None:
        """The row of this step now lies at this place, which is one of its own or the next free one."""
        if place == self.count:
            self.steps.append(step)
        self._place[step] = place
        self._left_out.discard(place)
        self._order = self._sorted = self._suspicious = None

    def leave_out(self, places: np.ndarray) -> None:
        """Present these rows no more; their steps may be written anew."""
        self._left_out.update(places.tolist())
        self._order = self._sorted = self._suspicious = None

    @property
    def left_out(self) -> np.ndarray:
        """Places of the rows that were left out, increasing."""
        return np.array(sorted(self._left_out), np.int64)

    def is_left_out(self, step: int) -> bool:
        """Whether the row of this step is one that was left out."""
        return self._place.get(step) in self._left_out

    def order(self) -> np.ndarray:
        """Places of the rows that are presented, in order of step."""
        if self._order is None:
            order = np.argsort(np.array(self.steps, np.int64), kind="stable")
            self._order = order[~np.isin(order, list(self._left_out))] if self._left_out else order
        return self._order

    def sorted_steps(self) -> np.ndarray:
        """Steps of the rows that are presented, increasing, not to be written to."""
        if self._sorted is None:
            self._sorted = np.array(self.steps, np.int64)[self.order()]
            self._sorted.flags.writeable = False
        return self._sorted

    def impossible(self) -> np.ndarray:
        """Places of presented rows whose step is negative or also another's."""
        steps = self.sorted_steps()
        if not len(steps) or (steps[0] >= 0 and np.all(np.diff(steps) > 0)):
            return np.empty(0, np.int64)
        same = np.diff(steps) == 0
        odd = (steps < 0) | np.append(same, False) | np.insert(same, 0, False)
        return self.order()[odd]

    def suspicious(self) -> np.ndarray:
        """Places of presented rows whose step may not be what was written: those above, and rows on both sides of where
        the order of recording is not that of steps, as long as that is seldom."""
        if self._suspicious is None:
            places = np.sort(self.order())
            falls = np.flatnonzero(np.diff(np.array(self.steps, np.int64)[places]) < 0)
            beside = places[np.union1d(falls, falls + 1)] if len(falls) <= SELDOM else places[:0]
            self._suspicious = np.union1d(self.impossible(), beside)
        return self._suspicious

    def columns(self, file: Any, group: str) -> dict[str, Any]:
        """The group's datasets with a row for every step, by name."""
        if self._columns is None:
            names = known_names(file, group)
            self._columns = {name: file[name] for name in names if field_of(name).dims[0] == "step"}
        return self._columns


def known_names(file: Any, group: str | None = None) -> list[str]:
    """The schema's datasets that are in an open file, or in one group of it, in the schema's order."""
    there = set(file) if group is None else {group} & set(file)
    logged = sorted(f"logged/{name}" for name in file["logged"]) if "logged" in there else []
    names = [name for name in (*FIELDS, *logged) if name.split("/")[0] in there and name in file]
    return list(dict.fromkeys(names))


def consecutive(places: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of consecutive places begin and end, exclusive.

    >>> consecutive(np.array([4, 5, 6, 8, 2]))
    [(0, 3), (3, 4), (4, 5)]
    """
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    edges = [0, *cuts.tolist(), len(places)]
    return [(first, last) for first, last in pairwise(edges) if last > first]


def write_row(dataset: Any, place: int, value: np.ndarray, last: bool = True) -> None:
    """Write the row at `place`, the dataset's last one, or in place of another; h5py's own indexing costs ten times
    this."""
    shape = (1, *value.shape)
    if last:
        dataset.id.set_extent((place + 1, *value.shape))
    space = dataset.id.get_space()
    space.select_hyperslab((place, *(0 for _ in value.shape)), shape)
    dataset.id.write(h5s.create_simple(shape), space, value)


def fill_row(dataset: Any) -> np.ndarray:
    """A row in which nothing was measured."""
    return np.full(dataset.shape[1:], fill_of(dataset.dtype), dataset.dtype)


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

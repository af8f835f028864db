"""The trajectory file: open, read, append, commit.

T steps, S samples, P parameters, M chosen samples. A reader of the rest needs only `open_trajectory`,
`create_trajectory` and the methods of `Trajectory`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.schema import FIELDS, ROW_GROUPS, SCHEMA_VERSION, Field

BLOCK_BYTES = 32 << 20
"""Bound on the memory that one block of `Trajectory.blocks` takes."""


def create_trajectory(
    path: str | os.PathLike,
    samples: np.ndarray | Sequence[int],
    attributes: Mapping[str, Any] | None = None,
    *,
    replace: bool = False,
) -> Trajectory:
    """Start a new file for the samples with these indices, (S,) integers; `attributes` is its provenance.

    Raises OpsigError where the file exists (unless `replace`) or cannot be written.
    """
    if os.path.exists(path) and not replace:
        raise OpsigError(f"{path} exists. Continue it with --resume, or overwrite it with --replace")
    with _file_errors(path):
        file = h5py.File(path, "w", libver=("v110", "v110"))
    run = Trajectory(path, file)
    run.set_attributes(schema_version=".".join(map(str, SCHEMA_VERSION)), **(attributes or {}))
    run.write("sample", np.asarray(samples, np.int64))
    return run


def open_trajectory(path: str | os.PathLike, mode: str = "r") -> Trajectory:
    """Open a file for reading ("r") or for appending ("r+").

    Raises OpsigError where there is no such file, it is not a trajectory, or its schema is newer than this program.
    """
    if not os.path.exists(path):
        raise OpsigError(f"{path} does not exist")
    with _file_errors(path):
        file = h5py.File(path, mode, libver=("v110", "v110"), rdcc_nbytes=0)
    run = Trajectory(path, file)
    run._check_version()
    return run


class Trajectory:
    """One run's file. A context manager; rows appended since the last `commit` become readable together.

    Datasets are named by their path in the schema, as "losses/loss". A row group (`losses`, `scalars`,
    `checkpoints`, `sharpness`) has one row per recorded step; rows are always presented in increasing order of
    step, however they were appended.
    """

    def __init__(self, path: str | os.PathLike, file: h5py.File):
        self.path = os.fspath(path)
        self._file = file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what the file says of itself

    @property
    def attributes(self) -> dict[str, Any]:
        """The file's provenance as Python values."""
        return {
            key: json.loads(value) if key.endswith("_json") else _text(value) for key, value in self._file.attrs.items()
        }

    def set_attributes(self, **attributes: Any) -> None:
        """Set root attributes: text, numbers; a key that ends in `_json` takes any JSON value."""
        for key, value in attributes.items():
            if value is None:
                continue
            if key.endswith("_json"):
                value = json.dumps(value)
            self._file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value

    @property
    def samples(self) -> np.ndarray:
        """Dataset index of every sample, (S,) int64."""
        return self.read("sample")

    def has(self, name: str) -> bool:
        """Whether the dataset or group is in the file."""
        return name in self._file

    def require(self, name: str) -> None:
        """Raise OpsigError, naming the command that makes it, where the dataset is not in the file."""
        if not self.has(name):
            field = FIELDS[name]
            raise OpsigError(f"{self.path} has no {field.long_name} ({name}). Run: {field.made_by} {self.path}")

    def groups(self) -> list[str]:
        """Names of the groups in the file, sorted."""
        return sorted(name for name, item in self._file.items() if isinstance(item, h5py.Group))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dataset."""
        return self._file[name].shape

    # -- reading

    def read(self, name: str) -> np.ndarray:
        """A whole dataset; fixed-length strings come back as str objects."""
        self.require(name)
        values = self._file[name][()]
        return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values

    def steps(self, group: str) -> np.ndarray:
        """Steps recorded in a row group, increasing, (T,) int64; empty where the group is absent."""
        if group + "/step" not in self._file:
            return np.empty(0, np.int64)
        return np.sort(self._file[group + "/step"][()])

    def row(self, name: str, step: int) -> np.ndarray:
        """The row of one step, as (S,) or (P,). Raises OpsigError, naming the nearest steps, where it was not recorded."""
        self.require(name)
        group = _group_of(name)
        steps = self.steps(group)
        position = int(np.searchsorted(steps, step))
        if position == len(steps) or steps[position] != step:
            near = ", ".join(str(s) for s in steps[max(0, position - 1) : position + 1])
            raise OpsigError(f"{self.path} has no {group} at step {step}. Nearest: {near or 'none'}")
        return self.rows(name, position, position + 1)[0]

    def rows(self, name: str, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        """Rows `start:stop` in order of step, (stop - start, ...)."""
        self.require(name)
        order = self._order(_group_of(name))
        dataset = self._file[name]
        if order is None:
            return self._missing(name, dataset[start:stop, ..., columns] if dataset.ndim > 1 else dataset[start:stop])
        places = order[start:stop]
        ascending = np.argsort(places)
        values = dataset[places[ascending]][..., columns]
        back = np.empty_like(ascending)
        back[ascending] = np.arange(len(ascending))
        return self._missing(name, values[back])

    def series(self, name: str, positions: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Columns of chosen samples over time, (T, M); `positions` index the file's samples, (M,)."""
        self.require(name)
        positions = np.asarray(positions)
        parts = [rows[:, positions] for _, rows in self.blocks(name, start, stop)]
        return np.concatenate(parts) if parts else np.empty((0, len(positions)), np.float32)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive blocks of rows `start:stop` of at most BLOCK_BYTES: pairs of first position and rows."""
        self.require(name)
        dataset = self._file[name]
        stop = dataset.shape[0] if stop is None else stop
        row_bytes = max(1, int(np.prod(dataset.shape[1:])) * dataset.dtype.itemsize)
        height = max(1, BLOCK_BYTES // row_bytes)
        for first in range(start, stop, height):
            yield first, self.rows(name, first, min(first + height, stop))

    # -- writing

    def append(self, group: str, step: int, **columns: np.ndarray | float) -> None:
        """Add the row of one step to a row group; a column is `group/name`, "__" in a name standing for "/".

        Columns that the row lacks, and rows before a new column's first, hold the schema's fill. Raises OpsigError
        where the step is there already.
        """
        if step in self.steps(group):
            raise OpsigError(f"{self.path} already has {group} at step {step}")
        steps = self._dataset(FIELDS[group + "/step"], ())
        place = steps.shape[0]
        for name, value in columns.items():
            value = np.asarray(value)
            dataset = self._dataset(FIELDS[f"{group}/{name.replace('__', '/')}"], value.shape)
            dataset.resize(place + 1, axis=0)
            dataset[place] = value
        steps.resize(place + 1, axis=0)
        steps[place] = step  # step is written last: readers trust its length

    def write(self, name: str, values: np.ndarray, replace: bool = False) -> None:
        """Write a whole dataset of the schema. Raises OpsigError where it exists, unless `replace`."""
        field = FIELDS[name]
        if name in self._file:
            if not replace:
                raise OpsigError(f"{self.path} already has {name}. Overwrite it with --replace")
            del self._file[name]
        values = np.asarray(values)
        if field.dtype == "S*":
            values = np.char.encode(values.astype(str), "utf-8")
        elif "|" not in field.dtype:
            values = values.astype(field.dtype)
        dataset = self._file.create_dataset(name, data=values)
        _describe(dataset, field)

    def commit(self) -> None:
        """Make everything since the last commit readable, together."""
        with _file_errors(self.path):
            self._file.flush()

    def close(self) -> None:
        """Commit and close."""
        with _file_errors(self.path):
            self._file.close()

    # -- inside

    def _check_version(self) -> None:
        version = _text(self._file.attrs.get("schema_version", ""))
        if not version:
            raise OpsigError(f"{self.path} is HDF5 but not an opsig trajectory (it states no schema_version)")
        if int(str(version).split(".")[0]) > SCHEMA_VERSION[0]:
            ours = ".".join(map(str, SCHEMA_VERSION))
            raise OpsigError(
                f"{self.path} has trajectory schema {version}; this opsig reads up to {ours}. Update opsig"
            )

    def _order(self, group: str) -> np.ndarray | None:
        steps = self._file[group + "/step"][()]
        return None if np.all(np.diff(steps) > 0) else np.argsort(steps)

    def _missing(self, name: str, values: np.ndarray) -> np.ndarray:
        """Unsigned integers become int64 with -1 for the fill."""
        if values.dtype.kind != "u" or "|" not in FIELDS[name].dtype:
            return values
        fill = 2 ** (8 * values.dtype.itemsize) - 1
        return np.where(values == fill, np.int64(-1), values.astype(np.int64))

    def _dataset(self, field: Field, shape: tuple[int, ...]) -> h5py.Dataset:
        if field.path in self._file:
            return self._file[field.path]
        width = int(np.prod(shape)) if shape else 1
        dtype = field.dtype
        if "|" in dtype:
            dtype = "u1" if self.has("class_name") and self.shape("class_name")[0] < 255 else "i4"
        chunks = (64, min(1024, width)) if "sample" in field.dims else (1, min(1 << 18, width)) if shape else (1024,)
        dataset = self._file.create_dataset(
            field.path, (0, *shape), maxshape=(None, *shape), dtype=dtype, chunks=chunks, fillvalue=_fill(dtype)
        )
        _describe(dataset, field)
        return dataset


def _fill(dtype: str) -> Any:
    return Field("", (), dtype, "", "").fill


def _describe(dataset: h5py.Dataset, field: Field) -> None:
    dataset.attrs["long_name"] = np.bytes_(field.long_name.encode())
    dataset.attrs["units"] = np.bytes_(field.units.encode())


def _group_of(name: str) -> str:
    group = name.split("/")[0]
    assert group in ROW_GROUPS, name
    return group


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _file_errors(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise OpsigError(f"{path}: the disk is full. Free some space and continue with --resume") from error
        if "file signature not found" in str(error) or "truncated" in str(error):
            raise OpsigError(f"{path} is not a readable HDF5 file") from error
        raise OpsigError(f"{path}: {' '.join(str(error).split())}") from error

"""The trajectory file: open, read, append, commit.

T steps, S samples, P parameters, M chosen samples. A reader of the rest needs only `open_trajectory`,
`create_trajectory` and the methods of `Trajectory`. How commits become durable is `store.py`'s concern.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.chunks import Chunks
from opsig_cli.trajectory.rows import (
    Rows,
    as_array,
    column_checksum,
    fill_of,
    from_bfloat16,
    is_fill,
    stated_fill,
    write_fill,
    write_row,
)
from opsig_cli.trajectory.schema import DIMENSIONS, FIELDS, ROW_GROUPS, SCHEMA_VERSION, Field, dimension
from opsig_cli.trajectory.store import RedoFile, SnapshotFile, writer_of
from opsig_cli.trajectory.vetting import Refused, vet

BLOCK_BYTES = 16 << 20
"""Bound on the memory that one block of `Trajectory.blocks` takes."""

WIDE = 200_000
"""Samples from which on losses are kept in wider and lower chunks."""


def create_trajectory(
    path: str | os.PathLike,
    samples: np.ndarray | Sequence[int],
    attributes: Mapping[str, Any] | None = None,
    *,
    replace: bool = False,
) -> Trajectory:
    """Start a new file for the samples with these indices, (S,) integers; `attributes` is its provenance.

    Raises OpsigError where the file exists (unless `replace`), is being written, or cannot be written.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not replace:
        raise OpsigError(f"{path} exists. Continue it with --resume, or overwrite it with --replace")
    with _file_errors(path):
        store = RedoFile(path, create=True)
    run = Trajectory(path, h5py.File(store, "w", libver=("v110", "v110"), rdcc_nbytes=0), store)
    run.set_attributes(schema_version=".".join(map(str, SCHEMA_VERSION)), **(attributes or {}))
    run.write("sample", np.asarray(samples, np.int64))
    return run


def open_trajectory(path: str | os.PathLike, mode: str = "r") -> Trajectory:
    """Open a file for reading ("r": one consistent state, also while it is written) or for appending ("r+").

    Raises OpsigError where there is no such file, it is not a trajectory, its schema is newer than this program, it is
    damaged or could reach outside itself, or, for appending, another process writes to it.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise OpsigError(f"{path} does not exist")
    run = _open_snapshot(path)
    if mode == "r":
        return run
    run.abort()
    with _file_errors(path):
        store = RedoFile(path)
    return Trajectory(path, h5py.File(store, "r+", libver=("v110", "v110"), rdcc_nbytes=0), store)


def _open_snapshot(path: str) -> Trajectory:
    with _file_errors(path):
        store = SnapshotFile(path)
    try:
        with _file_errors(path):
            file = h5py.File(store, "r", rdcc_nbytes=0)
        run = Trajectory(path, file, store)
        with run._damage("its structure"):
            vet(file, store.size, FIELDS)
            run._check_version()
            run._check_shapes()
        return run
    except Refused as refusal:
        store.close()
        raise OpsigError(f"{path} is refused: {refusal}") from refusal
    except BaseException:
        store.close()
        raise


class Trajectory:
    """One run's file. A context manager; rows appended since the last `commit` become readable together.

    Leaving it after an error drops what was not committed. Datasets are named by their path in the schema, as
    "losses/loss". A row group (`losses`, `scalars`, `checkpoints`, `sharpness`) has one row per recorded step; rows are
    always presented in increasing order of step, however they were appended.
    """

    def __init__(self, path: str, file: h5py.File, store: SnapshotFile):
        self.path = path
        self._file: Any = file  # h5py's items are untyped
        self._store = store
        self._groups: dict[str, Rows] = {}
        self._chunks: dict[str, Chunks | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    # -- what the file says of itself

    @property
    def attributes(self) -> dict[str, Any]:
        """The file's provenance as Python values."""
        with self._damage("an attribute"):
            return {
                key: json.loads(value) if key.endswith("_json") else _text(value)
                for key, value in self._file.attrs.items()
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
            how = "Record it in a run of its own: opsig train, or opsig import CHECKPOINT... --task TASK"
            if field.made_by:
                how = f"Run: {field.made_by} {self.path}"
            raise OpsigError(f"{self.path} lacks {name} ({field.long_name}). {how}")

    def groups(self) -> list[str]:
        """Names of the groups in the file, sorted."""
        return sorted(name for name, item in self._file.items() if isinstance(item, h5py.Group))

    def names(self) -> list[str]:
        """Names of the schema's datasets that are in the file, in the schema's order."""
        return [name for name in FIELDS if self.has(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dataset."""
        return self._file[name].shape

    # -- reading

    def read(self, name: str) -> np.ndarray:
        """A whole dataset; fixed-length strings come back as str objects. Raises OpsigError where it is damaged."""
        self.require(name)
        with self._damage(name):
            dataset = self._file[name]
            values = dataset[()]
            checksum = dataset.attrs.get("checksum")
            if checksum is not None and checksum != zlib.crc32(values.tobytes()):
                raise ValueError("its checksum is wrong")
            return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values

    def steps(self, group: str) -> np.ndarray:
        """Steps recorded in a row group, increasing, (T,) int64; empty where the group is absent."""
        return self._rows(group).sorted_steps()

    def row(self, name: str, step: int) -> np.ndarray:
        """The row of one step, (S,) or (P,), checked against its checksum.

        Raises OpsigError, naming the nearest steps, where it was not recorded, or where it is damaged.
        """
        self.require(name)
        group = _group_of(name)
        steps = self.steps(group)
        position = int(np.searchsorted(steps, step))
        if position == len(steps) or steps[position] != step:
            near = ", ".join(str(s) for s in steps[max(0, position - 1) : position + 1])
            raise OpsigError(f"{self.path} has no {group} at step {step}. Nearest: {near or 'none'}")
        self._check_row(group, self._rows(group).place(position))
        return self.rows(name, position, position + 1)[0]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` in order of step, (stop - start, ...)."""
        self.require(name)
        rows = self._rows(_group_of(name))
        stop = min(stop, rows.count)
        with self._damage(name):
            if rows.in_order:
                return self._missing(name, self._read_rows(name, start, stop))
            places = rows.order()[start:stop]
            ascending = np.argsort(places)
            values = self._file[name][places[ascending]]
            back = np.empty_like(ascending)
            back[ascending] = np.arange(len(ascending))
            return self._missing(name, values[back])

    def check(self, group: str, positions: np.ndarray) -> None:
        """Hold rows, by their place in order of step, (N,), against their checksums; OpsigError where they differ."""
        rows = self._rows(group)
        for position in np.unique(positions).tolist():
            self._check_row(group, rows.place(position))

    def series(self, name: str, positions: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Columns of chosen samples over time, (T, M); `positions` index the file's samples, (M,)."""
        self.require(name)
        rows = self._rows(_group_of(name))
        stop = rows.count if stop is None else min(stop, rows.count)
        positions = np.asarray(positions)
        chunks = self._chunks_of(name)
        if rows.in_order and chunks is not None:
            with self._damage(name):
                return self._missing(name, chunks.columns(positions, start, stop))
        parts = [values[:, positions] for _, values in self.blocks(name, start, stop)]
        return np.concatenate(parts) if parts else np.empty((0, len(positions)), np.float32)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive blocks of rows `start:stop` of at most BLOCK_BYTES: pairs of first position and rows.

        One array may serve all blocks: copy what you keep of it.
        """
        self.require(name)
        dataset = self._file[name]
        rows = self._rows(_group_of(name))
        stop = rows.count if stop is None else stop
        height = max(1, BLOCK_BYTES // max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize))
        if dataset.chunks and height > dataset.chunks[0]:
            height -= height % dataset.chunks[0]
        chunks = self._chunks_of(name) if rows.in_order else None
        buffer = (
            None if chunks is None else np.empty((min(height, max(0, stop - start)), *dataset.shape[1:]), dataset.dtype)
        )
        first = start
        while first < stop:
            last = min(first - first % height + height, stop)
            if chunks is None or buffer is None:
                yield first, self.rows(name, first, last)
            else:
                with self._damage(name):
                    chunks.read_into(buffer, first, last)
                yield first, self._missing(name, buffer[: last - first])
            first = last

    # -- writing

    def append(self, group: str, step: int, **columns: np.ndarray | float) -> None:
        """Add the row of one step to a row group; a column is `group/name`, "__" in a name standing for "/".

        Columns that the row lacks, and rows before a new column's first, hold the schema's fill. Raises OpsigError
        where the step is there already.
        """
        rows = self._rows(group)
        if step in rows:
            raise OpsigError(f"{self.path} already has {group} at step {step}")
        place = rows.count
        given = {f"{group}/{name.replace('__', '/')}": as_array(value) for name, value in columns.items()}
        given |= {f"{group}/step": np.asarray(step)}
        checksum = 0
        for name, value in given.items():
            dataset = self._column(FIELDS[name], value, place)
            value = np.asarray(value, dataset.dtype, order="C")  # text longer than its field loses its end
            write_row(dataset, place, value)
            if not is_fill(value):
                checksum ^= column_checksum(name, value)
        for name in rows.columns(self._file, group).keys() - given.keys() - {f"{group}/checksum"}:
            write_fill(rows.columns(self._file, group)[name], place)
        crc = np.asarray(checksum, np.uint32)
        write_row(self._column(FIELDS[f"{group}/checksum"], crc, place), place, crc)
        rows.add(step)

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
        self._describe(dataset, field)
        dataset.attrs["checksum"] = np.uint32(zlib.crc32(values.tobytes()))

    def remove(self, group: str) -> None:
        """Remove a row group with everything in it."""
        if group in self._file:
            del self._file[group]
        self._groups.pop(group, None)

    def copy_packed(self, other: Trajectory) -> None:
        """Copy everything of another run into this new one: rows in order of step, shuffled and deflated.

        Attributes, and groups that the schema does not know, come along. Commits as it goes.
        """
        for key, value in other._file.attrs.items():
            self._file.attrs[key] = value
        for name in other.names():
            field = FIELDS[name]
            if field.dims[0] == "step":
                self._copy_rows(other, field)
            elif name not in self._file:
                self.write(name, other.read(name))
            self.commit()
        scales = {name for group, name in DIMENSIONS if not group}
        for name in other._file:
            if name not in self._file and name not in scales:
                self._file.copy(other._file[name], self._file, name)

    def _copy_rows(self, other: Trajectory, field: Field) -> None:
        rows, source = other._rows(field.path.split("/")[0]), other._file[field.path]
        order = rows.order()
        height = max(1, min(64 if source.ndim > 1 else 1024, BLOCK_BYTES // max(1, math.prod(source.shape[1:]) * 8)))
        target = self._file.create_dataset(
            field.path, (rows.count, *source.shape[1:]), maxshape=(None, *source.shape[1:]), dtype=source.dtype,
            chunks=(min(height, max(1, rows.count)), *(min(n, 1 << 14) for n in source.shape[1:])),
            fillvalue=stated_fill(source.dtype), shuffle=True, compression="gzip", compression_opts=4,
        )  # fmt: skip
        self._describe(target, field)
        for first in range(0, rows.count, target.chunks[0]):
            places = order[first : first + target.chunks[0]]
            ascending = np.argsort(places)
            back = np.empty_like(ascending)
            back[ascending] = np.arange(len(ascending))
            target[first : first + len(places)] = source[places[ascending]][back]

    def commit(self) -> None:
        """Make everything since the last commit durable and readable, together.

        Raises OpsigError on a full disk, with nothing lost: it can be called again.
        """
        assert isinstance(self._store, RedoFile)
        with _file_errors(self.path):
            self._file.flush()
            self._store.commit()

    def close(self) -> None:
        """Commit and close; a file that was written is one plain HDF5 file afterwards."""
        if isinstance(self._store, RedoFile):
            try:
                with _file_errors(self.path):
                    self._file.close()
                    self._store.commit()
            finally:
                self._store.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Close and drop what was not committed."""
        self._file.close()
        self._store.close()

    # -- inside

    def _check_version(self) -> None:
        version = str(_text(self._file.attrs.get("schema_version", "")))
        if not version:
            raise OpsigError(f"{self.path} is HDF5 but not an opsig trajectory (it states no schema_version)")
        if int(version.split(".")[0]) > SCHEMA_VERSION[0]:
            ours = ".".join(map(str, SCHEMA_VERSION))
            raise OpsigError(
                f"{self.path} has trajectory schema {version}; this opsig reads up to {ours}. Update opsig"
            )

    def _check_shapes(self) -> None:
        """Raise OpsigError where a dataset is not what the schema says: its type, its dimensions, or their lengths."""
        lengths: dict[tuple[str, str], int] = {}
        for name, field in FIELDS.items():
            if name not in self._file:
                continue
            dataset = self._file[name]
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim != len(field.dims):
                raise OpsigError(f"{self.path}: {name} must have the dimensions {', '.join(field.dims)}")
            if dataset.dtype.kind not in {kind[0] for kind in field.dtype.split("|")}:
                raise OpsigError(f"{self.path}: {name} must be {field.dtype}, not {dataset.dtype}")
            for axis, length in zip(field.dims, dataset.shape, strict=True):
                expected = lengths.setdefault(dimension(field, axis), length)
                if length < expected or (length != expected and axis != "step"):
                    raise OpsigError(f"{self.path}: {name} has {length} along {axis}, where {expected} are expected")

    def _rows(self, group: str) -> Rows:
        if group not in self._groups:
            with self._damage(f"{group}/step"):
                name = f"{group}/step"
                steps = self._file[name][()] if name in self._file else np.empty(0, np.int64)
                self._groups[group] = Rows(steps)
        return self._groups[group]

    def _check_row(self, group: str, place: int) -> None:
        """Raise OpsigError where the row at this place of the file does not have the checksum stored with it."""
        if self.has(f"{group}/checksum"):
            with self._damage(f"{group} at step {self._rows(group).steps[place]}"):
                if self.row_checksum(group, place) != self._file[f"{group}/checksum"][place]:
                    raise ValueError("its checksum is wrong")

    def damaged_steps(self, group: str) -> list[int]:
        """Steps of a row group whose stored row does not have the checksum stored with it, increasing."""
        rows = self._rows(group)
        with self._damage(f"{group}/checksum"):
            stored = self._file[f"{group}/checksum"][()][: rows.count]
        computed = np.zeros(rows.count, np.uint32)
        intact = np.ones(rows.count, bool)
        for name, dataset in rows.columns(self._file, group).items():
            if name == f"{group}/checksum":
                continue
            height = dataset.chunks[0]
            for first in range(0, rows.count, height):
                last = min(first + height, rows.count)
                try:
                    values = self._read_rows(name, first, last)
                except (OSError, RuntimeError, ValueError):
                    intact[first:last] = False
                    continue
                for place, value in enumerate(values, first):
                    if not is_fill(value):
                        computed[place] ^= column_checksum(name, np.ascontiguousarray(value))
        bad = ~intact | (computed != stored)
        return sorted(np.array(rows.steps)[bad].tolist())

    def row_checksum(self, group: str, place: int) -> int:
        """The checksum of what the file holds in the row at this place, in the order of appending."""
        checksum = 0
        for name, dataset in self._rows(group).columns(self._file, group).items():
            value = dataset[place]
            if name != f"{group}/checksum" and not is_fill(value):
                checksum ^= column_checksum(name, np.ascontiguousarray(value))
        return checksum

    def _read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        chunks = self._chunks_of(name)
        return self._file[name][start:stop] if chunks is None else chunks.rows(start, stop)

    def _chunks_of(self, name: str) -> Chunks | None:
        """The dataset's chunks for reading past HDF5, where they lie in the file as they are."""
        if name not in self._chunks:
            plain = not isinstance(self._store, RedoFile) and not self._store.overlay.extents
            dataset = self._file[name]
            usable = (
                plain and dataset.ndim == 2 and dataset.chunks and dataset.id.get_create_plist().get_nfilters() == 0
            )
            self._chunks[name] = Chunks(self._store.fd, dataset) if usable else None
        return self._chunks[name]

    def _missing(self, name: str, values: np.ndarray) -> np.ndarray:
        """bfloat16 becomes float32, and unsigned integers int64 with -1 for the fill."""
        if values.dtype.kind != "u" or "|" not in FIELDS[name].dtype:
            return values
        if FIELDS[name].dtype == "f4|u2":
            return from_bfloat16(values)
        return np.where(values == fill_of(values.dtype), np.int64(-1), values.astype(np.int64))

    def _column(self, field: Field, value: np.ndarray, place: int) -> Any:
        """The dataset for rows like `value`, made where it is new: the rows before `place` hold the fill."""
        rows = self._rows(field.path.split("/")[0])
        known = rows.columns(self._file, field.path.split("/")[0])
        if field.path in known:
            return known[field.path]
        shape, width = value.shape, value.size
        dtype = field.dtype
        if dtype == "f4|u2":
            dtype = "u2" if value.dtype == np.uint16 else "f4"
        elif "|" in dtype:
            dtype = "u1" if self.has("class_name") and self.shape("class_name")[0] < 255 else "i4"
        if "sample" in field.dims:
            chunks = (64, min(1024, width)) if width < WIDE else (16, 16384)
        else:
            chunks = (1, min(1 << 18, width)) if shape else (1024,)
        dataset = self._file.create_dataset(
            field.path, (0, *shape), maxshape=(None, *shape), dtype=dtype, chunks=chunks,
            fillvalue=stated_fill(np.dtype(dtype)), fill_time="never" if "sample" in field.dims else "ifset",
        )  # fmt: skip
        self._describe(dataset, field)
        known[field.path] = dataset
        for row in range(place):
            write_fill(dataset, row)
        return dataset

    def _describe(self, dataset: Any, field: Field) -> None:
        """Meaning, unit and named dimensions, by the attributes that netCDF4 reads them from."""
        dataset.attrs["long_name"] = np.bytes_(field.long_name.encode())
        dataset.attrs["units"] = np.bytes_(field.units.encode())
        used = [dimension(field, name) for name in field.dims]
        for (group, name), length in zip(used, dataset.shape, strict=True):
            place = f"{group}/{name}".lstrip("/")
            if place == field.path:
                _make_scale(dataset, group, name, name)
            elif place not in self._file and name != "step":
                scale = self._file.create_dataset(place, (length,), "u1")
                _make_scale(scale, group, name, f"This is a netCDF dimension but not a netCDF variable.{length:10d}")
        if len(used) > 1 or used[0][0] != field.path.rpartition("/")[0]:
            dataset.attrs["_Netcdf4Coordinates"] = np.array([DIMENSIONS.index(d) for d in used], np.int32)
        if field.path.split("/")[-1] not in [name for _, name in used]:
            dataset.attrs["_Netcdf4Dimid"] = np.int32(DIMENSIONS.index(used[0]))

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Whatever HDF5 raises on a damaged file becomes one line."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise OpsigError(
                f"{self.path}: {what} is damaged: {reason}. See what is intact: opsig verify {self.path}"
            ) from error


def _make_scale(dataset: Any, group: str, name: str, words: str) -> None:
    dataset.make_scale(words)
    dataset.attrs["_Netcdf4Dimid"] = np.int32(DIMENSIONS.index((group, name)))


def _group_of(name: str) -> str:
    group = name.split("/")[0]
    assert group in ROW_GROUPS, name
    return group


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def _file_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OpsigError(f"{path}: the disk is full. Free some space and continue with --resume") from error
        reason = " ".join(str(error).split())
        if "file signature not found" in reason and (writer := writer_of(path)):
            raise OpsigError(f"{path} is only being created, by {writer}. Try again in a moment") from error
        if "file signature not found" in reason or "truncated" in reason:
            raise OpsigError(f"{path} is not a readable HDF5 file") from error
        raise OpsigError(f"{path}: {error.strerror or reason}") from error

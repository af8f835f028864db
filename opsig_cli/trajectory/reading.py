"""A trajectory file as its readers see it: provenance, datasets, rows in order of step, blocks, and their checksums.

T steps, S samples, P parameters, M chosen samples.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.chunks import Chunks
from opsig_cli.trajectory.rows import Rows, column_checksum, fill_of, from_bfloat16, is_fill
from opsig_cli.trajectory.schema import FIELDS, ROW_GROUPS, SCHEMA_VERSION, dimension
from opsig_cli.trajectory.snapshot import SnapshotFile
from opsig_cli.trajectory.store import RedoFile

BLOCK_BYTES = 16 << 20
"""Bound on the memory that one block of `Reading.blocks` takes."""


class Reading:
    """What can be read of one run's file. Datasets are named by their path in the schema, as "losses/loss".

    A row group (`losses`, `scalars`, `checkpoints`, `sharpness`) has one row per recorded step; rows are always
    presented in increasing order of step, however they were appended.
    """

    def __init__(self, path: str, file: h5py.File, store: SnapshotFile):
        self.path = path
        self._file: Any = file  # h5py's items are untyped
        self._store = store
        self._groups: dict[str, Rows] = {}
        self._chunks: dict[str, Chunks | None] = {}
        self._frozen: np.ndarray | None = None

    # -- what the file says of itself

    @property
    def attributes(self) -> dict[str, Any]:
        """The file's provenance as Python values."""
        with self.damage("an attribute"):
            return {
                key: json.loads(value) if key.endswith("_json") else as_value(value)
                for key, value in self._file.attrs.items()
            }

    @property
    def writable(self) -> bool:
        """Whether rows can be appended."""
        return isinstance(self._store, RedoFile)

    @property
    def samples(self) -> np.ndarray:
        """Dataset index of every sample, (S,) int64."""
        return self.read("sample")

    @property
    def frozen(self) -> np.ndarray:
        """The parameters that are not trained, (F,) float32, empty where all are: one array, read once."""
        if self._frozen is None and self.has("frozen/params"):
            self._frozen = self.read("frozen/params")
            self._frozen.flags.writeable = False
        return np.empty(0, np.float32) if self._frozen is None else self._frozen

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
        with self.damage(name):
            dataset = self._file[name]
            values = dataset[()]
            checksum = dataset.attrs.get("checksum")
            if checksum is not None and checksum != zlib.crc32(values.tobytes()):
                raise ValueError("its checksum is wrong")
            return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values

    def steps(self, group: str) -> np.ndarray:
        """Steps recorded in a row group, increasing, (T,) int64; empty where the group is absent."""
        return self._rows(group).sorted_steps()

    def losses(self) -> np.ndarray:
        """Every sample's loss at every recorded step, in order of step, (T, S) float32; NaN where not measured."""
        return self.rows("losses/loss", 0, len(self.steps("losses")))

    def row(self, name: str, step: int) -> np.ndarray:
        """The row of one step, (S,) or (P,), checked against its checksum.

        Raises OpsigError, naming the nearest steps, where it was not recorded, or where it is damaged.
        """
        self.require(name)
        group = group_of(name)
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
        rows = self._rows(group_of(name))
        stop = min(stop, rows.count)
        with self.damage(name):
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
        rows = self._rows(group_of(name))
        stop = rows.count if stop is None else min(stop, rows.count)
        positions = np.asarray(positions)
        chunks = self._chunks_of(name)
        if rows.in_order and chunks is not None:
            with self.damage(name):
                return self._missing(name, chunks.columns(positions, start, stop))
        parts = [values[:, positions] for _, values in self.blocks(name, start, stop)]
        return np.concatenate(parts) if parts else np.empty((0, len(positions)), np.float32)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive blocks of rows `start:stop` of at most BLOCK_BYTES: pairs of first position and rows.

        Each block is an array of its own: what is kept of one is not overwritten by the next.
        """
        self.require(name)
        dataset = self._file[name]
        stop = self._rows(group_of(name)).count if stop is None else stop
        height = max(1, BLOCK_BYTES // max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize))
        if dataset.chunks and height > dataset.chunks[0]:
            height -= height % dataset.chunks[0]
        first = start
        while first < stop:
            last = min(first - first % height + height, stop)
            yield first, self.rows(name, first, last)
            first = last

    # -- is it whole

    def damaged_steps(self, group: str) -> list[int]:
        """Steps of a row group whose stored row does not have the checksum stored with it, increasing."""
        rows = self._rows(group)
        with self.damage(f"{group}/checksum"):
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

    def check_version(self) -> None:
        version = str(as_value(self._file.attrs.get("schema_version", "")))
        if not version:
            raise OpsigError(f"{self.path} is HDF5 but not an opsig trajectory (it states no schema_version)")
        if int(version.split(".")[0]) > SCHEMA_VERSION[0]:
            ours = ".".join(map(str, SCHEMA_VERSION))
            raise OpsigError(
                f"{self.path} has trajectory schema {version}; this opsig reads up to {ours}. Update opsig"
            )

    def check_shapes(self) -> None:
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

    def _check_row(self, group: str, place: int) -> None:
        """Raise OpsigError where the row at this place of the file does not have the checksum stored with it."""
        if self.has(f"{group}/checksum"):
            with self.damage(f"{group} at step {self._rows(group).steps[place]}"):
                if self.row_checksum(group, place) != self._file[f"{group}/checksum"][place]:
                    raise ValueError("its checksum is wrong")

    # -- inside

    def _rows(self, group: str) -> Rows:
        if group not in self._groups:
            with self.damage(f"{group}/step"):
                name = f"{group}/step"
                steps = self._file[name][()] if name in self._file else np.empty(0, np.int64)
                self._groups[group] = Rows(steps)
        return self._groups[group]

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

    @contextmanager
    def damage(self, what: str) -> Iterator[None]:
        """Whatever HDF5 raises on a damaged file becomes one line."""
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise OpsigError(
                f"{self.path}: {what} is damaged: {reason}. See what is intact: opsig verify {self.path}"
            ) from error


def group_of(name: str) -> str:
    group = name.split("/")[0]
    assert group in ROW_GROUPS, name
    return group


def as_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value

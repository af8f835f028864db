"""The trajectory file: open, append, commit.

T steps, S samples, P parameters, M chosen samples. A reader of the rest needs only `open_trajectory`,
`create_trajectory`, and the methods of `Trajectory` and of what it stands on, `Reading`. How commits become durable is
`store.py`'s concern.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import frames
from opsig_cli.trajectory.conforming import check_shapes, check_version
from opsig_cli.trajectory.datasets import as_value
from opsig_cli.trajectory.identity import create_stamp, is_run_id, new_run_id, place_of_stamp
from opsig_cli.trajectory.locks import writer_of
from opsig_cli.trajectory.naming import describe
from opsig_cli.trajectory.pending import NEW_SUFFIX
from opsig_cli.trajectory.reading import Reading
from opsig_cli.trajectory.redo_log import LOG_SUFFIX
from opsig_cli.trajectory.rows import as_array, column_checksum, fill_row, is_fill, stated_fill, write_row
from opsig_cli.trajectory.schema import FIELDS, ROW_GROUPS, SCHEMA_VERSION, Field, field_of, is_known, is_wide
from opsig_cli.trajectory.snapshot import SnapshotFile
from opsig_cli.trajectory.store import RedoFile
from opsig_cli.trajectory.vetting import Refused, vet

if TYPE_CHECKING:
    import pandas
    import xarray

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
    path = _followed(path)
    check_new(path, replace)
    stated = dict(attributes or {})
    if not is_run_id(stated.get("run_id")):
        stated["run_id"] = new_run_id()
    with file_errors(path):
        store = RedoFile(path, create=True)
        try:
            run = Trajectory(path, h5py.File(store, "w", libver=("v110", "v110"), rdcc_nbytes=0), store)
            run.set_attributes(schema_version=".".join(map(str, SCHEMA_VERSION)), **stated)
            run.write("sample", np.asarray(samples, np.int64))
            store.stamp_at(create_stamp(run._file, stated["run_id"]), stated["run_id"])
            run.commit()
        except BaseException:
            store.close()
            raise
    return run


def check_new(path: str, replace: bool) -> None:
    """Raise OpsigError where a new file would take the place of another, unless `replace`."""
    if os.path.exists(path) and not replace:
        raise OpsigError(f"{path} exists. Continue it with --resume, or overwrite it with --replace")


def open_trajectory(path: str | os.PathLike, mode: str = "r") -> Trajectory:
    """Open a file for reading ("r": one consistent state, also while it is written) or for appending ("r+").

    Raises OpsigError where there is no such file, it is not a trajectory, its schema is newer than this program, it is
    damaged or could reach outside itself, or, for appending, another process writes to it.
    """
    path = _followed(path)
    if not os.path.exists(path):
        if writer := writer_of(path):
            raise OpsigError(f"{path} is only being created, by {writer}. Try again in a moment")
        raise OpsigError(f"{path} does not exist")
    run = _open_snapshot(path)
    if mode == "r":
        return run
    with run.damage("the stamp of its last commit"):
        run_id, place = as_value(run._file.attrs.get("run_id")), place_of_stamp(run._file)
        there = os.fstat(run._store.fd)
    run.abort()
    with file_errors(path):
        store = RedoFile(path, stamp=place or 0, like=there)
        try:
            run = Trajectory(path, h5py.File(store, "r+", libver=("v110", "v110"), rdcc_nbytes=0), store)
            if place is None or not is_run_id(run_id):  # a file of schema 1.0 becomes one of this version
                run_id = new_run_id()
                run.set_attributes(run_id=run_id, schema_version=".".join(map(str, SCHEMA_VERSION)))
                place = create_stamp(run._file, run_id) if place is None else place
            store.stamp_at(place, run_id)
        except BaseException:
            store.let_go()
            raise
    return run


def _followed(path: str | os.PathLike) -> str:
    """The file that a link leads to: its log lies beside it, whatever the name by which it is opened."""
    path = os.fspath(path)
    return os.path.realpath(path) if os.path.islink(path) else path


def cut_off_at_birth(path: str) -> bool:
    """Whether a writer was killed before the file had its name, which it gets with its first commit."""
    left = (path + LOG_SUFFIX, path + NEW_SUFFIX)
    return not os.path.exists(path) and any(map(os.path.exists, left)) and writer_of(path) is None


def _open_snapshot(path: str) -> Trajectory:
    with file_errors(path):
        store = SnapshotFile(path)
    try:
        with file_errors(path):
            file = h5py.File(store, "r", rdcc_nbytes=0)
        run = Trajectory(path, file, store)
        with run.damage("its structure"):
            vet(file, store.size, is_known)
            check_version(run)
            check_shapes(run)
        return run
    except Refused as refusal:
        store.close()
        raise OpsigError(f"{path} is refused: {refusal}") from refusal
    except BaseException:
        store.close()
        raise


class Trajectory(Reading):
    """One run's file. A context manager; rows appended since the last `commit` become readable together.

    Leaving it after an error drops what was not committed.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def frame(self, name: str = "losses/loss") -> pandas.DataFrame:
        """Rows as a pandas frame: "losses/loss" (steps x samples, with labels), "scalars", ...; see `frames`."""
        return frames.frame(self, name)

    def dataset(self, group: str = "losses") -> xarray.Dataset:
        """A row group as an xarray Dataset that is read when it is used, while the run is open; see `frames`."""
        return frames.dataset(self, group)

    def set_attributes(self, **attributes: Any) -> None:
        """Set root attributes: text, numbers; a key that ends in `_json` takes any JSON value."""
        for key, value in attributes.items():
            if value is None:
                continue
            if key.endswith("_json"):
                value = json.dumps(value)
            self._file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value

    def append(self, group: str, step: int, **columns: np.ndarray | float) -> None:
        """Add the row of one step to a row group; a column is `group/name`, "__" in a name standing for "/".

        Columns that the row lacks, and rows before a new column's first, hold the schema's fill. Raises OpsigError
        where the step is there already.
        """
        rows = self._rows(group)
        if step in rows and not rows.is_left_out(step):
            raise OpsigError(f"{self.path} already has {group} at step {step}")
        self._write_row(group, step, columns)

    def rewrite(self, group: str, step: int, **columns: np.ndarray | float) -> None:
        """Put a row in the place of the one that a step has; columns as in `append`, which all are replaced."""
        assert step in self._rows(group)
        self._write_row(group, step, columns)

    def rewind(self, step: int) -> None:
        """Drop the rows of all later steps from every row group."""
        for group in ROW_GROUPS:
            rows = self._rows(group)
            kept = [place for place, at in enumerate(rows.steps) if at <= step]
            if len(kept) == rows.count:
                continue
            with self.damage(group):
                columns = rows.columns(self._file, group)
                for dataset in columns.values():
                    for place, source in enumerate(kept):
                        if place != source:
                            write_row(dataset, place, np.asarray(dataset[source], dataset.dtype, order="C"), False)
                for name in sorted(columns, key=f"{group}/step".__ne__):  # step first: it says which rows there are
                    columns[name].resize(len(kept), axis=0)
            self.forget(group)

    def append_rows(self, group: str, new: Mapping[int, Mapping[str, Any]]) -> None:
        """Add the rows of several steps that a group lacks, in this order, at about the price of one."""
        rows = self._rows(group)
        made = [self._row(group, step, columns) for step, columns in new.items()]
        known, first = rows.columns(self._file, group), rows.count
        step = known[f"{group}/step"]
        try:
            for name in sorted(known, key=f"{group}/step".__eq__):  # step last: a row that it lacks does not count
                blank = fill_row(known[name])
                known[name].resize(first + len(made), axis=0)
                known[name][first:] = np.stack([row.get(name, blank) for row in made])
        except BaseException:  # Ctrl-C, too
            step.resize(first, axis=0)
            raise
        for place, each in enumerate(new, first):
            rows.put(each, place)

    def _row(self, group: str, step: int, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A row as the file holds it, with its step and checksum: datasets are made for columns that are new."""
        named = columns if group == "logged" else {name.replace("__", "/"): value for name, value in columns.items()}
        given = {f"{group}/{name}": as_array(value) for name, value in named.items()}
        given[f"{group}/step"] = np.asarray(step, np.int64)
        apart = f"{group}/wide_checksum"
        given.pop(apart, None)  # of a row that is copied: like the checksum, it is made here
        row: dict[str, np.ndarray] = {}
        checksum = wide = 0
        for name, value in given.items():
            dataset = self._column(field_of(name), value)
            row[name] = np.asarray(value, dataset.dtype, order="C")  # text longer than its field loses its end
            if not is_fill(row[name]):
                found = column_checksum(name, row[name])
                checksum, wide = checksum ^ found, wide ^ (found if is_wide(name) else 0)
        crc = np.asarray(checksum, np.uint32)
        self._column(field_of(f"{group}/checksum"), crc)
        row |= {f"{group}/checksum": crc}
        if apart in FIELDS:
            row[apart] = np.asarray(wide, np.uint32)
            self._column(field_of(apart), row[apart])
        return row

    def _write_row(self, group: str, step: int, columns: Mapping[str, Any]) -> None:
        """Write a whole row, at the end or in the place of the one that the step has."""
        rows = self._rows(group)
        place = rows.place_of(step)
        row = self._row(group, step, columns)
        known = rows.columns(self._file, group)
        row = {name: row[name] if name in row else fill_row(dataset) for name, dataset in known.items()}
        row[f"{group}/step"] = row.pop(f"{group}/step")  # written last: a row of which it is not there does not count
        new = place == rows.count
        before = {} if new else {name: np.asarray(known[name][place], value.dtype) for name, value in row.items()}
        try:
            for name, value in row.items():
                write_row(known[name], place, value, new)
        except BaseException:  # Ctrl-C, too: a row in the middle of others is one or the other
            for name, value in before.items():
                write_row(known[name], place, value, False)
            raise
        rows.put(step, place)

    def write(self, name: str, values: np.ndarray, replace: bool = False) -> None:
        """Write a whole dataset of the schema. Raises OpsigError where it exists, unless `replace`."""
        field = field_of(name)
        if name in self._file:
            if not replace:
                raise OpsigError(f"{self.path} already has {name}")
            del self._file[name]
        values = np.asarray(values)
        if field.dtype == "S*":
            values = np.char.encode(values.astype(str), "utf-8")
        elif "|" not in field.dtype:
            values = values.astype(field.dtype)
        dataset = self._file.create_dataset(name, data=values)
        describe(self._file, dataset, field)
        dataset.attrs["checksum"] = np.uint32(zlib.crc32(values.tobytes()))

    def remove(self, group: str) -> None:
        """Remove a row group with everything in it."""
        if group in self._file:
            del self._file[group]
        self._groups.pop(group, None)

    def commit(self) -> None:
        """Make everything since the last commit durable and readable, together.

        Raises OpsigError on a full disk, with nothing lost: it can be called again.
        """
        assert isinstance(self._store, RedoFile)
        with file_errors(self.path):
            try:
                self._file.flush()
                self._store.commit()
            finally:
                self.path = self._store.path

    def close(self) -> None:
        """Commit and close; a file that was written is one plain HDF5 file afterwards."""
        if isinstance(self._store, RedoFile):
            with file_errors(self.path):
                try:
                    self._file.close()
                    self._store.commit()
                finally:
                    self._store.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Close and drop what was not committed."""
        with file_errors(self.path):
            try:
                self._file.close()
            finally:
                self._store.close()

    def replace_by(self, path: str) -> None:
        """Let another, finished file take this one's place, and close.

        Raises OpsigError where somebody has written to this one although it is open here.
        """
        assert isinstance(self._store, RedoFile)
        with file_errors(self.path):
            try:
                self._file.close()
                self._store.replace_by(path)
            finally:
                self._store.let_go()

    def _column(self, field: Field, value: np.ndarray) -> Any:
        """The dataset for rows like `value`, made where it is new: the rows that there are hold the fill."""
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
        if len(shape) > 1:
            chunks = (1,) * len(shape) + (min(1 << 18, shape[-1]),)
        elif "sample" in field.dims:
            chunks = (64, min(1024, width)) if width < WIDE else (16, 16384)
        else:
            chunks = (1, min(1 << 18, width)) if shape else (1024,)
        dataset = self._file.create_dataset(
            field.path, (0, *shape), maxshape=(None, *shape), dtype=dtype, chunks=chunks,
            fillvalue=stated_fill(np.dtype(dtype)), fill_time="never" if "sample" in field.dims else "ifset",
        )  # fmt: skip
        describe(self._file, dataset, field)
        known[field.path] = dataset
        for row in range(rows.count):
            write_row(dataset, row, fill_row(dataset))
        return dataset


@contextmanager
def file_errors(path: str) -> Iterator[None]:
    """What the system says of a file, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OpsigError(f"{path}: the disk is full. Free some space and continue with --resume") from error
        reason = " ".join(str(error).split())
        if "file signature not found" in reason or "truncated" in reason:
            raise OpsigError(f"{path} is not a readable HDF5 file") from error
        name = error.filename if isinstance(error.filename, str) else path
        about = "" if os.path.abspath(name) == os.path.abspath(path) else f" ({name})"
        raise OpsigError(f"{path}: {error.strerror or reason}{about}") from error

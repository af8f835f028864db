"""Writing to an open trajectory file: rows, whole datasets, provenance. Durable, and seen by others, with a commit.

T steps, S samples, P parameters.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.naming import describe
from opsig_cli.trajectory.reading import Reading
from opsig_cli.trajectory.rows import as_array, column_checksum, fill_row, is_fill, stated_fill, write_row
from opsig_cli.trajectory.schema import FIELDS, ROW_GROUPS, Field, field_of, is_wide

WIDE = 200_000
"""Samples from which on losses are kept in lower chunks."""


class Writing(Reading):
    """What can be written to a run's file that is open for appending."""

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
        with self.damage("its structure"):
            dataset = self._file.create_dataset(name, data=values)
            describe(self._file, dataset, field)
        dataset.attrs["checksum"] = np.uint32(zlib.crc32(values.tobytes()))

    def remove(self, group: str) -> None:
        """Remove a row group with everything in it."""
        if group in self._file:
            del self._file[group]
        self._groups.pop(group, None)

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
            parts = max(1, -(-width // 16384))  # as wide as one another: a row is written and read in few pieces
            chunks = (64, -(-width // parts)) if width < WIDE else (16, 16384)
        else:
            chunks = (1, min(1 << 18, width)) if shape else (1024,)
        with self.damage("its structure"):
            dataset = self._file.create_dataset(
                field.path, (0, *shape), maxshape=(None, *shape), dtype=dtype, chunks=chunks,
                fillvalue=stated_fill(np.dtype(dtype)), fill_time="never" if "sample" in field.dims else "ifset",
            )  # fmt: skip
            describe(self._file, dataset, field)
        known[field.path] = dataset
        for row in range(rows.count):
            write_row(dataset, row, fill_row(dataset))
        return dataset

"""Rows of a trajectory file by their places in it, each held against its checksum before it is given out.

N rows, in the order in which they were appended; `reading`, which stands on this, has them in order of step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.checking import DamagedRows, named_steps, row_checksums
from opsig_cli.trajectory.chunks import Chunks, Room
from opsig_cli.trajectory.datasets import Datasets
from opsig_cli.trajectory.rows import Rows, consecutive, fill_of, from_bfloat16
from opsig_cli.trajectory.schema import ROW_GROUPS, field_of, is_wide
from opsig_cli.trajectory.snapshot import SnapshotFile
from opsig_cli.trajectory.store import RedoFile

BLOCK_BYTES = 16 << 20
"""Bound on the memory that one block of rows takes."""
HANDY_BYTES = 4 << 20
"""What a block takes where that is four rows or more: it is still in the processor's cache when it is looked at."""


class PlacedRows(Datasets):
    """The rows of a file's row groups; each is checked once while the file is open."""

    def __init__(self, path: str, file: h5py.File, store: SnapshotFile):
        super().__init__(path, file, store)
        self._groups: dict[str, Rows] = {}
        self._checked: dict[str, np.ndarray] = {}
        self._checked_narrow: dict[str, np.ndarray] = {}
        self._all_stated: dict[str, np.ndarray | None] = {}
        self._chunks: dict[str, Chunks | None] = {}
        self._room = Room()
        self._unsighted = np.empty(0, np.int64)  # places of sightings that are not presented
        self._sighted_in_order: tuple[int, bool] = (0, True)  # of so many sightings: whether they are in order of step

    # -- is it whole

    def _held(self, name: str, places: np.ndarray, room: Room | None = None) -> np.ndarray:
        """The rows at these places as the file holds them, (N, ...), held against their checksums; in an array of
        `room`'s, where that is given."""
        group = group_of(name)
        try:
            raw = self._gather(name, places, room)
        except OpsigError:
            self._hold(group, places)  # names the steps
            raise
        self._hold(group, places, {name: raw}, narrow=not is_wide(name))
        return raw

    def _hold(
        self, group: str, places: np.ndarray, known: Mapping[str, np.ndarray] | None = None, narrow: bool = False
    ) -> None:
        """Raise DamagedRows where the rows at these places do not have the checksums stored with them.

        `known`: columns of these rows that have been read, (N, ...), as the file holds them. `narrow`: wide columns are
        not asked for, and not read as long as the others are what was written.
        """
        rows = self._rows(group)
        checked = _longer(self._checked, group, rows.count)
        new = ~checked[places]
        if not new.any():
            return
        if narrow and f"{group}/wide_checksum" in rows.columns(self._file, group):
            checked_narrow = _longer(self._checked_narrow, group, rows.count)
            new &= ~checked_narrow[places]
            odd = self._damaged(group, places[new], _of(known, new), narrow=True)
            checked_narrow[places[new & ~np.isin(places, odd)]] = True
            new = np.isin(places, odd)
            if not new.any():
                return
        places, known = places[new], _of(known, new)
        damaged = self._damaged(group, places, known)
        if len(damaged):
            steps = sorted(rows.steps[place] for place in damaged.tolist())
            raise DamagedRows(self.path, group, steps, lambda: self._leave_out_damaged(group))
        checked[places] = True

    @property
    def left_out(self) -> dict[str, np.ndarray]:
        """Places in the file of rows that are not presented, by their group."""
        found = {group: rows.left_out for group, rows in self._groups.items() if len(rows.left_out)}
        return found | ({"sightings": self._unsighted} if len(self._unsighted) else {})

    def leave_out(self, places: Mapping[str, np.ndarray]) -> None:
        """Present these rows no more, given as `left_out` gives them."""
        for group, there in places.items():
            if group == "sightings":
                self._unsighted = np.union1d(self._unsighted, there)
            else:
                self._rows(group).leave_out(there)

    def forget(self, group: str) -> None:
        """Drop what is known of a group's rows, as after they were moved."""
        self._groups.pop(group, None)
        self._checked.pop(group, None)
        self._checked_narrow.pop(group, None)

    def _leave_out_damaged(self, group: str) -> str:
        """Present no damaged row of the group any more, and say which they were."""
        rows = self._rows(group)
        damaged = self._damaged(group, np.arange(rows.count))
        rows.leave_out(damaged)
        steps = sorted(rows.steps[place] for place in damaged.tolist())
        are = "is" if len(steps) == 1 else "are"
        rows_of = f"{len(steps)} of {rows.count:,} rows of {group}"
        return f"{self.path}: {rows_of} {are} damaged and left out: {named_steps(steps)}"

    def _damaged(
        self, group: str, places: np.ndarray, known: Mapping[str, np.ndarray] | None = None, narrow: bool = False
    ) -> np.ndarray:
        """Those of these places whose row cannot be read or has another checksum; none in a group without checksums.

        `narrow`: wide columns are not read, and taken for what was written.
        """
        columns = dict(self._rows(group).columns(self._file, group))
        apart = columns.pop(f"{group}/wide_checksum", None)
        if columns.pop(f"{group}/checksum", None) is None:
            return places[:0]
        sums, readable = self._stated(f"{group}/checksum", places)
        if narrow and apart is not None:
            wide, could = self._stated(f"{group}/wide_checksum", places)
            sums, readable = sums ^ wide, readable & could
            columns = {name: dataset for name, dataset in columns.items() if not is_wide(name)}
        wide = np.zeros_like(sums)
        for name in columns:
            if known and name in known:
                found = row_checksums(name, known[name])
            else:
                found, could = self._sums(name, places, row_checksums)
                readable &= could
            sums ^= found
            wide ^= found if is_wide(name) else 0
        if not narrow and apart is not None:
            stated, could = self._stated(f"{group}/wide_checksum", places)
            readable &= could & ((stated == wide) | (stated == fill_of(stated.dtype)))
        return places[(sums != 0) | ~readable]

    def _stated(self, name: str, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The checksums that the file holds of these rows, as `_sums`; of a file that stays as it is all are read at
        once."""
        if name not in self._all_stated and not self.writable:
            try:
                self._all_stated[name] = self._gather(name, np.arange(self._rows(group_of(name)).count))
            except OpsigError:  # one by one, then
                self._all_stated[name] = None
        known = self._all_stated.get(name)
        if known is None:
            return self._sums(name, places, lambda _, values: values)
        return known[places], np.ones(len(places), bool)

    def _sums(
        self, name: str, places: np.ndarray, of: Callable[[str, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A number of a column's row at each of these places, and whether it could be read, (N,) each."""
        sums, readable = np.zeros(len(places), np.uint32), np.ones(len(places), bool)
        height = height_of(self._file[name])
        for first in range(0, len(places), height):
            piece = slice(first, first + height)
            try:
                sums[piece] = of(name, self._gather(name, places[piece]))
            except OpsigError:  # which of them is it?
                for row in range(first, min(first + height, len(places))):
                    try:
                        sums[row] = of(name, self._gather(name, places[row : row + 1]))[0]
                    except OpsigError:
                        readable[row] = False
        return sums, readable

    # -- reading

    def _rows(self, group: str) -> Rows:
        if group not in self._groups:
            with self.damage(f"{group}/step"):
                name = f"{group}/step"
                steps = self._file[name][()] if name in self._file else np.empty(0, np.int64)
                self._groups[group] = Rows(steps)
        return self._groups[group]

    def _gather(self, name: str, places: np.ndarray, room: Room | None = None) -> np.ndarray:
        """The rows at these places as the file holds them, (N, ...). Raises OpsigError where they cannot be read."""
        with self.damage(name):
            dataset: Any = self._rows(group_of(name)).columns(self._file, group_of(name))[name]
            chunks = self._chunks_of(name)
            row_shape, dtype = (
                (dataset.shape[1:], dataset.dtype) if chunks is None else (chunks.row_shape, chunks.dtype)
            )
            shape = (len(places), *row_shape)
            found = np.empty(shape, dtype) if room is None else room.take(shape, dtype)
            for first, last in consecutive(places):
                start, stop = int(places[first]), int(places[last - 1]) + 1
                if chunks is None:
                    found[first:last] = dataset[start:stop]
                else:
                    chunks.read_into(found[first:last], start, stop)
            return found

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
        if values.dtype.kind != "u" or "|" not in field_of(name).dtype:
            return values
        if field_of(name).dtype == "f4|u2":
            return from_bfloat16(values)
        return np.where(values == fill_of(values.dtype), np.int64(-1), values.astype(np.int64))


def _longer(kept: dict[str, np.ndarray], group: str, count: int) -> np.ndarray:
    """The group's flags, a new one False for every row that has come since."""
    known = kept.get(group, np.zeros(0, bool))
    if len(known) < count:
        known = kept[group] = np.append(known, np.zeros(count - len(known), bool))
    return known


def _of(known: Mapping[str, np.ndarray] | None, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Those rows of columns."""
    return {name: values if chosen.all() else values[chosen] for name, values in (known or {}).items()}


def height_of(dataset: Any) -> int:
    """How many rows of a dataset make a block: whole chunks where that is possible."""
    row_bytes = max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize)
    height = max(1, min(BLOCK_BYTES // row_bytes, max(4, HANDY_BYTES // row_bytes)))
    if dataset.chunks and height > dataset.chunks[0]:
        height -= height % dataset.chunks[0]
    return height


def group_of(name: str) -> str:
    group = name.split("/")[0]
    assert group in ROW_GROUPS, name
    return group

"""A trajectory file as its readers see it: provenance, datasets, rows in order of step, blocks, and their checksums.

T steps, S samples, P parameters, M chosen samples.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import external
from opsig_cli.trajectory.checking import DamagedRows, named_steps, row_checksums
from opsig_cli.trajectory.chunks import Chunks
from opsig_cli.trajectory.rows import Rows, consecutive, fill_of, from_bfloat16, known_names
from opsig_cli.trajectory.schema import ATTRIBUTES, ROW_GROUPS, field_of, is_wide
from opsig_cli.trajectory.snapshot import SnapshotFile
from opsig_cli.trajectory.store import RedoFile

BLOCK_BYTES = 16 << 20
"""Bound on the memory that one block of `Reading.blocks` takes."""
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, OverflowError)
"""What HDF5 and numpy raise on a damaged file."""


class Reading:
    """What can be read of one run's file. Datasets are named by their path in the schema, as "losses/loss".

    A row group (`losses`, `scalars`, `checkpoints`, `sharpness`) has one row per recorded step; rows are always
    presented in increasing order of step, however they were appended. Whatever reads rows holds them against their
    checksums, each once while the file is open, and raises DamagedRows; see `opsig_cli.trajectory.checking`.
    """

    def __init__(self, path: str, file: h5py.File, store: SnapshotFile):
        self.path = path
        self._file: Any = file  # h5py's items are untyped
        self._store = store
        self._groups: dict[str, Rows] = {}
        self._checked: dict[str, np.ndarray] = {}
        self._checked_narrow: dict[str, np.ndarray] = {}
        self._chunks: dict[str, Chunks | None] = {}
        self._frozen: np.ndarray | None = None
        self._unsighted = np.empty(0, np.int64)  # places of sightings that are not presented
        self._sighted_in_order: tuple[int, bool] = (0, True)  # of so many sightings: whether they are in order of step

    # -- what the file says of itself

    @property
    def attributes(self) -> dict[str, Any]:
        """The file's provenance as Python values. Raises OpsigError where one is not what the schema says."""
        found = {}
        with self.damage("an attribute"):
            for key, value in self._file.attrs.items():
                found[key] = json.loads(value) if key.endswith("_json") else as_value(value)
        for key, value in found.items():
            if not isinstance(value, ATTRIBUTES.get(key, object)):
                what = {str: "text", int: "a whole number", dict: "an object of JSON", list: "a list of JSON"}[
                    ATTRIBUTES[key]
                ]
                raise OpsigError(f"{self.path}: the attribute {key} is not {what}, as opsig writes it")
        return found

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
        return name in self._file or external.holds(self, name)

    def require(self, name: str) -> None:
        """Raise OpsigError, naming the command that makes it, where the dataset is not in the file."""
        if not self.has(name):
            field = field_of(name)
            how = "Record it in a run of its own: opsig train, or opsig import CHECKPOINT... --task TASK"
            if field.made_by and (name == "checkpoints/params" or self.has("checkpoints/params")):
                how = f"Run: {field.made_by} {self.path}"
            raise OpsigError(f"{self.path} lacks {name} ({field.long_name}). {how}")

    def groups(self) -> list[str]:
        """Names of the groups in the file, sorted."""
        return sorted(name for name, item in self._file.items() if isinstance(item, h5py.Group))

    def names(self) -> list[str]:
        """Names of the schema's datasets that are in the file, in the schema's order."""
        return known_names(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dataset."""
        if name not in self._file and external.holds(self, name):
            return len(self.steps("checkpoints")), external.parameters(self)
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
        """Steps recorded in a row group, increasing, (T,) int64, read-only; empty where the group is absent."""
        rows = self._rows(group)
        if len(rows.suspicious()):
            self._hold(group, rows.suspicious())
        if len(odd := rows.impossible()):
            steps = sorted({rows.steps[place] for place in odd.tolist()})
            raise OpsigError(f"{self.path}: {group} has {named_steps(steps)} twice or below 0, as opsig writes none")
        return rows.sorted_steps()

    def holds(self, group: str, step: int) -> bool:
        """Whether a row group presents a row of this step."""
        rows = self._rows(group)
        return step in rows and not rows.is_left_out(step)

    def has_place(self, group: str, step: int) -> bool:
        """Whether the file has a place for this step's row, that of one that was left out among them."""
        return step in self._rows(group)

    def losses(self) -> np.ndarray:
        """Every sample's loss at every recorded step, in order of step, (T, S) float32; NaN where not measured."""
        return self.rows("losses/loss", 0, len(self.steps("losses")))

    def row(self, name: str, step: int) -> np.ndarray:
        """The row of one step, (S,) or (P,).

        Raises OpsigError, naming the nearest steps, where it was not recorded, or where it is damaged.
        """
        inside = self._require_rows(name)
        position = self._position(group_of(name), step)
        if not inside:
            return external.row(self, name, position)
        return self.rows(name, position, position + 1)[0]

    def whole_row(self, group: str, step: int) -> dict[str, np.ndarray]:
        """All columns of a group at one step by their names in it, each read once; as `row`."""
        position = self._position(group, step)
        places = self._rows(group).order()[[position]]
        columns = self._rows(group).columns(self._file, group)
        names = [name for name in columns if not name.endswith(("/step", "checksum"))]
        try:
            raw = {name: self._gather(name, places) for name in names}
        except OpsigError:
            self._hold(group, places)  # names the step
            raise
        self._hold(group, places, raw)
        found = {name: self._missing(name, values)[0] for name, values in raw.items()}
        outside = [name for name in external.KINDS if name.startswith(f"{group}/") and external.holds(self, name)]
        found |= {name: external.row(self, name, position) for name in outside}
        return {name.removeprefix(f"{group}/"): values for name, values in found.items()}

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` in order of step, (stop - start, ...)."""
        if not self._require_rows(name):
            found = [external.row(self, name, at) for at in range(*slice(start, stop).indices(self.shape(name)[0]))]
            return np.array(found, np.float32).reshape(len(found), -1)
        return self._missing(name, self._held(name, self._rows(group_of(name)).order()[start:stop]))

    def series(self, name: str, positions: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Columns of chosen samples over time, (T, M); `positions` index the file's samples, (M,)."""
        self.require(name)
        group = group_of(name)
        places = self._rows(group).order()[start:stop]
        positions = np.asarray(positions)
        chunks = self._chunks_of(name)
        if chunks is None:
            parts = [values[:, positions] for _, values in self.blocks(name, start, stop)]
            return np.concatenate(parts) if parts else np.empty((0, len(positions)), np.float32)
        self._hold(group, places)
        with self.damage(name):
            raw = np.empty((len(places), len(positions)), self._file[name].dtype)
            for a, b in consecutive(places):
                raw[a:b] = chunks.columns(positions, int(places[a]), int(places[b - 1]) + 1)
        return self._missing(name, raw)

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive blocks of rows `start:stop` of at most BLOCK_BYTES: pairs of first position and rows.

        Each block is an array of its own: what is kept of one is not overwritten by the next.
        """
        self.require(name)
        order, dataset = self._rows(group_of(name)).order(), self._file[name]
        stop = len(order) if stop is None else min(stop, len(order))
        height = _height(dataset)
        first = start
        while first < stop:
            last = min(first - first % height + height, stop)
            yield first, self._missing(name, self._held(name, order[first:last]))
            first = last

    # -- is it whole

    def check(self, group: str, steps: Iterable[int]) -> None:
        """Hold the rows of these steps against their checksums. Raises DamagedRows, or OpsigError for a step that was
        not recorded."""
        positions = [self._position(group, step) for step in steps]
        self._hold(group, self._rows(group).order()[positions])

    def damaged_steps(self, group: str) -> list[int]:
        """Steps of all rows of a group whose stored row does not have the checksum stored with it, increasing."""
        steps = self._rows(group).steps
        return sorted(steps[place] for place in self._damaged(group, np.arange(len(steps))).tolist())

    def _held(self, name: str, places: np.ndarray) -> np.ndarray:
        """The rows at these places as the file holds them, (N, ...), held against their checksums."""
        group = group_of(name)
        try:
            raw = self._gather(name, places)
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
        sums, readable = self._sums(f"{group}/checksum", places, lambda _, values: values)
        if narrow and apart is not None:
            wide, could = self._sums(f"{group}/wide_checksum", places, lambda _, values: values)
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
            stated, could = self._sums(f"{group}/wide_checksum", places, lambda _, values: values)
            readable &= could & ((stated == wide) | (stated == fill_of(stated.dtype)))
        return places[(sums != 0) | ~readable]

    def _sums(
        self, name: str, places: np.ndarray, of: Callable[[str, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A number of a column's row at each of these places, and whether it could be read, (N,) each."""
        sums, readable = np.zeros(len(places), np.uint32), np.ones(len(places), bool)
        height = _height(self._file[name])
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

    # -- inside

    def _require_rows(self, name: str) -> bool:
        """As `require`, of a dataset with a row for every step, which costs next to nothing where the file holds it;
        whether it does, or other files do."""
        if name in self._rows(group_of(name)).columns(self._file, group_of(name)):
            return True
        self.require(name)
        return name in self._file

    def _rows(self, group: str) -> Rows:
        if group not in self._groups:
            with self.damage(f"{group}/step"):
                name = f"{group}/step"
                steps = self._file[name][()] if name in self._file else np.empty(0, np.int64)
                self._groups[group] = Rows(steps)
        return self._groups[group]

    def _position(self, group: str, step: int) -> int:
        """Where in order of step a step is. Raises OpsigError, naming the nearest, where it was not recorded."""
        steps = self.steps(group)
        position = int(np.searchsorted(steps, step))
        if position == len(steps) or steps[position] != step:
            near = ", ".join(str(s) for s in steps[max(0, position - 1) : position + 1])
            raise OpsigError(f"{self.path} has no {group} at step {step}. Nearest: {near or 'none'}")
        return position

    def _gather(self, name: str, places: np.ndarray) -> np.ndarray:
        """The rows at these places as the file holds them, (N, ...). Raises OpsigError where they cannot be read."""
        with self.damage(name):
            chunks = self._chunks_of(name)
            if chunks is None:
                dataset: Any = self._file[name]
                found = np.empty((len(places), *dataset.shape[1:]), dataset.dtype)
            else:
                dataset, found = None, chunks.room(len(places))
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

    @contextmanager
    def damage(self, what: str) -> Iterator[None]:
        """Whatever HDF5 raises on a damaged file becomes one line."""
        try:
            yield
        except UNREADABLE as error:
            reason = " ".join(str(error).split())
            raise OpsigError(
                f"{self.path}: {what} is damaged: {reason}. See what is intact: opsig verify {self.path}"
            ) from error


def _longer(kept: dict[str, np.ndarray], group: str, count: int) -> np.ndarray:
    """The group's flags, a new one False for every row that has come since."""
    known = kept.get(group, np.zeros(0, bool))
    if len(known) < count:
        known = kept[group] = np.append(known, np.zeros(count - len(known), bool))
    return known


def _of(known: Mapping[str, np.ndarray] | None, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Those rows of columns."""
    return {name: values if chosen.all() else values[chosen] for name, values in (known or {}).items()}


def _height(dataset: Any) -> int:
    """How many rows of a dataset make a block: whole chunks where that is possible."""
    height = max(1, BLOCK_BYTES // max(1, math.prod(dataset.shape[1:]) * dataset.dtype.itemsize))
    if dataset.chunks and height > dataset.chunks[0]:
        height -= height % dataset.chunks[0]
    return height


def group_of(name: str) -> str:
    group = name.split("/")[0]
    assert group in ROW_GROUPS, name
    return group


def as_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value

"""A trajectory file as its readers see it: rows in order of step, in blocks and as series, and checked.

T steps, S samples, P parameters, M chosen samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import external
from opsig_cli.trajectory.checking import named_steps
from opsig_cli.trajectory.placed import PlacedRows, group_of, height_of
from opsig_cli.trajectory.rows import consecutive


class Reading(PlacedRows):
    """What can be read of one run's file. Datasets are named by their path in the schema, as "losses/loss".

    A row group (`losses`, `scalars`, `checkpoints`, `sharpness`) has one row per recorded step; rows are always
    presented in increasing order of step, however they were appended. Whatever reads rows holds them against their
    checksums, each once while the file is open, and raises DamagedRows; see `opsig_cli.trajectory.checking`.
    """

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a dataset."""
        if name not in self._file and external.holds(self, name):
            return len(self.steps("checkpoints")), external.parameters(self)
        return self._file[name].shape

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
        height = height_of(dataset)
        first = start
        while first < stop:
            last = min(first - first % height + height, stop)
            yield first, self._missing(name, self._held(name, order[first:last], self._room))
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

    # -- inside

    def _require_rows(self, name: str) -> bool:
        """As `require`, of a dataset with a row for every step, which costs next to nothing where the file holds it;
        whether it does, or other files do."""
        if name in self._rows(group_of(name)).columns(self._file, group_of(name)):
            return True
        self.require(name)
        return name in self._file

    def _position(self, group: str, step: int) -> int:
        """Where in order of step a step is. Raises OpsigError, naming the nearest, where it was not recorded."""
        steps = self.steps(group)
        position = int(np.searchsorted(steps, step))
        if position == len(steps) or steps[position] != step:
            near = ", ".join(str(s) for s in steps[max(0, position - 1) : position + 1])
            raise OpsigError(f"{self.path} has no {group} at step {step}. Nearest: {near or 'none'}")
        return position

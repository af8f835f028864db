"""A run whose losses are read with what was not measured held at the last value that was. S samples, M chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from opsig_cli.analysis.coverage import Coverage, coverage, held
from opsig_cli.trajectory.file import Trajectory

LOSS = "losses/loss"
BACK = 64
"""Rows that are read at a time in search of a last value."""


def coverage_of(run: Trajectory) -> Coverage:
    """What of a run's losses was measured, from one pass over all of them.

    Where training recorded those of a subset, as its settings say, others are not measured rather than broken.
    """
    targets = targets_of(run)
    blocks = (rows for _, rows in run.blocks(LOSS))
    found = coverage(blocks, len(run.samples), None if targets.all() else targets)
    if not (run.attributes.get("settings_json") or {}).get("track_samples"):
        return found
    kept = ~np.isin(found.broken_N, found.never)
    broken = {name: getattr(found, name)[kept] for name in ("broken_N", "broken_row_N", "passing_N")}
    return replace(found, **broken)


def targets_of(run: Trajectory) -> np.ndarray:
    """Which samples of a run have a loss, (S,) bool."""
    if not run.has("samples/target"):
        return np.ones(len(run.samples), bool)
    return run.read("samples/target").astype(bool)


def mean_losses(run: Trajectory, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Mean loss of the samples that have one at each of these rows, (T,) float64."""
    targets = targets_of(run)
    whole = targets.all()
    blocks = (rows if whole else rows[:, targets] for _, rows in run.blocks(LOSS, start, stop))
    return np.concatenate([rows.mean(1, dtype=np.float64) for rows in blocks])


def filled(run: Trajectory, known: Coverage | None) -> Trajectory:
    """The run, to be read, without gaps in its losses; itself where there are none (None).

    A sample has its first loss before it, and 0 throughout where it has none. What comes after a run diverged stays.
    """
    return run if known is None else cast(Trajectory, _Filled(run, known))


class _Filled:
    """Passes everything on to the run but reading losses, and the search for the rows where they were measured."""

    def __init__(self, run: Trajectory, known: Coverage):
        self._run = run
        self._known = known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        found = self._run.rows(name, start, stop)
        return self._held(found, start, self._before(start)) if name == LOSS else found

    def series(self, name: str, positions: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        found = self._run.series(name, positions, start, stop)
        return self._held(found, start, self._before(start)[positions]) if name == LOSS else found

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        if name != LOSS:
            yield from self._run.blocks(name, start, stop)
            return
        last = self._before(start)
        for first, rows in self._run.blocks(name, start, stop):
            whole = self._held(rows, first, last)
            last = whole[-1]
            yield first, whole

    def _held(self, rows: np.ndarray, start: int, before_S: np.ndarray) -> np.ndarray:
        count = len(rows) if self._known.diverged is None else max(0, min(len(rows), self._known.diverged - start))
        return (
            np.concatenate([held(rows[:count], before_S), rows[count:]]) if count < len(rows) else held(rows, before_S)
        )

    def _before(self, row: int) -> np.ndarray:
        """Every sample's last finite loss before a row, else its first one, else 0, (S,)."""
        found = np.where(np.isfinite(self._known.first_S), self._known.first_S, 0)
        wanted = self._known.first_row_S < row
        for stop in range(row, 0, -BACK):
            if not wanted.any():
                break
            start = max(0, stop - BACK)
            rows = held(self._run.rows(LOSS, start, stop), np.full(len(found), np.nan))[-1]
            new = wanted & np.isfinite(rows)
            found[new] = rows[new]
            wanted &= ~new
        return found


def as_recorded(run: Trajectory) -> Any:
    """The run with the rows of its file, without what stands for gaps."""
    return getattr(run, "_run", run)


def measured_before(run: Trajectory, positions: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """For each sample the last row before its row at which its loss was measured, (M,); that row less one without."""
    raw = as_recorded(run)
    finite = np.isfinite(raw.series(LOSS, positions, 0, int(max(rows, default=0))))
    found = [np.flatnonzero(column[:row])[-1:] for column, row in zip(finite.T, rows, strict=True)]
    return np.array([int(at[0]) if len(at) else row - 1 for at, row in zip(found, rows, strict=True)])

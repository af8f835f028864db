"""A run whose losses of all samples are those at some of its checkpoints, measured for the occasion and not kept.

C checkpoints, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from opsig_cli.backends import Session
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

LOSS, PREDICTION = "losses/loss", "losses/prediction"


def measured(run: Trajectory, session: Session, steps: Sequence[int]) -> Trajectory:
    """The run, to be read, with a row of losses and predictions at each of these checkpoints and at no other step.

    Rows that the file has are taken from it. Memory is 12 bytes for each sample at each checkpoint.
    """
    held = set(run.steps("losses").tolist()) if run.has(LOSS) else set()
    losses, predictions = [], []
    for step in steps:
        row = run.row(LOSS, step) if step in held else None
        if row is not None and np.isfinite(row).all():
            losses.append(row)
            predictions.append(run.row(PREDICTION, step) if run.has(PREDICTION) else None)
        else:
            ((loss, prediction),) = session.losses([read_state(run, step)])
            losses.append(np.asarray(loss, np.float32))
            predictions.append(None if prediction is None else np.asarray(prediction, np.int64))
    columns = {LOSS: np.stack(losses)}
    if all(prediction is not None for prediction in predictions):
        columns[PREDICTION] = np.stack(predictions)
    return cast(Trajectory, _Measured(run, np.array(steps, np.int64), columns))


def again(view: Trajectory, run: Trajectory) -> Trajectory:
    """The same losses over the run as it was opened once more."""
    assert isinstance(view, _Measured)
    return cast(Trajectory, _Measured(run, view._steps, view._columns))


class _Measured:
    """Passes everything on to the run but the row group `losses`."""

    def __init__(self, run: Trajectory, steps: np.ndarray, columns: dict[str, np.ndarray]):
        self._run, self._steps, self._columns = run, steps, columns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def has(self, name: str) -> bool:
        return name in self._columns if name.startswith("losses/") else self._run.has(name)

    def require(self, name: str) -> None:
        if name not in self._columns:
            self._run.require(name)

    def steps(self, group: str) -> np.ndarray:
        return self._steps if group == "losses" else self._run.steps(group)

    def losses(self) -> np.ndarray:
        return self._columns[LOSS]

    def row(self, name: str, step: int) -> np.ndarray:
        if name not in self._columns:
            return self._run.row(name, step)
        return self._columns[name][int(np.searchsorted(self._steps, step))]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._columns[name][start:stop] if name in self._columns else self._run.rows(name, start, stop)

    def series(self, name: str, positions: np.ndarray, start: int = 0, stop: int | None = None) -> np.ndarray:
        if name not in self._columns:
            return self._run.series(name, positions, start, stop)
        return self._columns[name][start:stop][:, positions]

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        if name not in self._columns:
            yield from self._run.blocks(name, start, stop)
        elif len(rows := self._columns[name][start:stop]):
            yield start, rows

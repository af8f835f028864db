"""How the losses of sets of samples went over steps: means, largest rises, swings. T steps, S samples, K sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Course:
    """Mean losses of sets of samples, `means_TK`, at `steps_T`; `swings_K` as `Tally` says; NaN for empty sets."""

    steps_T: np.ndarray
    means_TK: np.ndarray
    swings_K: np.ndarray

    def rise(self, place: int) -> tuple[float, int | None]:
        """The largest rise of a set's mean loss from one recorded step to the next, and at which step it stood."""
        return largest_rise(self.steps_T, self.means_TK[:, place])

    def final(self, place: int) -> float:
        """A set's last mean loss."""
        return float(self.means_TK[-1, place]) if len(self.means_TK) else float("nan")


def largest_rise(steps_T: np.ndarray, values_T: np.ndarray) -> tuple[float, int | None]:
    """The largest difference of neighbours and the step of the second; the smallest fall where nothing rises.

    >>> largest_rise(np.array([3, 4, 6]), np.array([1.0, 0.5, 0.75]))
    (0.25, 6)
    """
    rises = np.diff(values_T)
    if not len(rises) or not np.isfinite(rises).all():
        return float("nan"), None
    row = int(rises.argmax())
    return float(rises[row]), int(steps_T[row + 1])


class Tally:
    """Takes one row of losses (S,) at a time, keeps none, and gives the course of every set.

    `sets`: positions (M,) or masks (S,) of K sets. A set's swing is half the mean size of its samples' second
    differences over recorded steps: what a loss that alternates moves from one step to the next, blind to a drift.

    >>> tally = Tally([np.array([0]), np.array([1])])
    >>> for step, low in enumerate((0.0, 1.0, 0.0, 1.0)):
    ...     tally.add(step, np.array([low, 5.0 - step]))
    >>> tally.course().swings_K.tolist()
    [1.0, 0.0]
    """

    def __init__(self, sets: Sequence[np.ndarray]):
        self._sets = sets
        self._steps: list[int] = []
        self._means: list[list[float]] = []
        self._swings = np.zeros(len(sets))
        self._last: list[np.ndarray] = []

    def add(self, step: int, losses_S: np.ndarray) -> None:
        """Count the next recorded row."""
        row = np.array(losses_S, np.float64)
        self._steps.append(step)
        self._means.append([_mean(row[chosen]) for chosen in self._sets])
        if len(self._last) == 2:
            second = np.abs(row - 2 * self._last[1] + self._last[0])
            self._swings += [_mean(second[chosen]) / 2 for chosen in self._sets]
        self._last = [*self._last[-1:], row]

    def course(self) -> Course:
        """What was counted so far; swings are NaN before the third row."""
        count = len(self._steps) - 2
        swings = self._swings / count if count > 0 else np.full(len(self._sets), np.nan)
        return Course(np.array(self._steps), np.array(self._means).reshape(-1, len(self._sets)), swings)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")

"""Mining: one streamed pass over per-sample losses that finds the samples that move most.

T steps, S samples, R rows of a block, W steps of a moving mean. Blocks are consecutive (R, S) float32 arrays, so memory
is bounded by a few blocks and does not depend on T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

WIDTH = 16
"""W: steps that the oscillation score averages over; a power of two."""

ALTERNATES = 0.75
"""An alternation above this is period two: white noise gives 0.35, a smooth curve next to 0, and losses that only fall,
however unevenly, at most the root of a half."""
LASTS = 8
"""Rows in succession that must alternate so that a run is said to: one spike moves the means of W rows."""

_TILE = 4096  # samples worked on at a time, so that a tile's arrays stay in the processor's cache


@dataclass(frozen=True)
class Movement:
    """How each sample moved most: its score, and the losses around the row where it did.

    `score` (S,) float32, not negative; `place` (S,) int64, the row after the change; `before` and `after` (S,) float32
    in nats. `mean_T` is the mean loss of every row, float64. `alternation_T` is the amplitude at period two over the
    one that all one-step changes would have at period two, 0 to 1, over the W steps up to each row; NaN where it is not
    defined. Drift counts against it: a run that learns smoothly does not alternate, however small its wiggles are, and
    neither does one whose losses never rise.
    """

    score: np.ndarray
    place: np.ndarray
    before: np.ndarray
    after: np.ndarray
    mean_T: np.ndarray
    alternation_T: np.ndarray

    @property
    def first_alternation(self) -> int | None:
        """The first of LASTS rows at which the run alternates at period two, None where it never does."""
        above = np.nan_to_num(self.alternation_T) > ALTERNATES
        if len(above) < LASTS:
            return None
        lasting = np.lib.stride_tricks.sliding_window_view(above, LASTS).all(1)
        return int(lasting.argmax()) if lasting.any() else None


def sizes_of(changes: np.ndarray, direction: str) -> np.ndarray:
    """Sizes of changes that count: of all, or only of those "up" or "down", 0 elsewhere.

    >>> sizes_of(np.array([-2.0, 1.0]), "up").tolist()
    [0.0, 1.0]
    """
    if direction == "both":
        return np.abs(changes)
    return np.maximum(changes if direction == "up" else -changes, 0)


def largest_changes(blocks: Iterable[np.ndarray], direction: str = "both") -> Movement:
    """Score every sample by its largest change between two consecutive rows, in nats (the paper's section 2).

    `direction` "up" or "down" counts only rises or only falls, in all the scores. Raises ValueError where there are
    fewer than two rows.

    >>> moved = largest_changes([np.array([[1, 5], [1.5, 4]], np.float32), np.array([[1.5, 6]], np.float32)])
    >>> moved.score.tolist(), moved.place.tolist()
    ([0.5, 2.0], [1, 2])
    """
    best = _Best()
    means: list[np.ndarray] = []
    for rows, start in _overlapping(blocks, 1, means):
        best.update(sizes_of(np.diff(rows, axis=0), direction), rows[1:], rows[:-1], start + 1)
    return best.movement(means, np.full(sum(map(len, means)), np.nan))


def variation(blocks: Iterable[np.ndarray], direction: str = "both") -> Movement:
    """Score every sample by the sum of the sizes of all its one-step changes, in nats; it is placed at the largest.

    Raises ValueError where there are fewer than two rows.

    >>> moved = variation([np.array([[1, 5], [1.5, 4], [1, 4]], np.float32)])
    >>> moved.score.tolist(), moved.place.tolist()
    ([1.0, 1.0], [1, 1])
    """
    best = _Best()
    means: list[np.ndarray] = []
    total: np.ndarray | None = None
    for rows, start in _overlapping(blocks, 1, means):
        sizes = sizes_of(np.diff(rows, axis=0), direction)
        total = sizes.sum(0, dtype=np.float64) + (0 if total is None else total)
        best.update(sizes, rows[1:], rows[:-1], start + 1)
    assert total is not None
    movement = best.movement(means, np.full(sum(map(len, means)), np.nan))
    return replace(movement, score=total.astype(np.float32))


def surprise(blocks: Iterable[np.ndarray], direction: str = "both") -> Movement:
    """Score every sample by its largest one-step change in units of how much it moved in the W steps before.

    The unit is the mean size of its own W changes before, plus the mean of that over all samples, so that a sample
    that always moves does not lead and one that hardly ever does needs a real change to. Raises ValueError where there
    are fewer than W + 2 rows.
    """
    best = _Best()
    means: list[np.ndarray] = []
    for rows, start in _overlapping(blocks, WIDTH + 1, means):
        changes = np.diff(rows, axis=0)
        history = _moving_sums(np.abs(changes[:-1])) / WIDTH
        sizes = sizes_of(changes, direction)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores = np.nan_to_num(sizes[WIDTH:] / (history + history.mean(1, keepdims=True)), posinf=0)
        best.update(scores, rows[WIDTH + 1 :], rows[WIDTH:-1], start + WIDTH + 1)
    return best.movement(means, np.full(sum(map(len, means)), np.nan))


def _moving_sums(e: np.ndarray) -> np.ndarray:
    """Sums over W rows, (R - W + 1, S), by 2, 4, ... rows: exact in order, wherever a block begins."""
    reach = 1
    while reach < WIDTH:
        e = e[reach:] + e[:-reach]
        reach *= 2
    return e


def oscillation(blocks: Iterable[np.ndarray], direction: str = "both") -> Movement:
    """Score every sample by its amplitude at period two, relative to that of all samples at the same time.

    With dd_t = (L_{t+1} - 2 L_t + L_{t-1}) / 4 and e_t = (-1)^t dd_t, the score is the largest size over time of the
    moving mean of e over W steps, divided at each time by its root mean square over samples: one spike does not
    decide everything. Only times at which the run alternates count (see ALTERNATES), as there is nothing but
    rounding and curvature to divide elsewhere. Rows must be one step apart. Raises ValueError where there are fewer
    than W + 2 rows. With a `direction` only times count at which the sample's swing is up, or down.
    """
    best = _Best()
    means: list[np.ndarray] = []
    alternation: list[np.ndarray] = []
    for rows, start in _overlapping(blocks, WIDTH + 1, means):
        swings, ratio = _swings(rows, start)
        if direction == "both":
            sizes = np.abs(swings, out=swings)
        else:  # the last change in a mean goes up where the second difference behind its last e is negative
            last = (start + WIDTH + np.arange(len(swings))) % 2 * 2 - 1
            sizes = sizes_of(swings * last[:, None].astype(np.float32), direction)
        # The last e in a mean is centred one row before the newest: that row is the change that is reported.
        best.update(sizes, rows[WIDTH : WIDTH + len(sizes)], rows[WIDTH - 1 : WIDTH - 1 + len(sizes)], start + WIDTH)
        alternation.append(ratio)
    undefined = np.full(WIDTH, np.nan)
    return best.movement(means, np.concatenate([undefined, *alternation, undefined[:1]]))


def _overlapping(
    blocks: Iterable[np.ndarray], overlap: int, means: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks with the `overlap` rows before them in front, and the first row's place; each row's mean on the way."""
    carry: np.ndarray | None = None
    start = 0
    for block in blocks:
        means.append(block.mean(axis=1, dtype=np.float64))
        rows = np.array(block) if carry is None else np.concatenate([carry, block])
        if len(rows) > overlap:
            yield rows, start
            start += len(rows) - overlap
            rows = rows[-overlap:]
        carry = rows
    if start == 0:
        raise ValueError(f"{0 if carry is None else len(carry)} rows are too few: at least {overlap + 1} are needed")


def _swings(rows: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Moving means of e over W steps, (R - W - 1, S), and the alternation, (R - W - 1,).

    The means have unit root mean square over samples, and are 0 at times that do not alternate.
    """
    count = len(rows) - WIDTH - 1
    swings = np.empty((count, rows.shape[1]), np.float32)
    sign = np.where((start + 1 + np.arange(len(rows) - 2)) % 2, -0.25, 0.25).astype(np.float32)[:, None]
    movement = np.zeros(len(rows) - 1)
    for first in range(0, rows.shape[1], _TILE):
        tile = rows[:, first : first + _TILE]
        changes = tile[1:] - tile[:-1]
        e = changes[1:] - changes[:-1]
        e *= sign
        movement += np.einsum("ts,ts->t", changes, changes) / 4  # at period two a change is twice the amplitude
        swings[:, first : first + _TILE] = _moving_sums(e)
    swings /= WIDTH
    power = np.einsum("ts,ts->t", swings, swings, dtype=np.float64)
    movement = (movement[1:] + movement[:-1]) / 2  # each e is of two changes, and at most as large as both are
    total = np.convolve(movement, np.full(WIDTH, 1 / WIDTH), "valid")
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.sqrt(power / total)
        scale = 1 / np.sqrt(power / rows.shape[1])
    swings *= np.where(ratio > ALTERNATES, scale, 0).astype(np.float32)[:, None]
    return swings, ratio


class _Best:
    """The largest score of every sample so far, and where it was."""

    def __init__(self) -> None:
        self.score: np.ndarray | None = None

    def update(self, sizes: np.ndarray, after: np.ndarray, before: np.ndarray, start: int) -> None:
        """Fold in (R, S) scores of rows `start` on, with the losses after and before each."""
        if self.score is None:
            self.score = np.full(sizes.shape[1], -1, np.float32)
            self.place = np.zeros(sizes.shape[1], np.int64)
            self.before, self.after = (np.zeros(sizes.shape[1], np.float32) for _ in range(2))
        assert self.score is not None
        better = np.flatnonzero(sizes.max(axis=0) > self.score)
        if not better.size:
            return
        row = sizes[:, better].argmax(axis=0)
        self.score[better] = sizes[row, better]
        self.place[better] = start + row
        self.after[better] = after[row, better]
        self.before[better] = before[row, better]

    def movement(self, means: list[np.ndarray], alternation_T: np.ndarray) -> Movement:
        assert self.score is not None
        return Movement(self.score, self.place, self.before, self.after, np.concatenate(means), alternation_T)


def top(score: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest scores, (count,), largest first; equal scores in order of position.

    >>> top(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist()
    [1, 2, 3]
    """
    return np.argsort(-score, kind="stable")[:count]

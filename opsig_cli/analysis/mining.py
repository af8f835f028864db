"""Mining: one streamed pass over per-sample losses that finds the samples that move most.

T steps, S samples, R rows of a block, W steps of a moving mean. Blocks are consecutive (R, S) float32 arrays, so memory
is bounded by a few blocks and does not depend on T.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from opsig_cli.analysis.period_two import ALTERNATES, TILE, WIDTH, Swings, swings

LASTS = 8
"""Rows in succession that must alternate so that a run is said to: one spike moves the means of W rows."""


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
    lines: list[np.ndarray] = []  # rows of the piece, and two before it
    start = 0
    for found, rows in swings(blocks):
        lines = [*lines[-2:], *rows]
        first = start + len(rows) - len(lines)
        # The last second difference in a mean is centred one row before the newest: that row's change is reported.
        known = max(0, WIDTH + 1 - start)
        if start <= WIDTH + 1 < start + len(rows):
            best.begin(WIDTH, lines[WIDTH - first], lines[WIDTH - 1 - first])
        if (found.alternation_R[known:] > ALTERNATES).any():
            columns, at, score = _larger(found, known, direction, best.score)
            best.put(columns, score, start - 1 + at, lines, first)
        means.append(found.mean_R)
        alternation.append(found.alternation_R)
        start += len(rows)
        lines, rows = lines[-2:], []  # the rest need not be held while the next are read
    if start < WIDTH + 2:
        raise ValueError(f"{start} rows are too few: at least {WIDTH + 2} are needed")
    undefined = np.full(WIDTH, np.nan)
    return best.movement(means, np.concatenate([undefined, np.concatenate(alternation)[WIDTH + 1 :], undefined[:1]]))


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


def _larger(
    found: Swings, known: int, direction: str, score_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The samples whose swing, over the spread, is above their score in a row of a piece from `known` on that
    alternates, and where it is largest: columns, rows of the piece, and scores, (N,) each."""
    with np.errstate(divide="ignore"):
        factor = np.where(found.alternation_R > ALTERNATES, 1 / found.spread_R, 0).astype(np.float32)
    factor[:known] = 0
    if direction == "up":  # the change goes up where the second difference that it ends is negative
        factor = -factor
    columns, rows, scores = [], [], []
    for first in range(0, len(score_S), TILE):
        sizes = found.swing_RS[:, first : first + TILE] * factor[:, None]
        if direction == "both":
            np.abs(sizes, out=sizes)
        better = np.flatnonzero(sizes.max(axis=0) > score_S[first : first + TILE])
        row = sizes[:, better].argmax(axis=0)
        columns.append(first + better)
        rows.append(row)
        scores.append(sizes[row, better])
    return np.concatenate(columns), np.concatenate(rows), np.concatenate(scores)


class _Best:
    """The largest score of every sample so far, and where it was."""

    score: np.ndarray
    place: np.ndarray
    before: np.ndarray
    after: np.ndarray

    def __init__(self) -> None:
        self._begun = False

    def update(self, sizes: np.ndarray, after: np.ndarray, before: np.ndarray, start: int) -> None:
        """Fold in (R, S) scores of rows `start` on, with the losses after and before each."""
        if not self._begun:
            self.begin(0, np.zeros(sizes.shape[1]), np.zeros(sizes.shape[1]))
            self.score[:] = -1
        better = np.flatnonzero(sizes.max(axis=0) > self.score)
        if not better.size:
            return
        row = sizes[:, better].argmax(axis=0)
        self.score[better] = sizes[row, better]
        self.place[better] = start + row
        self.after[better] = after[row, better]
        self.before[better] = before[row, better]

    def begin(self, place: int, after: np.ndarray, before: np.ndarray) -> None:
        """Every sample has the score 0, at one row."""
        self._begun = True
        self.score = np.zeros(len(after), np.float32)
        self.place = np.full(len(after), place, np.int64)
        self.after, self.before = (np.array(losses, np.float32) for losses in (after, before))

    def put(
        self, columns: np.ndarray, score: np.ndarray, place: np.ndarray, lines: Sequence[np.ndarray], first: int
    ) -> None:
        """Give some samples a larger score, at rows that `lines`, rows (S,) from `first` on, have and those before."""
        self.score[columns], self.place[columns] = score, place
        for at in np.unique(place).tolist():
            here = columns[place == at]
            self.after[here], self.before[here] = lines[at - first][here], lines[at - 1 - first][here]

    def movement(self, means: list[np.ndarray], alternation_T: np.ndarray) -> Movement:
        return Movement(self.score, self.place, self.before, self.after, np.concatenate(means), alternation_T)


def top(score: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` largest scores, (count,), largest first; equal scores in order of position.

    >>> top(np.array([1.0, 3.0, 3.0, 2.0]), 3).tolist()
    [1, 2, 3]
    """
    order = -score
    if count < len(score):  # only those that reach the last of them are put in order
        within = np.flatnonzero(~(order > np.partition(order, count - 1)[count - 1])) if count else np.arange(0)
        return within[np.argsort(order[within], kind="stable")[:count]]
    return np.argsort(order, kind="stable")

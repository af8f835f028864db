"""What of a series of losses was measured: gaps, samples that are not finite, and a run that diverged, told apart.

T rows, S samples. A cell that is not finite and comes before a finite one of its sample is a gap: parameters, or an
input, that are not finite never become so again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SUDDEN = 3
"""Rows within which losses stop being finite in a run that diverges: some overflow before the others."""


@dataclass(frozen=True)
class Coverage:
    """Which losses are there. `rows` T; `gaps` of the cells before `diverged` were not measured.

    `first_S`, `first_row_S`: each sample's first finite loss, float32, and its row; NaN and T without any. `broken_N`:
    columns of samples that are not finite while the others are, increasing in `broken_row_N`, the row from which on,
    or, where `passing_N`, at which, they are not. `diverged`: the row from which on most are not, None for a run that
    did not diverge.
    """

    rows: int
    gaps: int
    first_S: np.ndarray
    first_row_S: np.ndarray
    broken_N: np.ndarray
    broken_row_N: np.ndarray
    diverged: int | None
    passing_N: np.ndarray

    @property
    def never(self) -> np.ndarray:
        """Columns of samples without any finite loss."""
        return np.flatnonzero(self.first_row_S == self.rows)

    @property
    def sparse(self) -> float:
        """The share of cells that are gaps, 0 to 1."""
        rows = self.rows if self.diverged is None else self.diverged
        return self.gaps / max(1, rows * len(self.first_S))


def coverage(blocks: Iterable[np.ndarray], samples: int, targets_S: np.ndarray | None = None) -> Coverage:
    """Go once over consecutive (R, S) blocks of losses. `targets_S`: which samples have a loss; None where all have.

    A sample ends where it has no finite loss for more than twice as long as it, or half of the samples, usually went
    without one. Where most samples end the run diverged; a sample that ends alone, never has a finite loss, or is
    infinite somewhere, is broken.

    >>> found = coverage([np.array([[1, 2, 3], [np.nan, 2, 3], [np.nan, 2, 3], [1, 2, np.nan]])], 3)
    >>> found.gaps, found.broken_N.tolist(), found.broken_row_N.tolist(), found.diverged
    (2, [2], [3], None)
    """
    first_S = np.full(samples, np.nan, np.float32)
    first_row_S = np.full(samples, -1)
    last_S, longest_S, infinite_S = np.full(samples, -1), np.zeros(samples, int), np.full(samples, -1)
    pending_S, within = np.zeros(samples, int), 0  # infinite losses since the last finite one, and before one
    measured, row = [], 0
    for block in blocks:
        for values, good in zip(block, np.isfinite(block), strict=True):
            longest_S = np.where(good, np.maximum(longest_S, row - last_S - 1), longest_S)
            new = good & (last_S < 0)
            if new.any():
                first_S[new], first_row_S[new] = values[new], row
            if not good.all():
                infinite = np.isinf(values)
                infinite_S[infinite & (infinite_S < 0)] = row
                pending_S += infinite
            last_S[good] = row
            within += int(pending_S[good].sum())
            pending_S[good] = 0
            measured.append(int(good.sum()))
            row += 1
    first_row_S[first_row_S < 0] = row
    seen_S = last_S >= 0
    usual = float(np.median(longest_S[seen_S])) if seen_S.any() else 0.0
    usual_S = np.maximum(longest_S, usual)
    ended_S = seen_S & (row - 1 - last_S > 2 * usual_S)
    diverged = _diverged(last_S, seen_S, ended_S, row, sudden=0 if usual else SUDDEN)
    end = row if diverged is None else diverged
    start_S = np.where(ended_S, last_S + 1, np.where(seen_S, row, 0))
    start_S = np.where((infinite_S >= 0) & (infinite_S < start_S), infinite_S, start_S)
    if targets_S is not None:
        start_S[~targets_S] = end  # there is nothing to miss
    broken = np.flatnonzero(start_S < end)
    broken = broken[np.argsort(start_S[broken], kind="stable")]
    whole = (ended_S | ~seen_S) & (start_S < end)
    lost = int(np.maximum(0, end - np.where(seen_S, last_S + 1, 0))[whole].sum())
    if targets_S is not None:
        lost += int((~targets_S).sum()) * end
    gaps = max(0, samples * end - sum(measured[:end]) - lost - within)
    return Coverage(
        row, gaps, first_S, first_row_S, broken, start_S[broken], diverged, last_S[broken] > start_S[broken]
    )


def _diverged(last_S: np.ndarray, seen_S: np.ndarray, ended_S: np.ndarray, rows: int, sudden: int) -> int | None:
    """The row from which on none, or not most, of the samples that were seen have a finite loss; `sudden` rows earlier
    where the first of them end then."""
    ends = np.sort(last_S[ended_S]) + 1
    row = int(last_S.max(initial=-1)) + 1
    if len(ends) > seen_S.sum() / 2 and (sudden or row == rows):
        row = int(ends[int(seen_S.sum() / 2)])
    return None if row == rows else int(min([row, *ends[ends >= row - sudden][:1]]))


def held(losses_TS: np.ndarray, before_S: np.ndarray) -> np.ndarray:
    """The losses with each one that is not finite replaced by the sample's last finite one, or by `before_S` (S,).

    >>> held(np.array([[np.nan, 2], [3, np.nan], [np.inf, 4]]), np.array([1, 1])).tolist()
    [[1.0, 2.0], [3.0, 2.0], [3.0, 4.0]]
    """
    good = np.isfinite(losses_TS)
    if good.all():
        return losses_TS
    last = np.maximum.accumulate(np.where(good, np.arange(len(losses_TS))[:, None], -1), axis=0)
    found = np.take_along_axis(losses_TS, np.maximum(last, 0), axis=0)
    return np.where(last >= 0, found, before_S.astype(losses_TS.dtype))

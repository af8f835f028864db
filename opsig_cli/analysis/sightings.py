"""What a loss would have been expected to be, where samples are seen only in their batches: the trend of all samples,
and how the sample stood to it when it was seen before.

T steps that have sightings, S samples, B samples of a batch, W steps of a window. Losses in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTH = 16
"""W: steps that the trend is taken from, more where these have fewer than ENOUGH sightings."""
ENOUGH = 512
OUTLYING = 4.0
"""Median absolute deviations beyond which a batch is no part of the trend."""
MEMORY = 16
"""Batches after which what was learned of how a deviation lasts has faded to 1/e."""
LAST = 0.75
"""Weight of a sample's last deviation against those before, by which the next was predicted best in the runs of
benchmarks/spike_log.py: root mean square of what is left .47 and .49, with a half or with all of it .49 to .51."""
PRIOR = 64
"""Sightings that the first guess of it, a half, counts for."""
_STEPS = 4096  # steps whose windows are looked at together


@dataclass(frozen=True)
class Trend:
    """The mean loss of all samples around each step, (T,): `before` from the steps before it alone, NaN at the first;
    `around` from those on both sides, with it."""

    before: np.ndarray
    around: np.ndarray


def trend(means_T: np.ndarray, counts_T: np.ndarray) -> Trend:
    """The trend of batch means (T,), of so many sightings each (T,), without batches that stand out of their window: a
    spike, which is what is looked for, is no part of what was to be expected.

    >>> trend(np.array([2.0, 2, 2, 9, 2]), np.full(5, 600)).before.tolist()
    [nan, 2.0, 2.0, 2.0, 2.0]
    """
    known = counts_T > 0
    usual = float(np.median(counts_T[known])) if known.any() else 1.0
    width = max(WIDTH, int(np.ceil(ENOUGH / max(1.0, usual))))
    half = width // 2
    before, around = np.full(len(means_T), np.nan), np.full(len(means_T), np.nan)
    padded = np.concatenate([np.full(width, np.nan), np.where(known, means_T, np.nan), np.full(half, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)  # of step t from t on: the W steps before it
    for first in range(0, len(means_T), _STEPS):
        last = min(first + _STEPS, len(means_T))
        before[first:last] = _usual(windows[first:last])
        around[first:last] = _usual(np.concatenate([windows[first + half : last + half], padded[
            width + half + first : width + half + last, None]], axis=1))  # fmt: skip
    return Trend(before, around)


def _usual(means_TW: np.ndarray) -> np.ndarray:
    """The mean of each row (T,) without what lies outside; NaN for a row without any number."""
    some = np.isfinite(means_TW).any(axis=1)
    found = np.full(len(means_TW), np.nan)
    rows = means_TW[some]
    middle = np.nanmedian(rows, axis=1, keepdims=True)
    spread = np.nanmedian(np.abs(rows - middle), axis=1, keepdims=True)
    found[some] = np.nanmean(np.where(np.abs(rows - middle) <= OUTLYING * spread + 1e-12, rows, np.nan), axis=1)
    return found


@dataclass(frozen=True)
class Expected:
    """Of each sample of a batch (B,): the loss that was to be `expected`, `excess` above it, both float64 and NaN where
    nothing is known, and the place in time at which the sample was seen `before`, -1 for never. `usual`: the root mean
    square of excesses of late, NaN where there are none."""

    expected: np.ndarray
    excess: np.ndarray
    before: np.ndarray
    usual: float


class Expectation:
    """Goes over batches in order of step and says of each what was to be expected before it was seen.

    A sample's deviation from the trend, averaged over its sightings so far, the last counting LAST, is taken to last
    in part; which part is learned from all samples that are seen again. Never looks ahead of a batch, but for the trend
    that a deviation is taken from. Memory is 16 bytes a sample.
    """

    def __init__(self, samples: int, trend: Trend):
        self._trend = trend
        self._deviation_S = np.zeros(samples)
        self._before_S = np.full(samples, -1)
        self._excess = np.zeros(2)  # of excesses: squares, and how many, fading
        self._moments = np.zeros(3)  # of deviations before and after: xx, xy, and how many, fading

    @property
    def lasting(self) -> float:
        """The part of a deviation that lasts from one sighting to the next."""
        xx, xy, count = self._moments
        if xx <= 0:
            return 0.5
        return max(0.0, float((xy + 0.5 * PRIOR * xx / count) / (xx + PRIOR * xx / count)))

    def __call__(self, t: int, place_B: np.ndarray, loss_B: np.ndarray) -> Expected:
        """The batch at place `t` in time: columns of its samples (B,) and their losses (B,), NaN where not known."""
        loss_B = np.where(np.isfinite(loss_B), loss_B, np.nan).astype(np.float64)
        before_B = self._before_S[place_B]
        deviation_B = self._deviation_S[place_B]
        expected_B = self._trend.before[t] + self.lasting * deviation_B
        excess_B = loss_B - expected_B
        squares, known = self._excess
        found = Expected(expected_B, excess_B, before_B, float(np.sqrt(squares / known)) if known else float("nan"))
        self._excess *= np.exp(-1 / MEMORY)
        self._excess += [float(np.nansum(excess_B**2)), float(np.isfinite(excess_B).sum())]
        good = np.isfinite(loss_B)
        place, new = place_B[good], loss_B[good] - self._trend.around[t]
        again = before_B[good] >= 0
        x, y = deviation_B[good][again], new[again]
        self._moments *= np.exp(-1 / MEMORY)
        self._moments += [float(x @ x), float(x @ y), len(x)]
        self._deviation_S[place] = np.where(again, (1 - LAST) * self._deviation_S[place] + LAST * new, new)
        self._before_S[place] = t
        return found


def shares_of(excess_B: np.ndarray) -> np.ndarray:
    """Each sample's part of what a batch's loss is above (or below) the expected, (B,): they add up to 1. NaN where
    nothing is known of one, or there is no excess.

    >>> shares_of(np.array([3.0, 1.5, -0.5])).tolist()
    [0.75, 0.375, -0.125]
    """
    whole = float(np.nansum(excess_B))
    return excess_B / whole if whole else np.full(len(excess_B), np.nan)

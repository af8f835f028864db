"""What speaks for a group, and for a pair of groups that oppose. M samples, G groups, C checkpoints, T steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLUMNS = 4096
"""Samples whose changes are held in float64 at a time."""
NET = 0.1
"""Part of all movement below which a net change is close to zero, and no part of it says anything."""


def of_net(part: float, net: float, movement: float) -> float | None:
    """The part of a net change, None where that is close to zero beside all movement.

    >>> of_net(2.0, 4.0, 8.0), of_net(2.0, 0.4, 8.0)
    (0.5, None)
    """
    return part / net if net and abs(net) >= NET * movement else None


@dataclass(frozen=True)
class Rise:
    """Loss changes at the step where the whole loss rose most: `changes_M` of the samples weighed, `whole` summed over
    all samples, `movement` their sizes summed over all samples, in nats."""

    changes_M: np.ndarray
    whole: float
    movement: float

    def share(self, members: np.ndarray) -> float:
        """The part of the rise that the members carry: below 0 or above 1 where others make up for it; NaN without, or
        where it is close to zero beside all movement."""
        part = of_net(float(self.changes_M[members].sum()), self.whole, self.movement) if self.whole > 0 else None
        return float("nan") if part is None else part

    def share_of_movement(self, members: np.ndarray) -> float:
        """The part of all samples' movement, up or down, that the members carry, 0 to 1."""
        return float(np.abs(self.changes_M[members]).sum()) / self.movement if self.movement > 0 else float("nan")

    def mean(self, members: np.ndarray) -> float:
        """Mean change of the members, in nats."""
        return float(self.changes_M[members].mean())


def within(similarity_MM: np.ndarray, members: np.ndarray) -> float:
    """Mean similarity of every two of the members; NaN for fewer than two.

    >>> within(np.array([[1.0, 0.5], [0.5, 1.0]]), np.array([0, 1]))
    0.5
    """
    if len(members) < 2:
        return float("nan")
    block = similarity_MM[np.ix_(members, members)]
    return float((block.sum(dtype=np.float64) - np.trace(block)) / (len(members) * (len(members) - 1)))


def mean_and_error(values_C: np.ndarray) -> tuple[float, float]:
    """Mean over checkpoints and its standard error, NaN for one checkpoint.

    >>> mean_and_error(np.array([-0.5, -0.7]))
    (-0.6, 0.1)
    """
    error = float(values_C.std(ddof=1) / np.sqrt(len(values_C))) if len(values_C) > 1 else float("nan")
    return float(values_C.mean()), round(error, 12)


def interval(values_C: np.ndarray, level: float = 0.05) -> tuple[float, float]:
    """Where the mean lies, both ends one-sided at `level`, by Student's t; NaN for fewer than two values.

    >>> low, high = interval(np.array([-0.5, -0.7, -0.6]))
    >>> round(low, 3), round(high, 3)
    (-0.769, -0.431)
    """
    from scipy.special import stdtrit  # scipy.stats takes most of a second to import

    mean, error = mean_and_error(values_C)
    reach = float(-stdtrit(len(values_C) - 1, level)) * error if len(values_C) > 1 else float("nan")
    return mean - reach, mean + reach


def mean_losses(losses_TM: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """Mean loss of every group's members, (T, G) float64."""
    return np.stack([losses_TM[:, group].mean(1, dtype=np.float64) for group in members], 1)


def swing(losses_TM: np.ndarray) -> float:
    """Mean size of the halved second differences, in nats: steady drift counts nothing, period two with amplitude a
    counts 2 a.

    >>> swing(np.arange(5.0)[:, None] + np.array([[1], [-1], [1], [-1], [1]]))
    2.0
    """
    return float(np.abs(np.diff(losses_TM.astype(np.float64), 2, axis=0)).mean() / 2)


def correlation_without_drift(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of the second differences of two series, (T,): common drift does not count; NaN where one
    does not move or there are fewer than two of them.

    >>> drift = -0.1 * np.arange(9)
    >>> swings = np.resize([1.0, -1.0], 9)
    >>> round(correlation_without_drift(drift + swings, drift - swings), 6)
    -1.0
    """
    if len(a) < 4:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(np.diff(a, 2), np.diff(b, 2))[0, 1])


def moves_apart(a: np.ndarray, b: np.ndarray) -> int | None:
    """The row, 1 or more, after the change in which two series, (T,), move apart most: by the smaller of the two moves.

    None where they never do.

    >>> moves_apart(np.array([0.0, 1.0, 1.5, 1.0]), np.array([0.0, 1.0, 0.8, 3.0]))
    3
    """
    changes = np.diff(a), np.diff(b)
    apart = np.where(changes[0] * changes[1] < 0, np.minimum(*np.abs(changes)), 0)
    return int(apart.argmax()) + 1 if apart.size and apart.max() > 0 else None


def period_two(losses_TM: np.ndarray) -> float:
    """The share of the samples' movement that turns back in the next step, -1 to 1: 1 is nothing but period two.

    It is minus the correlation of consecutive changes, over all samples: steady drift has -1, white noise 0.5.

    >>> period_two(np.resize([[1.0], [-1.0]], (50, 1)))
    1.0
    """
    after, before, product = 0.0, 0.0, 0.0
    for first in range(0, losses_TM.shape[1], COLUMNS):
        changes = np.diff(losses_TM[:, first : first + COLUMNS].astype(np.float64), axis=0)
        after, before = after + (changes[1:] ** 2).sum(), before + (changes[:-1] ** 2).sum()
        product += (changes[1:] * changes[:-1]).sum()
    power = np.sqrt(after * before)
    return round(float(-product / power), 12) if power > 0 else float("nan")

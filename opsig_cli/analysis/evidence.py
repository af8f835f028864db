"""What speaks for a group, and for a pair of groups that oppose. M samples, G groups, C checkpoints, T steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rise:
    """Loss changes at the step where the whole loss rose most: `changes_M` of the samples weighed, `whole` summed over
    all samples, `movement` their sizes summed over all samples, in nats."""

    changes_M: np.ndarray
    whole: float
    movement: float

    def share(self, members: np.ndarray) -> float:
        """The part of the rise that the members carry: below 0 or above 1 where others make up for it; NaN without."""
        return float(self.changes_M[members].sum()) / self.whole if self.whole > 0 else float("nan")

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


def mean_changes(losses_TM: np.ndarray, members: np.ndarray) -> np.ndarray:
    """One-step changes of the members' mean loss, (T - 1,) float64."""
    return np.diff(losses_TM[:, members].mean(1, dtype=np.float64))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of two series, (T,); NaN where one does not move."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(a, b)[0, 1])


def group_correlation(losses_TM: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """Correlation of the mean loss changes of every two groups, (G, G)."""
    if len(members) < 2:
        return np.ones((len(members), len(members)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(np.stack([mean_changes(losses_TM, group) for group in members]))


def period_two(losses_TM: np.ndarray) -> float:
    """The share of the samples' movement that turns back in the next step, -1 to 1: 1 is nothing but period two.

    It is minus the correlation of consecutive changes, over all samples: steady drift has -1, white noise 0.5.

    >>> period_two(np.resize([[1.0], [-1.0]], (50, 1)))
    1.0
    """
    changes = np.diff(losses_TM.astype(np.float64), axis=0)
    power = np.sqrt((changes[1:] ** 2).sum() * (changes[:-1] ** 2).sum())
    return round(float(-(changes[1:] * changes[:-1]).sum() / power), 12) if power > 0 else float("nan")

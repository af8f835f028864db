"""Random samples to be weighted instead of those that a branch names. S samples, M of them changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RANDOM, SAME_LABELS = "random", "same labels"


@dataclass(frozen=True)
class Control:
    """One draw: `kind` is RANDOM or SAME_LABELS; `weights_S` has the branch's weights at other samples."""

    kind: str
    draw: int
    weights_S: np.ndarray

    @property
    def changed(self) -> np.ndarray:
        """Columns of the samples drawn."""
        return np.flatnonzero(self.weights_S != 1)


def drawn(
    weights_S: np.ndarray, labels_S: np.ndarray | None, draws: int, targets_S: np.ndarray | None = None
) -> tuple[list[Control], list[str]]:
    """Draws of as many other samples as the branch weights, any and of the same labels, and what could not be drawn.

    `targets_S`: which samples have a loss, and can be drawn; None where all have.

    Each sample drawn takes the weight of one that it stands for. A draw is the same for the same branch and number.
    """
    changed = np.flatnonzero(weights_S != 1)
    outside = np.flatnonzero((weights_S == 1) if targets_S is None else (weights_S == 1) & targets_S)
    found: list[Control] = []
    lacks: list[str] = []
    if not len(changed) or not draws:
        return found, lacks
    if len(changed) > len(outside):
        lacks.append(f"no control of as many random samples: {len(outside):,} are left")
    else:
        found += [Control(RANDOM, draw, _of_any(weights_S, changed, outside, draw)) for draw in range(1, draws + 1)]
    if labels_S is None:
        return found, lacks
    short = [label for label in np.unique(labels_S[changed])
             if (labels_S[changed] == label).sum() > (labels_S[outside] == label).sum()]  # fmt: skip
    if short:
        lacks.append(f"no control of the same labels: too few others have the label {short[0]}")
    else:
        found += [
            Control(SAME_LABELS, draw, _of_labels(weights_S, changed, outside, labels_S, draw))
            for draw in range(1, draws + 1)
        ]
    return found, lacks


def _of_any(weights_S: np.ndarray, changed: np.ndarray, pool: np.ndarray, draw: int) -> np.ndarray:
    weights = np.ones_like(weights_S)
    weights[np.random.default_rng([draw, 0]).choice(pool, len(changed), replace=False)] = weights_S[changed]
    return weights


def _of_labels(
    weights_S: np.ndarray, changed: np.ndarray, outside: np.ndarray, labels_S: np.ndarray, draw: int
) -> np.ndarray:
    weights = np.ones_like(weights_S)
    generator = np.random.default_rng([draw, 1])
    for label in np.unique(labels_S[changed]):
        stood_for = changed[labels_S[changed] == label]
        pool = outside[labels_S[outside] == label]
        weights[generator.choice(pool, len(stood_for), replace=False)] = weights_S[stood_for]
    return weights

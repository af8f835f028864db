"""Samples by their slopes along the Hessian's leading eigenvectors: two ends of each, and coordinates for grouping.

C checkpoints, S samples, M of them that are grouped, K vectors. A slope is v'g(z) and a
curvature v'H(z)v of a sample z along an eigenvector v; the mean of the curvatures over all samples is the eigenvalue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.cutting import cut_tree, silhouette
from opsig_cli.analysis.gram import Gram, Similarity, formed

HALF = 0.5
"""Part of the squared slopes of one sign that an end holds."""
LIES = 1.0
"""A pair lies on a vector where both of its sides have a mean slope, of opposite signs, above this many times the root
mean square slope of all samples."""
SCALE = 0.5
"""Power of the root mean square that slopes along a vector are divided by. With 1 a feature that few samples have
counts as much as one that many have, but so does a vector of the bulk; with 0 the first vectors hide the others."""
PLATEAU = 0.9
"""Part of the best structure that a number of vectors must show to be taken."""
DRAWN = 300
"""Samples of which structure is looked at."""
ROUNDS = 4
"""Draws from the null of no structure."""


@dataclass(frozen=True)
class End:
    """One end of an eigenvector: samples (M,), the steepest first, their mean slope, their part of the eigenvalue."""

    members: np.ndarray
    slope: float
    share: float


def ends(slope_S: np.ndarray, curvature_S: np.ndarray) -> tuple[End, End]:
    """Who stands at the two ends of an eigenvector: of each sign the fewest samples with half of its squared slopes.

    The end with the larger part of the eigenvalue comes first: an eigenvector has no sign of its own.

    >>> [end.members.tolist() for end in ends(np.array([3.0, 0.1, -1.0, -2.0]), np.array([6.0, 0.0, 0.0, 4.0]))]
    [[0], [3]]
    """
    whole = float(curvature_S.sum())
    found = []
    for sign in (1.0, -1.0):
        size = np.maximum(sign * slope_S, 0)
        order = np.argsort(-size, kind="stable")[: int((size > 0).sum())]
        held = np.cumsum(size[order] ** 2)
        members = order[: int(np.searchsorted(held, HALF * held[-1])) + 1] if len(order) else order
        slope = float(slope_S[members].mean()) if len(members) else float("nan")
        found.append(End(members, slope, float(curvature_S[members].sum()) / whole if whole else float("nan")))
    found.sort(key=lambda end: -np.nan_to_num(end.share))
    return found[0], found[1]


@dataclass(frozen=True)
class Lying:
    """How two groups lie on an eigenvector: its place (0 is the first), both sides' mean slopes and parts of the
    eigenvalue, and the smaller mean slope in units of the root mean square slope of all samples."""

    rank: int
    slopes: tuple[float, float]
    shares: tuple[float, float]
    size: float


def lies_on(slope_SK: np.ndarray, curvature_SK: np.ndarray, sides: tuple[np.ndarray, np.ndarray]) -> list[Lying]:
    """The eigenvectors that two groups of samples stand at the two ends of (see LIES), the clearest first.

    >>> slopes = np.array([[2.0, 0.1], [-2.0, 0.1], [0.1, 2.0], [0.1, 0.1]])
    >>> [lying.rank for lying in lies_on(slopes, slopes**2, (np.array([0]), np.array([1])))]
    [0]
    """
    unit_K = np.sqrt((slope_SK**2).mean(0))
    whole_K = curvature_SK.sum(0)
    means = np.array([slope_SK[side].mean(0) for side in sides])  # (2, K)
    parts = np.array([curvature_SK[side].sum(0) for side in sides])
    found = []
    for rank in range(slope_SK.shape[1]):
        (a, b), unit = means[:, rank].tolist(), float(unit_K[rank])
        size = min(abs(a), abs(b)) / unit if unit > 0 else 0.0
        if a * b < 0 and size > LIES:
            shares = tuple((parts[:, rank] / whole_K[rank]).tolist())
            found.append(Lying(rank, (a, b), shares, size))
    return sorted(found, key=lambda lying: -lying.size)


def scaled(slopes_CSK: np.ndarray) -> np.ndarray:
    """Slopes along each vector at each checkpoint over a power of their root mean square (see SCALE)."""
    unit = np.sqrt((slopes_CSK.astype(np.float64) ** 2).mean(1, keepdims=True))
    return slopes_CSK / np.where(unit > 0, unit, 1) ** SCALE


def steepness(scaled_CSK: np.ndarray) -> np.ndarray:
    """How steep every sample's loss is along the vectors, (S,): the norm of its scaled slopes, mean of the checkpoints.

    >>> steepness(np.array([[[3.0, -4.0], [0.0, 1.0]]])).tolist()
    [5.0, 1.0]
    """
    return np.linalg.norm(scaled_CSK, axis=2).mean(0)


def coordinates(scaled_CSK: np.ndarray, count: int) -> np.ndarray:
    """Every sample's direction in its slopes along the first `count` vectors, (C, S, count) float32, of length one.

    Zero for a sample without slopes.
    """
    rows = scaled_CSK[:, :, :count]
    norm = np.linalg.norm(rows, axis=2, keepdims=True)
    return (rows / np.where(norm > 0, norm, 1)).astype(np.float32)


def similarity(coordinates_CMK: np.ndarray) -> Similarity:
    """Cosines of the coordinates of every two samples, averaged over checkpoints, (M, M) float32; of more than are
    formed by rows.

    >>> similarity(coordinates(np.array([[[1.0, 0.0], [-2.0, 0.0]]]), 2)).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    rows = np.concatenate(list(coordinates_CMK), 1) / np.sqrt(len(coordinates_CMK)).astype(np.float32)
    return rows @ rows.T if formed(len(rows)) else Gram(rows)


def structure(scaled_CMK: np.ndarray, smallest: int, seed: int = 0) -> np.ndarray:
    """How much better samples can be grouped by 1, 2, ... K leading vectors than where nothing is grouped, (K,).

    Grouped is what average linkage finds at its best cut: the silhouette times the share of samples in groups. Nothing
    is grouped in one Gaussian with the covariance of all vectors and checkpoints (Liu et al. 2008; the gap of
    Tibshirani et al. 2001). One vector alone parts any samples in two, and vectors of the bulk make all unlike.
    """
    generator = np.random.default_rng(seed)
    checkpoints, count, vectors = scaled_CMK.shape
    drawn = scaled_CMK[:, np.sort(generator.choice(count, min(DRAWN, count), replace=False))]
    found = np.zeros(vectors)
    for number in range(1, vectors + 1):
        rows = np.concatenate(list(scaled_CMK[:, :, :number]), 1)  # (M, C * number)
        values, axes = np.linalg.eigh(rows.T @ rows / count)
        root = axes * np.sqrt(np.maximum(values, 0))
        nothing = []
        for _ in range(ROUNDS):
            noise = generator.standard_normal((drawn.shape[1], len(values))) @ root.T
            noise = noise.reshape(-1, checkpoints, number).transpose(1, 0, 2)
            nothing.append(_grouped(noise, smallest))
        found[number - 1] = _grouped(drawn[:, :, :number], smallest) - np.mean(nothing)
    return found


def _grouped(rows_CMK: np.ndarray, smallest: int) -> float:
    found = similarity(coordinates(rows_CMK, rows_CMK.shape[2]))
    qualities = (silhouette(found, groups) * float(np.mean(groups >= 0)) for groups in cut_tree(found, smallest))
    return max(qualities, default=0.0)


def choose_count(structure_K: np.ndarray) -> int:
    """The largest number of leading vectors whose structure is PLATEAU of the best: a vector too many costs less than
    one too few, up to where the bulk begins.

    >>> choose_count(np.array([0.0, 0.55, 0.6, 0.58, 0.2]))
    4
    """
    best = structure_K.max()
    return int(np.flatnonzero(structure_K >= best - (1 - PLATEAU) * abs(best))[-1]) + 1

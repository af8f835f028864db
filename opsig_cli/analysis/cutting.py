"""Groups from a similarity alone: a tree by average linkage, and where to cut it. M samples, G groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opsig_cli.analysis.group_means import sums_over_groups

CUTS = np.linspace(0.3, 0.75, 10)
"""Heights of the dendrogram (distance 1 - S) that are tried."""


def cut_tree(similarity: np.ndarray, smallest: int, heights: np.ndarray = CUTS) -> Iterator[np.ndarray]:
    """Groups of at least `smallest` by average linkage, (M,) with -1 for none, at each of these heights."""
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(_distances(similarity), "average")
    for cut in heights:
        yield drop_small(fcluster(tree, cut, "distance"), smallest)


def best_cut(similarity: np.ndarray, smallest: int) -> np.ndarray:
    """The groups with the best silhouette times the share of samples in them, (M,)."""
    best, best_quality = np.full(len(similarity), -1), -np.inf
    for groups in cut_tree(similarity, smallest):
        quality = silhouette(similarity, groups) * float(np.mean(groups >= 0))
        if quality > best_quality:
            best, best_quality = groups, quality
    return best


def silhouette(similarity_MM: np.ndarray, groups_M: np.ndarray) -> float:
    """Mean silhouette, on the distance 1 - S, of the samples in groups 0, 1, ... (-1 is none); -1 for fewer than two.

    Rousseeuw 1987. Groups have two members or more. It comes from sums over groups, so that no matrix is copied.
    """
    inside = np.flatnonzero(groups_M >= 0)
    sums_MG, sizes = sums_over_groups(similarity_MM, groups_M)
    if len(sizes) < 2 or len(sizes) >= len(inside):
        return -1.0
    own = groups_M[inside]
    rows = np.arange(len(inside))
    within = 1 - (sums_MG[inside, own] - np.diagonal(similarity_MM)[inside]) / (sizes[own] - 1)
    between = 1 - sums_MG[inside] / sizes
    between[rows, own] = np.inf
    nearest = between.min(1)
    return float(np.mean((nearest - within) / np.maximum(np.maximum(nearest, within), 1e-12)))


def drop_small(groups: np.ndarray, smallest: int) -> np.ndarray:
    """Renumber groups 0, 1, ... and put -1 for members of groups below `smallest`."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    keep = (sizes >= smallest) & (names >= 0)
    new = np.where(keep, np.cumsum(keep) - 1, -1)
    return new[inverse]


def _distances(similarity: np.ndarray) -> np.ndarray:
    """1 - S of every two samples, as scipy condenses it: (M (M - 1) / 2,)."""
    count = len(similarity)
    found = np.empty(count * (count - 1) // 2)
    first = 0
    for i in range(count - 1):
        last = first + count - 1 - i
        np.subtract(1, similarity[i, i + 1 :], out=found[first:last])
        first = last
    return np.clip(found, 0, 2, out=found)

"""Means of a similarity over groups. M samples, G groups.

A similarity is a signed symmetric (M, M) array in [-1, 1]: +1 moves together, -1 pulls against. Groups are numbered 0
to G - 1 in (M,) integers, with -1 for none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opsig_cli.analysis.gram import Gram, Similarity

ROWS = 512
"""Rows of a similarity that are worked on at a time."""


def blocks_of_sums(similarity: Similarity, groups: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """ROWS samples at a time, and the sums of their similarity over each group, (m, G) float64."""
    sizes = sizes_of(groups)
    if not len(sizes):
        return
    if isinstance(similarity, Gram):
        members, starts = _in_order(groups, sizes)
        totals = similarity.totals(np.split(members, starts[1:]))
    else:
        whole, _ = sums_over_groups(similarity, groups)
    for first in range(0, len(groups), ROWS):
        rows = slice(first, min(first + ROWS, len(groups)))
        yield rows, similarity.sums(rows, totals) if isinstance(similarity, Gram) else whole[rows]


def sizes_of(groups: np.ndarray) -> np.ndarray:
    """Members of each group, (G,)."""
    return np.bincount(groups[groups >= 0], minlength=groups.max(initial=-1) + 1)


def sums_over_groups(similarity: Similarity, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of every sample's similarity over each group, (M, G) float64, and the groups' sizes, (G,)."""
    sizes = sizes_of(groups)
    if isinstance(similarity, Gram):
        sums = np.zeros((len(groups), len(sizes)))
        for rows, found in blocks_of_sums(similarity, groups):
            sums[rows] = found
        return sums, sizes
    sums_GM = np.zeros((len(sizes), len(groups)))
    members, _ = _in_order(groups, sizes)
    for first in range(0, len(members), ROWS):  # whole rows, which lie together: they are the columns as well
        part = members[first : first + ROWS]
        starts = np.flatnonzero(np.diff(groups[part], prepend=-1))
        sums_GM[groups[part[starts]]] += np.add.reduceat(similarity[part], starts, axis=0, dtype=np.float64)
    return sums_GM.transpose(), sizes


def between_groups(similarity_MM: Similarity, group_M: np.ndarray) -> np.ndarray:
    """Mean similarity of every two groups' members, (G, G) float64; on the diagonal each member's with itself counts.

    >>> between_groups(np.eye(3), np.array([0, 0, 1])).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    sizes = sizes_of(group_M)
    if not len(sizes):
        return np.zeros((0, 0))
    members, starts = _in_order(group_M, sizes)
    if isinstance(similarity_MM, Gram):
        totals = similarity_MM.totals(np.split(members, starts[1:]))
        return similarity_MM.scale * (totals @ totals.T) / np.outer(sizes, sizes)
    sums_MG, _ = sums_over_groups(similarity_MM, group_M)
    return np.add.reduceat(sums_MG[members], starts, axis=0) / np.outer(sizes, sizes)


def group_means(similarity_MM: Similarity, group_M: np.ndarray) -> np.ndarray:
    """Every sample's mean similarity with each group's members, itself among them, (M, G) float64.

    >>> group_means(np.eye(3), np.array([0, 0, -1])).tolist()
    [[0.5], [0.5], [0.0]]
    """
    sums_MG, sizes = sums_over_groups(similarity_MM, group_M)
    return sums_MG / np.maximum(sizes, 1)


def _in_order(groups: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The members of all groups, group after group, and where each group begins, (G,)."""
    members = np.argsort(groups, kind="stable")[len(groups) - sizes.sum() :]
    return members, np.concatenate([[0], np.cumsum(sizes)[:-1]])

"""How alike two groups look, held against how alike each is in itself, and which groups are one family. G groups.

A likeness is a signed (M, M) array in [-1, 1]: cosines of centred features.
"""

from __future__ import annotations

import numpy as np

from opsig_cli.analysis.gram import Gram, Similarity
from opsig_cli.analysis.group_means import between_groups

ALIKE = 0.8
"""Two groups look alike where they do so across at least this part as much as within.

The same for every task: it holds likeness against itself, so that it does not know how many classes there are or how
tight features are. Sides with one planted feature have .88 to 1.00 on images, opposing labels without one .2 to .6."""

LEAST = 1e-12
"""Typical likeness of samples of which no two have any, such as those of one input."""


def alike_between(likeness_MM: Similarity, group_M: np.ndarray) -> np.ndarray:
    """Mean likeness across every two groups over the geometric mean of that within each, (G, G).

    A sample's likeness with itself does not count. Groups whose members are less alike than any two samples are, in
    root mean square, are held against that: a whole class may be hardly alike in itself. NaN where no two samples
    have a likeness.

    >>> likeness = np.kron([[0.9, 0.6, 0.1], [0.6, 0.9, 0.1], [0.1, 0.1, 0.0]], np.ones((2, 2)))
    >>> np.fill_diagonal(likeness, 1)
    >>> round(float(alike_between(likeness, np.repeat([0, 1, -1], 2))[0, 1]), 3)
    0.667
    """
    sizes = np.bincount(group_M[group_M >= 0])
    return alike_groups(between_groups(likeness_MM, group_M), sizes, typical_likeness(likeness_MM))


def alike_groups(between_GG: np.ndarray, sizes: np.ndarray, typical: float) -> np.ndarray:
    """The same from the mean likeness of every two groups, their sizes and the `typical_likeness` of all samples."""
    within = (sizes * np.diagonal(between_GG) - 1) / np.maximum(sizes - 1, 1)
    own = np.sqrt(np.maximum(within, 0))
    alike_GG = between_GG / np.maximum(np.outer(own, own), typical)
    return np.where((between_GG == 0) & (typical <= LEAST), np.nan, alike_GG)


def typical_likeness(likeness_MM: Similarity) -> float:
    """Root mean square likeness of two samples."""
    if isinstance(likeness_MM, Gram):
        return max(float(np.sqrt(likeness_MM.mean_square())), LEAST)
    count = len(likeness_MM)
    total = float(np.einsum("ij,ij->", likeness_MM, likeness_MM, dtype=np.float64))
    total -= float((np.diagonal(likeness_MM).astype(np.float64) ** 2).sum())
    return max(float(np.sqrt(max(total, 0) / max(1, count * (count - 1)))), LEAST)


def families(linked_GG: np.ndarray) -> list[list[int]]:
    """Groups that links, (G, G) bool, connect, each family's in order; groups without a link are in none.

    >>> families(np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool))
    [[0, 1, 2]]
    """
    left = set(np.flatnonzero(linked_GG.any(1)).tolist())
    found = []
    while left:
        family, edge = set(), {min(left)}
        while edge:
            family |= edge
            edge = {int(other) for group in edge for other in np.flatnonzero(linked_GG[group])} - family
        found.append(sorted(family))
        left -= family
    return found

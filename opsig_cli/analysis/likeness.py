"""How alike two groups look, held against how alike each is in itself, and which groups are one family. G groups.

A likeness is a signed (M, M) array in [-1, 1]: cosines of centred features.
"""

from __future__ import annotations

import numpy as np

from opsig_cli.analysis.group_means import between_groups

ALIKE = 0.8
"""Two groups look alike where they do so across at least this part as much as within.

The same for every task: it holds likeness against itself, so that it does not know how many classes there are or how
tight features are. Sides with one planted feature have .88 to 1.00 on images, opposing labels without one .2 to .6."""


def alike_between(likeness_MM: np.ndarray, group_M: np.ndarray) -> np.ndarray:
    """Mean likeness across every two groups over the geometric mean of that within each, (G, G).

    A sample's likeness with itself does not count. NaN where a group is not alike in itself.

    >>> likeness = np.array([[1, 0.8, 0.4], [0.8, 1, 0.4], [0.4, 0.4, 1]])
    >>> float(alike_between(np.kron(likeness, np.ones((2, 2))), np.array([0, 0, 0, 0, 1, 1]))[0, 1].round(3))
    0.428
    """
    sizes = np.bincount(group_M[group_M >= 0])
    between = between_groups(likeness_MM, group_M)
    within = (sizes * np.diagonal(between) - 1) / np.maximum(sizes - 1, 1)
    own = np.sqrt(np.where(within > 0, within, np.nan))
    return between / np.outer(own, own)


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

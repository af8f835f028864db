"""Groups from a similarity alone: a tree by average linkage, and where to cut it. M samples, G groups."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from opsig_cli.analysis.agglomerating import average_linkage
from opsig_cli.analysis.gram import Gram, Similarity
from opsig_cli.analysis.group_means import blocks_of_sums, sizes_of

CUTS = np.linspace(0.3, 0.75, 10)
"""Heights of the dendrogram (distance 1 - S) that are tried."""
APART = 3.0
"""Two groups are never one where their members are this many times as far from each other as among themselves."""
CLOSE = 0.08
"""Mean distance up to which members of a group count as equally far: chance parts of one tight side were up to 0.2 from
each other, and two sides with features of their own from 0.29 on."""
MOST_HALVED = 2000
"""Members of a group up to which it is looked at whether it is two."""


def cut_tree(similarity: Similarity, smallest: int, heights: np.ndarray = CUTS) -> Iterator[np.ndarray]:
    """Groups of at least `smallest` by average linkage, (M,) with -1 for none, at each of these heights."""
    if isinstance(similarity, Gram):
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        count = len(similarity)
        pairs, merged = average_linkage(similarity, 1 - float(heights.max()))
        for cut in heights:
            ends = pairs[merged >= 1 - cut]
            edges = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
            yield drop_small(connected_components(edges, directed=False)[1], smallest)
        return
    from scipy.cluster.hierarchy import linkage

    order, apart = _in_order(linkage(_distances(similarity), "average"))
    groups = np.empty(len(order), np.int64)
    for cut in heights:
        cluster = np.concatenate([[0], np.cumsum(apart > cut)])  # of the samples in order
        keep = np.bincount(cluster) >= smallest
        groups[order] = np.where(keep, np.cumsum(keep) - 1, -1)[cluster]
        yield groups.copy()


def _in_order(tree: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples in an order in which every cluster of a tree of scipy's lies together, (M,), and the heights at which
    each two neighbours come into one cluster, (M - 1,)."""
    count = len(tree) + 1
    ends, heights = tree[:, :2].astype(int).tolist(), tree[:, 2].tolist()
    sizes = [1] * count + tree[:, 3].astype(int).tolist()
    first, apart = [0] * len(sizes), [0.0] * (count - 1)  # where a cluster begins
    for merged in range(count - 2, -1, -1):
        a, b = ends[merged]
        first[a] = first[count + merged]
        first[b] = first[a] + sizes[a]
        apart[first[b] - 1] = heights[merged]
    return np.argsort(first[:count]), np.array(apart)


def best_cut(similarity: Similarity, smallest: int) -> np.ndarray:
    """The groups with the best silhouette times the share of samples in them, (M,)."""
    best, best_quality = np.full(len(similarity), -1), -np.inf
    for groups in cut_tree(similarity, smallest):
        quality = silhouette(similarity, groups) * float(np.mean(groups >= 0))
        if quality > best_quality:
            best, best_quality = groups, quality
    return best


def halved(similarity: Similarity, groups_M: np.ndarray, smallest: int) -> np.ndarray:
    """The groups with every one that is two taken apart, (M,): a cut that is right for loose groups joins tight ones.

    >>> sides = np.repeat([0, 1], 4)
    >>> tight = np.where(np.equal.outer(sides, sides), 0.98, 0.7)
    >>> halved(tight, np.zeros(8, np.int64), 4).tolist(), halved(tight - 0.2, np.zeros(8, np.int64), 4).tolist()
    ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0])
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    groups = groups_M.copy()
    waiting = list(range(groups.max(initial=-1) + 1))
    while waiting:
        group = waiting.pop()
        members = np.flatnonzero(groups == group)
        if not 2 * smallest <= len(members) <= MOST_HALVED:
            continue
        block = similarity[np.ix_(members, members)]
        half = fcluster(linkage(_distances(block), "average"), 2, "maxclust") == 2
        if min(half.sum(), (~half).sum()) < smallest:
            continue
        if far_apart(*_within_and_across(block, half)):
            groups[members[half]] = groups.max() + 1
            waiting += [group, int(groups.max())]
    return groups


def far_apart(within: np.ndarray | float, across: np.ndarray | float) -> np.ndarray:
    """Whether groups at a mean distance `across`, of members at one of `within` in the looser group, are two."""
    return np.asarray(across) > APART * np.maximum(within, CLOSE)


def _within_and_across(block: np.ndarray, half: np.ndarray) -> tuple[float, float]:
    """Mean distance within the looser half and across, without a sample's own."""
    within = []
    for side in (half, ~half):
        own = block[np.ix_(side, side)].astype(np.float64)
        within.append(1 - (own.sum() - np.trace(own)) / (len(own) * (len(own) - 1)))
    return max(within), 1 - float(block[np.ix_(half, ~half)].mean(dtype=np.float64))


def silhouette(similarity_MM: Similarity, groups_M: np.ndarray) -> float:
    """Mean silhouette, on the distance 1 - S, of the samples in groups 0, 1, ... (-1 is none); -1 for fewer than two.

    Rousseeuw 1987. Groups have two members or more. It comes from sums over groups, so that no matrix is copied.
    """
    sizes = sizes_of(groups_M)
    if len(sizes) < 2 or len(sizes) >= sizes.sum():
        return -1.0
    itself_M, found = similarity_MM.diagonal(), []
    for block, sums_RG in blocks_of_sums(similarity_MM, groups_M):
        inside = np.flatnonzero(groups_M[block] >= 0)
        own, sums = groups_M[block][inside], sums_RG[inside]
        rows = np.arange(len(inside))
        within = 1 - (sums[rows, own] - itself_M[block][inside]) / (sizes[own] - 1)
        between = 1 - sums / sizes
        between[rows, own] = np.inf
        nearest = between.min(1)
        found.append((nearest - within) / np.maximum(np.maximum(nearest, within), 1e-12))
    return float(np.mean(np.concatenate(found)))


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

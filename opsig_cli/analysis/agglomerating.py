"""Average linkage of many samples whose similarity is known by rows. M samples, A clusters that are left, D numbers.

The mean similarity of two clusters is the product of their mean rows, so that a tree needs no more. Clusters that
are each other's nearest merge in any tree of average linkage, whatever merges elsewhere (Murtagh 1983): all such pairs
are merged at once, again and again, until few clusters are left, which go by chains of nearest neighbours. A cluster
that has no other at the least similarity asked for stays as it is for good, as a mean never exceeds its parts.
"""

from __future__ import annotations

import numpy as np

from opsig_cli.analysis.gram import Gram

FEW = 6000
"""A: clusters whose similarities are held as an array, 4 bytes a pair."""
BLOCK = 1024
"""Clusters whose similarities with others are made at a time."""
SLACK = 1e-4
"""A cluster may merge with its nearest, too, where the nearest has another nearer by so little: equal samples are all
nearest to one."""
SLOW = 0.05
"""Part of the clusters that a round must merge; otherwise the slack doubles, up to MOST_SLACK."""
MOST_SLACK = 0.01

Merges = tuple[np.ndarray, np.ndarray]
"""Samples of the two clusters that merge, one of each, (n, 2), and their mean similarity, (n,)."""


def average_linkage(gram: Gram, least: float) -> Merges:
    """The merges of average linkage at a mean similarity of `least` or more, in no order.

    >>> rows = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, -1.0]], np.float32)
    >>> pairs, similarity = average_linkage(Gram(rows), 0.5)
    >>> pairs.tolist(), similarity.round(3).tolist()
    ([[0, 1]], [0.8])
    """
    left = _Clusters(np.asarray(gram.rows_MD, np.float32) * np.float32(np.sqrt(gram.scale)))
    pairs, heights, slack = [], [], SLACK
    while len(left.sizes_A) > FEW:
        before = len(left.sizes_A)
        near_A = left.similarity_A >= least
        which = np.flatnonzero(near_A & (left.similarity_A >= left.similarity_A[left.nearest_A] - slack))
        ends = np.stack([which, left.nearest_A[which]], 1)
        pairs.append(left.sample_A[ends])
        heights.append(left.similarity_A[which])
        left.merge(ends, near_A)
        slack = min(MOST_SLACK, 2 * slack) if len(left.sizes_A) > (1 - SLOW) * before else slack
    last, found = _chains(left.means_AD @ left.means_AD.T, left.sizes_A, least)
    return np.concatenate([*pairs, left.sample_A[last]]), np.concatenate([*heights, found])


class _Clusters:
    """Clusters by their mean rows, (A, D), with their sizes and one sample of each.

    Of each its `nearest_A` and the `similarity_A` with that, and what the similarity with any other does not exceed,
    `others_A`, which merges of others cannot raise: whose nearest merges is asked anew only where that has become less
    near.
    """

    def __init__(self, rows_MD: np.ndarray):
        count = len(rows_MD)
        self.means_AD, self.sizes_A, self.sample_A = rows_MD, np.ones(count), np.arange(count)
        self.similarity_A, self.others_A = np.full((2, count), -np.inf, np.float32)
        self.nearest_A = np.zeros(count, np.int64)
        for first in range(0, count if count > FEW else 0, BLOCK):
            block = rows_MD[first : first + BLOCK] @ rows_MD[first:].T  # clusters before have met these
            np.fill_diagonal(block, -np.inf)
            self._meet(slice(first, None), block.T, first)
            self._meet(slice(first, first + BLOCK), block, first)

    def merge(self, ends: np.ndarray, kept_A: np.ndarray) -> None:
        """Merge what is connected by these ends, (n, 2), and leave out what is not to be kept."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        count = len(self.sizes_A)
        kept_A = kept_A.copy()
        kept_A[self.nearest_A[kept_A]] = True  # rounding may find a similarity too small from one of its ends
        edges = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
        kept = np.flatnonzero(kept_A)
        _, first, own = np.unique(
            connected_components(edges, directed=False)[1][kept], return_index=True, return_inverse=True
        )
        whole = np.bincount(own, self.sizes_A[kept])
        parts = (self.sizes_A[kept] / whole[own]).astype(np.float32)
        self.means_AD = coo_array((parts, (own, kept)), shape=(len(first), count)).tocsr() @ self.means_AD
        self.sizes_A, self.sample_A = whole, self.sample_A[kept[first]]
        new_A = np.full(count, -1)
        new_A[kept] = own
        grown = np.bincount(own) > 1
        moved = grown[new_A[self.nearest_A[kept[first]]]]
        old = kept[first]
        self.similarity_A, self.others_A = self.similarity_A[old], self.others_A[old]
        self.nearest_A = new_A[self.nearest_A[old]]
        changed = np.flatnonzero(moved & ~grown)
        for some in np.array_split(changed, len(changed) // BLOCK + 1):
            pairs = np.einsum("nd,nd->n", self.means_AD[some], self.means_AD[self.nearest_A[some]])
            self.similarity_A[some] = pairs
        asked = np.flatnonzero(grown | (moved & (self.similarity_A < self.others_A)))
        self.similarity_A[asked] = self.others_A[asked] = -np.inf
        for some in np.array_split(asked, len(asked) // BLOCK + 1) if len(asked) else ():
            block = self.means_AD[some] @ self.means_AD.T
            block[np.arange(len(some)), some] = -np.inf
            self._meet(some, block, 0)

    def _meet(self, these: slice | np.ndarray, block: np.ndarray, first: int) -> None:
        """Take the similarities, (n, m), of these clusters with those from the first on."""
        rows = np.arange(len(block))
        place = block.argmax(1)
        found = block[rows, place]
        block[rows, place] = -np.inf
        second = block.max(1, initial=-np.inf)
        block[rows, place] = found
        best = self.similarity_A[these]
        self.others_A[these] = np.maximum(np.maximum(self.others_A[these], second), np.minimum(best, found))
        self.nearest_A[these] = np.where(found > best, place + first, self.nearest_A[these])
        self.similarity_A[these] = np.maximum(best, found)


def _chains(similarity_AA: np.ndarray, sizes_A: np.ndarray, least: float) -> Merges:
    """The same by chains of nearest neighbours, each nearer than the one before, from clusters of these sizes; the
    similarity is overwritten."""
    sizes = sizes_A.copy()
    np.fill_diagonal(similarity_AA, -np.inf)
    pairs, heights, chain = [], [], []
    left = list(range(len(sizes)))
    while left or chain:
        if not chain:
            chain.append(left.pop())
            if not sizes[chain[-1]]:
                chain.pop()
                continue
        a = chain[-1]
        row = similarity_AA[a]
        b = int(row.argmax())
        if len(chain) > 1 and row[chain[-2]] >= row[b]:
            b = chain[-2]
        if row[b] < least:  # the first of its chain: nothing is near enough to it
            chain.pop()
        elif len(chain) > 1 and b == chain[-2]:
            del chain[-2:]
            pairs.append((a, b))
            heights.append(float(row[b]))
            mean = (sizes[a] * row + sizes[b] * similarity_AA[b]) / (sizes[a] + sizes[b])
            mean[b] = -np.inf
            similarity_AA[a], similarity_AA[:, a] = -np.inf, -np.inf
            similarity_AA[b], similarity_AA[:, b] = mean, mean
            similarity_AA[b, a] = similarity_AA[a, b] = -np.inf
            sizes[b] += sizes[a]
            sizes[a] = 0
            if not chain:
                left.append(b)
        else:
            chain.append(b)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(heights)

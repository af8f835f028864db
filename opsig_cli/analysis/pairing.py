"""Which groups oppose each other, and how well members align with their side. M samples, G groups."""

from __future__ import annotations

import numpy as np

from opsig_cli.analysis.gram import Similarity
from opsig_cli.analysis.group_means import between_groups, blocks_of_sums, sizes_of
from opsig_cli.analysis.likeness import ALIKE

OPPOSES = -0.15
"""Two groups can be a pair where their mean similarity is below this."""
GAIN = 1e-9
"""An exchange of partners must make the sum of the weights larger by more than this."""
OPPOSES_ALIKE = -0.05
"""The same of two that look alike, where samples have labels: of a feature under L labels softmax takes from one what
it gives to L - 1 others, so that the cosine across is at most that within over L - 1."""


def opposing(alike: np.ndarray | float, labelled: bool = True) -> np.ndarray:
    """Below which mean similarity groups oppose, by how alike they look (see `likeness.alike_between`), of its shape.

    >>> opposing(np.array([0.9, 0.3, np.nan])).tolist()
    [-0.05, -0.15, -0.15]
    """
    return np.where(labelled & (np.asarray(alike) >= ALIKE), OPPOSES_ALIKE, OPPOSES)


def oppose(
    similarity: Similarity, groups: np.ndarray, allowed_GG: np.ndarray | None = None, below_GG: np.ndarray | None = None
) -> np.ndarray:
    """Each group's partner, (G,), -1 for none: the pairs whose mean similarities are the most negative in sum.

    `allowed_GG`: which groups may be a pair, None for all; `below_GG`: where they oppose, None for OPPOSES.

    Pairs are taken greedily, the most negative first, and then exchanged two by two as long as that lowers the sum:
    where several groups share a feature, the strongest opposition must not leave the others without a partner.
    """
    return match(between_groups(similarity, groups), allowed_GG, below_GG)


def match(
    between_GG: np.ndarray, allowed_GG: np.ndarray | None = None, below_GG: np.ndarray | float | None = None
) -> np.ndarray:
    """The same from the mean similarity of every two groups, (G, G)."""
    opposed_GG = between_GG <= (OPPOSES if below_GG is None else below_GG)
    if allowed_GG is not None:
        opposed_GG &= allowed_GG
    between = np.where(opposed_GG, between_GG, 0)
    partner = np.full(len(between), -1)
    opposed = np.argwhere(opposed_GG)
    for a, b in opposed[np.argsort(between[opposed_GG], kind="stable")]:
        if a != b and partner[a] < 0 and partner[b] < 0:
            partner[a], partner[b] = b, a
    weight = -between
    np.fill_diagonal(weight, 0)
    while _exchange(weight, partner):
        pass
    return partner


def _exchange(weight: np.ndarray, partner: np.ndarray) -> bool:
    """Let a pair (a, b) and two groups c, d, a pair or both free, become (a, c) and (b, d) where that weighs more.

    Goes through all pairs once, and says whether any was exchanged.
    """
    changed = False
    for a, b in pairs_of(partner):
        if partner[a] != b:
            continue
        gains = weight[[a, b]]
        gains[0, b] = gains[1, a] = 0
        if gains.max(1).sum() - weight[a, b] <= GAIN:  # nor could the best c and d, were they free
            continue
        chosen = (weight[a] > 0) | (weight[b] > 0)  # others cannot gain anything
        chosen[np.flatnonzero((partner < 0) & ~chosen)[:1]] = True  # one may be needed to leave a group alone
        others = partner[chosen]
        chosen[others[others >= 0]] = True
        chosen[a] = chosen[b] = False
        near = chosen.nonzero()[0]
        if not len(near):
            continue
        own = partner[near]
        paired = own[:, None] == near
        allowed = paired | ((own < 0)[:, None] & (own < 0))
        np.fill_diagonal(allowed, False)
        gain = weight[a, near][:, None] + weight[b, near] - weight[a, b]  # by c and d
        gain -= np.where(paired, weight[near[:, None], near], 0)
        gain = np.where(allowed, gain, 0)
        c, d = np.unravel_index(gain.argmax(), gain.shape)
        if gain[c, d] > GAIN:
            for x, y in ((a, near[c]), (b, near[d])):
                partner[x], partner[y] = (y, x) if weight[x, y] else (-1, -1)
            changed = True
    return changed


def alignments(similarity: Similarity, groups: np.ndarray, partner_G: np.ndarray) -> np.ndarray:
    """Every member's mean similarity with its group and minus that with its partner, (M,); NaN for none."""
    sizes, itself_M = sizes_of(groups), similarity.diagonal()
    alignment = np.full(len(groups), np.nan)
    for block, sums_RG in blocks_of_sums(similarity, groups):
        inside = np.flatnonzero(groups[block] >= 0)
        own, sums = groups[block][inside], sums_RG[inside]
        other = partner_G[own]
        paired = other >= 0
        total = sums[np.arange(len(inside)), own] - itself_M[block][inside]
        total[paired] -= sums[paired, other[paired]]
        number = sizes[own] - 1 + np.where(paired, sizes[other], 0)
        alignment[inside + block.start] = total / np.maximum(number, 1)
    return alignment


def pairs_of(partner_G: np.ndarray) -> list[tuple[int, int]]:
    return sorted({(min(a, int(b)), max(a, int(b))) for a, b in enumerate(partner_G) if b >= 0})

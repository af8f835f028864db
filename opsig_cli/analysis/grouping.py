"""Grouping: samples that move together, and groups that oppose each other.

M samples, G groups, C checkpoints, T steps. A similarity is a signed (M, M) array in [-1, 1]: +1 moves together,
-1 pulls against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CUTS = np.linspace(0.3, 0.75, 10)
"""Heights of the dendrogram (distance 1 - S) that are tried."""
SMALLEST = 4
"""Members of the smallest group, where there are samples enough."""
OPPOSES = -0.15
"""Two groups can be a pair where their mean similarity is below this."""
BELONGS = 0.3
"""A member stays where its mean similarity with its group, and minus that with the opposing group, is above this."""


@dataclass(frozen=True)
class Grouping:
    """Which group each sample is in, and which groups oppose.

    `group_M` int64, -1 for none, 0 to G - 1 by size, largest first; `partner_G` int64, the opposing group or -1;
    `alignment_M` float64, mean similarity of a member with its group and minus that with its partner; NaN for none.
    """

    group_M: np.ndarray
    partner_G: np.ndarray
    alignment_M: np.ndarray

    def members(self, group: int) -> np.ndarray:
        """Positions of a group's members, increasing."""
        return np.flatnonzero(self.group_M == group)

    def pairs(self) -> list[tuple[int, int]]:
        """Opposing groups, the lower number first, each pair once, in order."""
        return [(a, int(b)) for a, b in enumerate(self.partner_G) if b > a]


def group_by_similarity(similarity_MM: np.ndarray, smallest: int = SMALLEST) -> Grouping:
    """Sides by average linkage on the signed distance 1 - S, then each side matched with the one it opposes most.

    The cut is the one of CUTS with the best silhouette over groups of `smallest` or more. Weak members are left out,
    and groups that become smaller than `smallest` with them. NaN similarities count as 0. Raises ValueError for fewer
    than two samples.

    >>> two = np.repeat([1.0, -1.0], 4)
    >>> grouping = group_by_similarity(np.outer(two, two))
    >>> grouping.group_M.tolist(), grouping.pairs()
    ([0, 0, 0, 0, 1, 1, 1, 1], [(0, 1)])
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    count = len(similarity_MM)
    if count < 2:
        raise ValueError(f"{count} samples cannot be grouped: at least two are needed")
    similarity = np.nan_to_num(similarity_MM)
    distance = np.clip(1 - similarity, 0, 2)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    best, best_quality = np.full(count, -1), -np.inf
    for cut in CUTS:
        groups = _drop_small(fcluster(tree, cut, "distance"), smallest)
        quality = _silhouette(distance, groups)
        if quality > best_quality:
            best, best_quality = groups, quality
    groups = best
    while True:  # leaving members out changes the means that others are held against
        partner_G = _oppose(similarity, groups)
        alignment = _alignment(similarity, groups, partner_G)
        kept = _drop_small(np.where(alignment >= BELONGS, groups, -1), smallest)
        if np.array_equal(kept >= 0, groups >= 0):
            return _by_size(groups, partner_G, alignment)
        groups = kept


def _drop_small(groups: np.ndarray, smallest: int) -> np.ndarray:
    """Renumber groups 0, 1, ... and put -1 for members of groups below `smallest`."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    keep = (sizes >= smallest) & (names >= 0)
    new = np.where(keep, np.cumsum(keep) - 1, -1)
    return new[inverse]


def _silhouette(distance: np.ndarray, groups: np.ndarray) -> float:
    """Mean silhouette of the grouped samples times their number's share; -1 where there are not two groups."""
    from sklearn.metrics import silhouette_score

    inside = np.flatnonzero(groups >= 0)
    if len(np.unique(groups[inside])) < 2 or len(np.unique(groups[inside])) >= len(inside):
        return -1.0
    return float(silhouette_score(distance[np.ix_(inside, inside)], groups[inside], metric="precomputed"))


def _means(similarity: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of every sample's similarity over each group, (M, G), and the groups' sizes, (G,)."""
    count = groups.max(initial=-1) + 1
    indicator = (groups[:, None] == np.arange(count)).astype(float)
    return similarity @ indicator, indicator.sum(0)


def _oppose(similarity: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each group's partner: pairs are taken in order of mean similarity, the most negative first."""
    sums_MG, sizes = _means(similarity, groups)
    partner = np.full(len(sizes), -1)
    if len(sizes) == 0:
        return partner
    between = np.array([sums_MG[groups == a].mean(0) / sizes for a in range(len(sizes))])
    for place in np.argsort(between, axis=None, kind="stable"):
        a, b = np.unravel_index(place, between.shape)
        if between[a, b] > OPPOSES:
            break
        if a != b and partner[a] < 0 and partner[b] < 0:
            partner[a], partner[b] = b, a
    return partner


def _alignment(similarity: np.ndarray, groups: np.ndarray, partner_G: np.ndarray) -> np.ndarray:
    sums_MG, sizes = _means(similarity, groups)
    alignment = np.full(len(groups), np.nan)
    for i in np.flatnonzero(groups >= 0):
        own, other = groups[i], partner_G[groups[i]]
        total, number = sums_MG[i, own] - similarity[i, i], sizes[own] - 1
        if other >= 0:
            total, number = total - sums_MG[i, other], number + sizes[other]
        alignment[i] = total / max(number, 1)
    return alignment


def _by_size(groups: np.ndarray, partner_G: np.ndarray, alignment: np.ndarray) -> Grouping:
    sizes = np.bincount(groups[groups >= 0], minlength=len(partner_G))
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    partner = np.array([rank[p] if p >= 0 else -1 for p in partner_G[order]], np.int64)
    return Grouping(np.where(groups >= 0, rank[groups] if len(rank) else -1, -1), partner, alignment)


def change_correlation(losses_TM: np.ndarray) -> np.ndarray:
    """Pearson correlation of the one-step loss changes of every two samples, (M, M) float64.

    NaN for a sample that never moves.
    """
    changes = np.diff(losses_TM.astype(np.float64), axis=0)
    changes -= changes.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        changes /= np.linalg.norm(changes, axis=0)
    return changes.T @ changes


@dataclass(frozen=True)
class Evidence:
    """What speaks for a pair of groups a and b.

    `cohesion`: mean similarity within the two groups. `opposition`: mean similarity across, with `opposition_error`,
    its standard error over checkpoints (NaN for one). `loss_correlation`: of the groups' mean loss changes.
    At the step where the whole loss rose most: `share`, the part of its rise that the two groups carry (below 0 or
    above 1 where others make up for it), and `changes`, the mean loss change of each group in nats.
    """

    cohesion: float
    opposition: float
    opposition_error: float
    loss_correlation: float
    share: float
    changes: tuple[float, float]


def evidence(
    similarity_CMM: np.ndarray, losses_TM: np.ndarray, rise_at: int, whole_rise: float, a: np.ndarray, b: np.ndarray
) -> Evidence:
    """Evidence for the groups with these positions.

    `whole_rise` is the rise of all samples' summed loss from row `rise_at - 1` to `rise_at`, in nats.
    """
    across_C = similarity_CMM[:, a][:, :, b].mean((1, 2))
    mean_MM = similarity_CMM.sum(0) / len(similarity_CMM)
    within = [_within(mean_MM, members) for members in (a, b)]
    error = float(across_C.std(ddof=1) / np.sqrt(len(across_C))) if len(across_C) > 1 else float("nan")
    changes = np.diff(np.stack([losses_TM[:, a].mean(1), losses_TM[:, b].mean(1)]).astype(np.float64), axis=1)
    rises = [
        losses_TM[rise_at, side].astype(np.float64) - losses_TM[rise_at - 1, side].astype(np.float64) for side in (a, b)
    ]
    rise = float(rises[0].sum() + rises[1].sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = float(np.asarray(np.corrcoef(changes))[0, 1])
    return Evidence(
        float(np.mean(within)),
        float(across_C.mean()),
        error,
        correlation,
        rise / whole_rise if whole_rise > 0 else float("nan"),
        (float(rises[0].mean()), float(rises[1].mean())),
    )


def _within(similarity: np.ndarray, members: np.ndarray) -> float:
    block = similarity[np.ix_(members, members)]
    return float((block.sum() - np.trace(block)) / max(1, len(members) * (len(members) - 1)))


def spread(first: int, last: int, available: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the increasing `available` steps, spread evenly over `first` to `last`.

    >>> spread(3, 10, np.arange(0, 20, 2), 3).tolist()
    [4, 8, 10]
    """
    inside = available[(available >= first) & (available <= last)]
    if len(inside) == 0:
        inside = available[-1:]
    return inside[np.unique(np.linspace(0, len(inside) - 1, min(count, len(inside))).round().astype(int))]


def join(
    means_SG: np.ndarray, grouping: Grouping, outside: np.ndarray, quantile: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """The group that each of the samples at `outside` (N,) aligns with, or -1, and its alignment: (N,) each.

    `means_SG`: every sample's mean similarity with each group's members. A sample joins where it is aligned at least as
    well as the group's weakest tenth (`quantile`) of members.

    >>> grouping = Grouping(np.array([0, 0, 1]), np.array([1, 0]), np.array([0.8, 0.9, 0.7]))
    >>> means = np.array([[0, 0], [0, 0], [0, 0], [0.9, -0.9], [0.1, 0.2]])
    >>> join(means, grouping, np.array([3, 4]))[0].tolist()
    [0, -1]
    """
    groups = len(grouping.partner_G)
    if groups == 0 or len(outside) == 0:
        return np.full(len(outside), -1), np.full(len(outside), np.nan)
    sizes = np.bincount(grouping.group_M[grouping.group_M >= 0], minlength=groups)
    means = np.nan_to_num(means_SG[outside])
    alignment = np.empty_like(means)
    for group, partner in enumerate(grouping.partner_G):
        alignment[:, group] = means[:, group]
        if partner >= 0:
            both = sizes[group] * means[:, group] - sizes[partner] * means[:, partner]
            alignment[:, group] = both / (sizes[group] + sizes[partner])
    best = alignment.argmax(1)
    reached = alignment[np.arange(len(outside)), best]
    weakest = np.array([np.quantile(grouping.alignment_M[grouping.members(g)], quantile) for g in range(groups)])
    return np.where(reached >= weakest[best], best, -1), reached

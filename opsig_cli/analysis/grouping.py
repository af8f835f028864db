"""Grouping: samples that move together, and groups that oppose each other.

M samples, G groups, T steps. A similarity is a signed (M, M) array in [-1, 1]: +1 moves together, -1 pulls against.
A likeness is one too: +1 looks alike to the network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.cutting import best_cut, drop_small, far_apart, halved
from opsig_cli.analysis.gram import Gram, Similarity
from opsig_cli.analysis.group_means import ROWS, between_groups
from opsig_cli.analysis.pairing import OPPOSES, alignments, oppose, pairs_of

LOOKS = 0.4
"""Weight of likeness beside similarity in what is cut."""
MERGES = 0.5
"""Two groups can be one where they are across at least this part as similar as within the looser of them."""
ALIKE = 0.8
"""And where they are across at least this part as alike as within."""
SMALLEST = 4
"""Members of the smallest group, where there are samples enough."""
BELONGS = 0.3
"""A sample belongs to a group where its mean similarity with it, and minus that with its partner, is above this."""
LOOSE = 2 / 3
"""Or, where looks bear out what a loose group is, above this part of the group's mean."""
RESEMBLES = 0.7
"""And, where it was not mined, its mean likeness with the group above this."""
WEAKEST = 0.1
"""Without likeness it must align as well as all but this part of the members."""


@dataclass(frozen=True)
class Grouping:
    """Which group each sample is in, and which groups oppose.

    `group_M` int64, -1 for none, 0 to G - 1 by size, largest first; `partner_G` int64, the opposing group or -1, which
    may have another partner itself: a feature can have two; `alignment_M` float64, mean similarity of a member with its
    group and minus that with its partner; NaN for none.
    """

    group_M: np.ndarray
    partner_G: np.ndarray
    alignment_M: np.ndarray

    def members(self, group: int) -> np.ndarray:
        """Positions of a group's members, increasing."""
        return np.flatnonzero(self.group_M == group)

    def own_pairs(self) -> dict[int, int]:
        """The place in `pairs` of every group's pair: the one with its partner, else the first that it is in."""
        place = {pair: number for number, pair in enumerate(self.pairs())}
        found = {group: number for pair, number in reversed(place.items()) for group in pair}
        return found | {a: place[min(a, int(b)), max(a, int(b))] for a, b in enumerate(self.partner_G) if b >= 0}

    def pairs(self) -> list[tuple[int, int]]:
        """Groups that oppose, the lower number first, each pair once, in order."""
        return pairs_of(self.partner_G)


def group_by_similarity(
    similarity_MM: Similarity, smallest: int = SMALLEST, likeness_MM: Similarity | None = None
) -> Grouping:
    """Sides by average linkage on a signed distance, then each side matched with the one that it opposes most.

    The distance is 1 - S, or with a likeness K 1 - (1 - LOOKS) S - LOOKS K: what moves together by its label alone
    does not look alike, and what looks alike with another label does not move together. The cut is the one of CUTS
    with the best silhouette over groups of `smallest` or more, times their share of the samples; a cut that is
    right for a loose group joins tight ones, which are taken apart again, and one that is right for a tight group
    takes a loose one apart, so that groups that move together and look alike are made one. Weak members are left
    out, and groups that become smaller than `smallest` with them. What is not finite counts as 0. Raises ValueError
    for fewer than two samples.

    >>> two = np.repeat([1.0, -1.0], 4)
    >>> grouping = group_by_similarity(np.outer(two, two))
    >>> grouping.group_M.tolist(), grouping.pairs()
    ([0, 0, 0, 0, 1, 1, 1, 1], [(0, 1)])
    """
    count = len(similarity_MM)
    if count < 2:
        raise ValueError(f"{count} samples cannot be grouped: at least two are needed")
    similarity = similarity_MM
    if not isinstance(similarity_MM, Gram) and not np.isfinite(similarity_MM).all():
        similarity = known(similarity_MM)
    if likeness_MM is None:
        return _without_weak(similarity, best_cut(similarity, smallest), smallest)
    affinity = _affinity(similarity, likeness_MM)
    chosen = halved(affinity, best_cut(affinity, smallest), smallest)
    found = _without_weak(similarity, chosen, smallest, LOOSE)
    return _without_weak(similarity, _merged(similarity, likeness_MM, found.group_M), smallest, LOOSE)


def _affinity(similarity: Similarity, likeness: Similarity) -> Similarity:
    """What is cut: similarity and likeness, weighted."""
    if isinstance(similarity, Gram) and isinstance(likeness, Gram):
        parts = (((1 - LOOKS) * similarity.scale, similarity.rows_MD), (LOOKS * likeness.scale, likeness.rows_MD))
        return Gram(np.concatenate([rows * np.float32(np.sqrt(weight)) for weight, rows in parts], 1))
    affinity = (1 - LOOKS) * similarity[:]
    for first in range(0, len(affinity), ROWS):
        affinity[first : first + ROWS] += LOOKS * likeness[first : first + ROWS]
    return affinity


def known(values: np.ndarray, copy: bool = True) -> np.ndarray:
    """The values with 0 for what is not finite: a cosine that was not measured speaks for nothing.

    >>> known(np.array([0.5, np.nan, -np.inf])).tolist()
    [0.5, 0.0, 0.0]
    """
    return np.nan_to_num(values, copy, nan=0.0, posinf=0.0, neginf=0.0)


def pair_anew(
    similarity_MM: Similarity, grouping: Grouping, preferred_GG: np.ndarray, below_GG: np.ndarray | None = None
) -> Grouping:
    """The same groups, paired among those that are preferred first; `below_GG`: see `pairing.opposing`.

    Each group left over gets the one that it opposes most, a preferred one where there is one. That one may have
    another partner: a feature can have two.
    """
    groups = grouping.group_M
    partner_G = oppose(similarity_MM, groups, preferred_GG, below_GG)
    opposed_GG = between_groups(similarity_MM, groups)
    opposed_GG[opposed_GG > (OPPOSES if below_GG is None else below_GG)] = 0
    np.fill_diagonal(opposed_GG, 0)  # nothing opposes itself
    for group in np.flatnonzero(partner_G < 0):
        preferred = np.where(preferred_GG[group], opposed_GG[group], 0)
        opposed = preferred if preferred.any() else opposed_GG[group]
        if opposed.any():
            partner_G[group] = opposed.argmin()
    return Grouping(groups, partner_G, alignments(similarity_MM, groups, partner_G))


def _without_weak(similarity: Similarity, groups: np.ndarray, smallest: int, loose: float | None = None) -> Grouping:
    """The groups with partners, without the members that do not align with them."""
    while True:  # leaving members out changes the means that others are held against
        partner_G = oppose(similarity, groups)
        alignment = alignments(similarity, groups, partner_G)
        least_M = np.full(len(groups), BELONGS)
        for group in range(len(partner_G) if loose is not None else 0):
            inside = groups == group
            least_M[inside] = np.clip(loose * alignment[inside].mean(), 0, BELONGS)
        moves_M = alignment > 0  # what has no gradient moves with nobody, whatever it looks like
        kept = drop_small(np.where(moves_M & (alignment >= least_M), groups, -1), smallest)
        if np.array_equal(kept >= 0, groups >= 0):
            return _by_size(groups, partner_G, alignment)
        groups = kept


def _merged(similarity: Similarity, likeness: Similarity, group_M: np.ndarray) -> np.ndarray:
    """Groups of which those that move together and look alike (see MERGES and ALIKE) are made one, (M,)."""
    groups = group_M.copy()
    sizes = np.bincount(groups[groups >= 0])
    sums = np.stack([between_groups(rows, groups) for rows in (similarity, likeness)]) * np.outer(sizes, sizes)
    while len(sizes) > 1:
        between, alike = sums / np.outer(sizes, sizes)
        within = (sizes * np.diagonal(between) - 1) / np.maximum(sizes - 1, 1)
        within_looks = (sizes * np.diagonal(alike) - 1) / np.maximum(sizes - 1, 1)
        own = np.sqrt(np.maximum(np.diagonal(alike), 0))
        together = between / np.maximum(np.minimum.outer(within, within), 1e-12)
        together[alike < ALIKE * np.outer(own, own)] = -np.inf
        distance = 1 - (1 - LOOKS) * between - LOOKS * alike
        inside = np.maximum.outer(*[1 - (1 - LOOKS) * within - LOOKS * within_looks] * 2)
        together[far_apart(inside, distance)] = -np.inf
        np.fill_diagonal(together, -np.inf)
        a, b = sorted(np.unravel_index(together.argmax(), together.shape))
        if together[a, b] < MERGES:
            break
        sums[:, a] += sums[:, b]
        sums[:, :, a] += sums[:, :, b]
        sums = np.delete(np.delete(sums, b, 1), b, 2)
        sizes[a] += sizes[b]
        sizes = np.delete(sizes, b)
        groups[groups == b] = a
        groups[groups > b] -= 1
    return groups


def _by_size(groups: np.ndarray, partner_G: np.ndarray, alignment: np.ndarray) -> Grouping:
    sizes = np.bincount(groups[groups >= 0], minlength=len(partner_G))
    order = np.argsort(-sizes, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    partner = np.array([rank[p] if p >= 0 else -1 for p in partner_G[order]], np.int64)
    return Grouping(np.where(groups >= 0, rank[groups] if len(rank) else -1, -1), partner, alignment)


def join(
    means_NG: np.ndarray, grouping: Grouping, likeness_NG: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The group to which each of N samples that were not grouped belongs, or -1, and its alignment: (N,) each.

    `means_NG`: mean similarity of the samples with each group's members; `likeness_NG` their mean likeness. A sample
    belongs to a group as its members do (see BELONGS), and looks like them (RESEMBLES; without likeness see WEAKEST).
    No more join than a group has members, those that align most.

    >>> grouping = Grouping(np.array([0, 0, 1]), np.array([1, 0]), np.array([0.8, 0.9, 0.7]))
    >>> means = np.array([[0.9, -0.9], [0.9, -0.9], [0.1, 0.2]])
    >>> join(means, grouping)[0].tolist(), join(means, grouping, np.array([[0.9], [0.2], [0.9]]))[0].tolist()
    ([0, 0, -1], [0, -1, -1])
    """
    groups = len(grouping.partner_G)
    if groups == 0 or len(means_NG) == 0:
        return np.full(len(means_NG), -1), np.full(len(means_NG), np.nan)
    sizes, alignment_NG = _aligned(means_NG, grouping)
    if likeness_NG is None:
        members = [grouping.alignment_M[grouping.members(group)] for group in range(groups)]
        belongs_NG = alignment_NG >= [max(BELONGS, np.quantile(aligned, WEAKEST)) for aligned in members]
    else:
        belongs_NG = (alignment_NG >= BELONGS) & (likeness_NG >= RESEMBLES)
    best = np.where(belongs_NG, alignment_NG, -np.inf).argmax(1)
    rows = np.arange(len(best))
    joins, alignment = np.where(belongs_NG[rows, best], best, -1), alignment_NG[rows, best]
    for group, size in enumerate(sizes):
        candidates = np.flatnonzero(joins == group)
        joins[candidates[np.argsort(-alignment[candidates], kind="stable")[size:]]] = -1
    return joins, alignment


def may_belong(means_NG: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Which of N samples align at one checkpoint with some group at least half as well as they must on the mean of
    several to belong to it, (N,) bool."""
    return np.any(_aligned(means_NG, grouping)[1] >= BELONGS / 2, axis=1)


def _aligned(means_NG: np.ndarray, grouping: Grouping) -> tuple[np.ndarray, np.ndarray]:
    """The groups' sizes, (G,), and the mean similarity of samples with each and minus that with its partner, (N, G)."""
    sizes = np.bincount(grouping.group_M[grouping.group_M >= 0], minlength=len(grouping.partner_G))
    alignment_NG = np.nan_to_num(means_NG)
    for group, partner in enumerate(grouping.partner_G):
        if partner >= 0:
            both = sizes[group] * means_NG[:, group] - sizes[partner] * means_NG[:, partner]
            alignment_NG[:, group] = np.nan_to_num(both / (sizes[group] + sizes[partner]))
    return sizes, alignment_NG


def change_correlation(losses_TM: np.ndarray) -> np.ndarray:
    """Pearson correlation of the one-step loss changes of every two samples, (M, M) float64.

    NaN for a sample that never moves.
    """
    return correlation(np.diff(losses_TM.astype(np.float64), axis=0))


def correlation(series_TM: np.ndarray) -> np.ndarray:
    """Pearson correlation of every two columns, (M, M) in their precision; NaN for one that is constant."""
    centred = series_TM - series_TM.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        centred /= np.linalg.norm(centred, axis=0)
    return centred.T @ centred


def change_rows(losses_TM: np.ndarray) -> Gram:
    """The same by rows, without forming it: what a sample that never moves has in common with others is 0."""
    rows_MD = np.empty((losses_TM.shape[1], len(losses_TM) - 1), np.float32)
    for first in range(0, len(rows_MD), ROWS):
        changes = np.diff(losses_TM[:, first : first + ROWS].astype(np.float64), axis=0)
        changes -= changes.mean(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            changes /= np.linalg.norm(changes, axis=0)
        rows_MD[first : first + ROWS] = known(changes, copy=False).T
    return Gram(rows_MD)


def spread(first: int, last: int, available: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the increasing `available` steps, spread evenly over `first` to `last`.

    >>> spread(3, 10, np.arange(0, 20, 2), 3).tolist()
    [4, 8, 10]
    """
    inside = available[(available >= first) & (available <= last)]
    if len(inside) == 0:
        inside = available[-1:]
    return inside[np.unique(np.linspace(0, len(inside) - 1, min(count, len(inside))).round().astype(int))]

"""Grouping: samples that move together, and groups that oppose each other.

M samples, G groups, C checkpoints, T steps. A similarity is a signed (M, M) array in [-1, 1]: +1 moves together,
-1 pulls against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

CUTS = np.linspace(0.3, 0.75, 10)
"""Heights of the dendrogram (distance 1 - S) that are tried."""
SPLITS = 0.7
"""A group falls apart where its parts have a silhouette of at least this."""
SMALLEST = 4
"""Members of the smallest group, where there are samples enough."""
OPPOSES = -0.15
"""Two groups can be a pair where their mean similarity is below this."""
MOST_DRAWN = 2000
"""Samples that are grouped anew at a time to see whether a pair comes back."""
ROWS = 512
"""Rows of a similarity that are worked on at a time."""
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
        return _pairs(self.partner_G)


def group_by_similarity(similarity_MM: np.ndarray, smallest: int = SMALLEST) -> Grouping:
    """Sides by average linkage on the signed distance 1 - S, then each side matched with the one it opposes most.

    The cut is the one of CUTS with the best silhouette over groups of `smallest` or more, times their share of the
    samples; a group whose parts stand clearly apart is cut once more. Weak members are left out, and groups that become
    smaller than `smallest` with them. NaN similarities count as 0. Raises ValueError for fewer than two samples.

    >>> two = np.repeat([1.0, -1.0], 4)
    >>> grouping = group_by_similarity(np.outer(two, two))
    >>> grouping.group_M.tolist(), grouping.pairs()
    ([0, 0, 0, 0, 1, 1, 1, 1], [(0, 1)])
    """
    count = len(similarity_MM)
    if count < 2:
        raise ValueError(f"{count} samples cannot be grouped: at least two are needed")
    similarity = similarity_MM if np.isfinite(similarity_MM).all() else np.nan_to_num(similarity_MM)
    groups, _ = _best_cut(similarity, smallest)
    for group in range(groups.max() + 1):  # several pairs on one class look like one side from afar
        members = np.flatnonzero(groups == group)
        parts, quality = _best_cut(similarity[np.ix_(members, members)], smallest)
        if quality >= SPLITS:
            groups[members] = np.where(parts > 0, parts + groups.max(), np.where(parts == 0, group, -1))
    while True:  # leaving members out changes the means that others are held against
        partner_G = _oppose(similarity, groups)
        alignment = _alignment(similarity, groups, partner_G)
        kept = _drop_small(np.where(alignment >= BELONGS, groups, -1), smallest)
        if np.array_equal(kept >= 0, groups >= 0):
            return _by_size(groups, partner_G, alignment)
        groups = kept


def _cut_tree(similarity: np.ndarray, smallest: int) -> Iterator[np.ndarray]:
    """Groups of at least `smallest` by average linkage, (M,) with -1 for none, at each height of CUTS."""
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(_distances(similarity), "average")
    for cut in CUTS:
        yield _drop_small(fcluster(tree, cut, "distance"), smallest)


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


def _best_cut(similarity: np.ndarray, smallest: int) -> tuple[np.ndarray, float]:
    """The groups with the best silhouette times the share of samples in them, (M,), and that product."""
    best, best_quality = np.full(len(similarity), -1), -np.inf
    for groups in _cut_tree(similarity, smallest) if len(similarity) > 1 else ():
        quality = silhouette(similarity, groups) * float(np.mean(groups >= 0))
        if quality > best_quality:
            best, best_quality = groups, quality
    return best, best_quality


def _drop_small(groups: np.ndarray, smallest: int) -> np.ndarray:
    """Renumber groups 0, 1, ... and put -1 for members of groups below `smallest`."""
    names, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    keep = (sizes >= smallest) & (names >= 0)
    new = np.where(keep, np.cumsum(keep) - 1, -1)
    return new[inverse]


def silhouette(similarity_MM: np.ndarray, groups_M: np.ndarray) -> float:
    """Mean silhouette, on the distance 1 - S, of the samples in groups 0, 1, ... (-1 is none); -1 for fewer than two.

    Rousseeuw 1987. Groups have two members or more. It comes from sums over groups, so that no matrix is copied.
    """
    inside = np.flatnonzero(groups_M >= 0)
    sums_MG, sizes = _sums(similarity_MM, groups_M)
    if len(sizes) < 2 or len(sizes) >= len(inside):
        return -1.0
    own = groups_M[inside]
    rows = np.arange(len(inside))
    within = 1 - (sums_MG[inside, own] - np.diagonal(similarity_MM)[inside]) / (sizes[own] - 1)
    between = 1 - sums_MG[inside] / sizes
    between[rows, own] = np.inf
    nearest = between.min(1)
    return float(np.mean((nearest - within) / np.maximum(np.maximum(nearest, within), 1e-12)))


def _sums(similarity: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of every sample's similarity over each group, (M, G) float64, and the groups' sizes, (G,)."""
    sizes = np.bincount(groups[groups >= 0], minlength=groups.max(initial=-1) + 1)
    sums = np.zeros((len(groups), len(sizes)))
    if len(sizes):
        members = np.argsort(groups, kind="stable")[len(groups) - sizes.sum() :]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        for first in range(0, len(groups), ROWS):
            rows = similarity[first : first + ROWS]
            sums[first : first + ROWS] = np.add.reduceat(rows[:, members], starts, axis=1, dtype=np.float64)
    return sums, sizes


def _oppose(similarity: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each group's partner, -1 for none: the pairs whose mean similarities are the most negative in sum.

    Pairs are taken greedily, the most negative first, and then exchanged two by two as long as that lowers the sum:
    where several groups share a feature, the strongest opposition must not leave the others without a partner.
    """
    sums_MG, sizes = _sums(similarity, groups)
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
    weight = np.where(between <= OPPOSES, -between, 0)
    np.fill_diagonal(weight, 0)
    while _exchange(weight, partner):
        pass
    return partner


def _exchange(weight: np.ndarray, partner: np.ndarray) -> bool:
    """Let one pair (a, b) and two groups c, d, a pair or both free, become (a, c) and (b, d) where that weighs more."""
    for a, b in _pairs(partner):
        gain = weight[a][:, None] + weight[b] - weight[a, b]  # by c and d
        free = partner < 0
        paired = np.zeros_like(gain, bool)
        paired[np.flatnonzero(~free), partner[~free]] = True
        gain -= np.where(paired, weight, 0)
        allowed = paired | (free[:, None] & free)
        np.fill_diagonal(allowed, False)
        allowed[[a, b]] = allowed[:, [a, b]] = False
        gain = np.where(allowed, gain, 0)
        c, d = np.unravel_index(gain.argmax(), gain.shape)
        if gain[c, d] > 1e-9:
            for x, y in ((a, c), (b, d)):
                partner[x], partner[y] = (y, x) if weight[x, y] else (-1, -1)
            return True
    return False


def _alignment(similarity: np.ndarray, groups: np.ndarray, partner_G: np.ndarray) -> np.ndarray:
    sums_MG, sizes = _sums(similarity, groups)
    alignment = np.full(len(groups), np.nan)
    inside = np.flatnonzero(groups >= 0)
    own = groups[inside]
    other = partner_G[own]
    paired = other >= 0
    total = sums_MG[inside, own] - np.diagonal(similarity)[inside]
    total[paired] -= sums_MG[inside[paired], other[paired]]
    number = sizes[own] - 1 + np.where(paired, sizes[other], 0)
    alignment[inside] = total / np.maximum(number, 1)
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
    similarity_MM: np.ndarray, across_C: np.ndarray, losses_TM: np.ndarray, rise_at: int, whole_rise: float,
    a: np.ndarray, b: np.ndarray,
) -> Evidence:  # fmt: skip
    """Evidence for the groups with these positions.

    `across_C`: mean similarity between the two at each checkpoint. `whole_rise`: the rise of all samples' summed loss
    from row `rise_at - 1` to `rise_at`, in nats.
    """
    within = [_within(similarity_MM, members) for members in (a, b)]
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


def strength(opposition: float, size_a: int, size_b: int) -> float:
    """Opposition of two groups in units in which groups of any size compare: times the root of sizes' product."""
    return -opposition * float(np.sqrt(size_a * size_b))


def null_strengths(
    similarity_MM: np.ndarray, rounds: int = 199, most: int = 200, smallest: int = SMALLEST, seed: int = 0
) -> np.ndarray:
    """Strength of the strongest pair that the same grouping finds where there is no structure, (rounds,).

    Each round shuffles the similarities of at most `most` samples, which keeps their distribution and nothing else, and
    takes the strongest pair at any cut. A p-value held against this accounts for the search over groups.
    """
    generator = np.random.default_rng(seed)
    found = np.zeros(rounds)
    count = min(most, len(similarity_MM))
    upper = np.triu_indices(count, 1)
    for number in range(rounds):
        chosen = generator.choice(len(similarity_MM), count, replace=False)
        values = np.nan_to_num(similarity_MM[np.ix_(chosen, chosen)][upper])
        shuffled = np.eye(count)
        shuffled[upper] = generator.permutation(values)
        shuffled.T[upper] = shuffled[upper]
        for groups in _cut_tree(shuffled, smallest):
            for a, b in _pairs(_oppose(shuffled, groups)):
                inside_a, inside_b = groups == a, groups == b
                across = float(shuffled[np.ix_(inside_a, inside_b)].mean())
                found[number] = max(found[number], strength(across, inside_a.sum(), inside_b.sum()))
    return found


def p_value(value: float, null: np.ndarray) -> float:
    """Share of the null, the value itself included, that is at least as large.

    >>> p_value(3.0, np.array([1.0, 2.0, 4.0]))
    0.5
    """
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def series_p_value(changes_a: np.ndarray, changes_b: np.ndarray, rounds: int = 199, seed: int = 0) -> float:
    """Share of phase-shuffled a, (T,), itself included, that correlate with b at least as negatively as a does.

    A surrogate keeps the power of every frequency of a and loses its phase (Theiler et al. 1992). Two series that do
    nothing but alternate at period two are at +1 or -1 whatever their phase: the answer is then a half, not small.

    >>> swing = np.resize([1.0, -1.0], 64)
    >>> series_p_value(swing, -swing) > 0.3
    True
    """
    generator = np.random.default_rng(seed)
    a, b = changes_a - changes_a.mean(), changes_b - changes_b.mean()
    spectrum = np.fft.rfft(a)
    phases = np.exp(2j * np.pi * generator.random((rounds, len(spectrum))))
    phases[:, 0] = 1
    if len(a) % 2 == 0:  # the highest frequency stays real
        phases[:, -1] = np.where(generator.random(rounds) < 0.5, -1, 1)
    products = np.fft.irfft(spectrum * phases, len(a)) @ b
    observed = float(a @ b)
    return float((1 + (products <= observed + 1e-9 * abs(observed)).sum()) / (1 + rounds))


def pair_stability(
    similarity_MM: np.ndarray, grouping: Grouping, smallest: int = SMALLEST, rounds: int = 10, seed: int = 0
) -> dict[tuple[int, int], float]:
    """How well each pair comes back when four fifths of the samples (at most MOST_DRAWN) are grouped anew, 0 to 1.

    For every round the best match among the new pairs: the smaller Jaccard index of its two sides, each among the
    samples drawn (Hennig 2007, Computational Statistics & Data Analysis 52).
    """
    generator = np.random.default_rng(seed)
    count = len(similarity_MM)
    totals = {pair: 0.0 for pair in grouping.pairs()}
    for _ in range(rounds if totals else 0):
        drawn = np.sort(generator.choice(count, min(MOST_DRAWN, max(2, count * 4 // 5)), replace=False))
        again = group_by_similarity(similarity_MM[np.ix_(drawn, drawn)], smallest)
        for a, b in totals:
            old = [grouping.group_M[drawn] == side for side in (a, b)]
            best = 0.0
            for x, y in again.pairs():
                new = [again.group_M == side for side in (x, y)]
                for first, second in (new, new[::-1]):
                    best = max(best, min(_jaccard(old[0], first), _jaccard(old[1], second)))
            totals[a, b] += best / rounds
    return totals


def _jaccard(left: np.ndarray, right: np.ndarray) -> float:
    either = (left | right).sum()
    return float((left & right).sum() / either) if either else 0.0


def _pairs(partner_G: np.ndarray) -> list[tuple[int, int]]:
    return [(a, int(b)) for a, b in enumerate(partner_G) if b > a]

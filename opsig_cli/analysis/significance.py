"""How far a group or a pair can be trusted: what the same search finds where there is nothing, and what comes back.

M samples, G groups, C checkpoints, T steps. A null is what the strongest group and pair reach by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.cutting import cut_tree
from opsig_cli.analysis.group_means import between_groups
from opsig_cli.analysis.grouping import SMALLEST, Grouping, change_correlation, group_by_similarity
from opsig_cli.analysis.pairing import OPPOSES, oppose

MOST_DRAWN = 2000
"""Samples that are grouped anew at a time to see whether a group comes back."""
MOST_IN_NULL = 200
"""Samples of one round of a null."""
MOST_AT_RANDOM = 500
"""Members of a random group: more would only narrow what random groups do."""
ROUNDS = 199
"""Rounds of a null: the smallest p-value is 1 / (ROUNDS + 1)."""


@dataclass(frozen=True)
class Null:
    """Strength of the strongest group and of the strongest pair of each round, (rounds,) each."""

    group: np.ndarray
    pair: np.ndarray


@dataclass(frozen=True)
class Stability:
    """Of every group, (G,), and of every pair: how well it comes back, 0 to 1."""

    group: np.ndarray
    pair: dict[tuple[int, int], float]


def group_strength(cohesion: float, size: int) -> float:
    """Cohesion in units in which groups of any size compare: times the root of the number of its sample pairs."""
    return cohesion * float(np.sqrt(size * (size - 1) / 2))


def pair_strength(opposition: float, size_a: int, size_b: int) -> float:
    """Opposition of two groups in units in which groups of any size compare: times the root of sizes' product."""
    return -opposition * float(np.sqrt(size_a * size_b))


def p_value(value: float, null: np.ndarray) -> float:
    """Share of the null, the value itself included, that is at least as large.

    >>> p_value(3.0, np.array([1.0, 2.0, 4.0]))
    0.5
    """
    return float((1 + (null >= value).sum()) / (1 + len(null)))


def shuffled_null(similarity_MM: np.ndarray, rounds: int = ROUNDS, smallest: int = SMALLEST, seed: int = 0) -> Null:
    """The null of no structure: each round shuffles the similarities of at most MOST_IN_NULL samples.

    That keeps their distribution and nothing else. The round's strongest pair and group at any cut are kept, so that a
    p-value held against them accounts for the search over groups.
    """
    count = min(MOST_IN_NULL, len(similarity_MM))
    upper = np.triu_indices(count, 1)

    def shuffled(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = generator.choice(len(similarity_MM), count, replace=False)
        values = np.nan_to_num(similarity_MM[np.ix_(chosen, chosen)][upper])
        found = np.eye(count)
        found[upper] = generator.permutation(values)
        found.T[upper] = found[upper]
        return found, found

    return _null(shuffled, rounds, smallest, seed)


def phase_null(losses_TM: np.ndarray, rounds: int = ROUNDS, smallest: int = SMALLEST, seed: int = 0) -> Null:
    """The null of series that share their spectra alone: each round shuffles the phases of every sample's changes.

    As in `cluster --by loss`, groups of the first half are tested on the second. A round takes at most MOST_IN_NULL
    samples; strengths are scaled to all of them, as a group holds a fixed part of samples that all alternate. Where
    every series alternates at period two this null finds groups as strong as those of the data: losses alone cannot
    tell then.
    """
    count = min(MOST_IN_NULL, losses_TM.shape[1])
    half = (len(losses_TM) - 1) // 2
    changes = np.diff(losses_TM.astype(np.float64), axis=0)

    def surrogates(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = generator.choice(losses_TM.shape[1], count, replace=False)
        series = phase_shuffled(changes[:, chosen], generator)
        walks = np.concatenate([np.zeros((1, count)), np.cumsum(series, 0)])
        first, second = (np.nan_to_num(change_correlation(part)) for part in (walks[: half + 1], walks[half:]))
        return first, second

    found = _null(surrogates, rounds, smallest, seed)
    scale = losses_TM.shape[1] / count
    return Null(found.group * scale, found.pair * scale)


def _null(
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]], rounds: int, smallest: int, seed: int
) -> Null:
    """Strongest groups and pairs of `rounds` draws: two similarities, to group by and to test on."""
    generator = np.random.default_rng(seed)
    groups, pairs = np.zeros(rounds), np.zeros(rounds)
    for number in range(rounds):
        similarity, tested = draw(generator)
        for chosen in cut_tree(similarity, smallest):
            partner = oppose(similarity, chosen)
            for a, b in enumerate(partner):
                inside = np.flatnonzero(chosen == a)
                strength = group_strength(_within(tested, inside), len(inside))
                groups[number] = max(groups[number], strength)
                if b > a:
                    other = np.flatnonzero(chosen == b)
                    across = float(tested[np.ix_(inside, other)].mean())
                    pairs[number] = max(pairs[number], pair_strength(across, len(inside), len(other)))
    return Null(groups, pairs)


def _within(similarity: np.ndarray, members: np.ndarray) -> float:
    block = similarity[np.ix_(members, members)]
    return float((block.sum() - np.trace(block)) / max(1, len(members) * (len(members) - 1)))


def random_pair_p(
    similarity_MM: np.ndarray, opposition: float, size_a: int, size_b: int, rounds: int = ROUNDS, seed: int = 0
) -> float:
    """Share of pairs of random groups of these sizes, itself included, that oppose each other as much."""
    size_a, size_b = min(size_a, MOST_AT_RANDOM), min(size_b, MOST_AT_RANDOM)
    size_b = min(size_b, len(similarity_MM) - size_a)
    drawn = _random_groups(len(similarity_MM), size_a + size_b, rounds, seed)
    across = [similarity_MM[np.ix_(both[:size_a], both[size_a:])].mean() for both in drawn]
    return p_value(-opposition, -np.array(across))


def random_group_p(similarity_MM: np.ndarray, cohesion: float, size: int, rounds: int = ROUNDS, seed: int = 0) -> float:
    """Share of random groups of this size, itself included, that hold together as much."""
    drawn = _random_groups(len(similarity_MM), min(size, MOST_AT_RANDOM), rounds, seed)
    return p_value(cohesion, np.array([_within(similarity_MM, members) for members in drawn]))


def _random_groups(count: int, size: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(rounds):
        yield generator.choice(count, size, replace=False, shuffle=True)


def phase_shuffled(series_TM: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Every column with the power of all its frequencies and random phases, (T, M) (Theiler et al. 1992)."""
    spectrum = np.fft.rfft(series_TM, axis=0)
    phases = np.exp(2j * np.pi * generator.random(spectrum.shape))
    phases[0] = 1
    if len(series_TM) % 2 == 0:  # the highest frequency stays real
        phases[-1] = np.where(generator.random(spectrum.shape[1]) < 0.5, -1, 1)
    return np.fft.irfft(spectrum * phases, len(series_TM), axis=0)


def series_p_value(changes_a: np.ndarray, changes_b: np.ndarray, rounds: int = ROUNDS, seed: int = 0) -> float:
    """Share of phase-shuffled a, (T,), itself included, that correlate with b at least as negatively as a does.

    Two series that do nothing but alternate at period two are at +1 or -1 whatever their phase: the answer is then a
    half, not small.

    >>> swing = np.resize([1.0, -1.0], 64)
    >>> series_p_value(swing, -swing) > 0.3
    True
    """
    a, b = changes_a - changes_a.mean(), changes_b - changes_b.mean()
    surrogates = phase_shuffled(np.repeat(a[:, None], rounds, 1), np.random.default_rng(seed))
    observed = float(a @ b)
    return float((1 + (b @ surrogates <= observed + 1e-9 * abs(observed)).sum()) / (1 + rounds))


def resampled(
    similarity_MM: np.ndarray, grouping: Grouping, smallest: int = SMALLEST, likeness_MM: np.ndarray | None = None,
    rounds: int = 10, seed: int = 0,
) -> Stability:  # fmt: skip
    """How well groups and pairs come back when four fifths of the samples (at most MOST_DRAWN) are grouped anew.

    For every round the best match among the new ones: the Jaccard index of the group, or the smaller one of a pair's
    two sides where these oppose again, each among the samples drawn (Hennig 2007, Computational Statistics & Data
    Analysis 52).
    """
    generator = np.random.default_rng(seed)
    count, groups = len(similarity_MM), len(grouping.partner_G)
    group_G = np.zeros(groups)
    pairs = dict.fromkeys(grouping.pairs(), 0.0)
    for _ in range(rounds if groups else 0):
        drawn = np.sort(generator.choice(count, min(MOST_DRAWN, max(2, count * 4 // 5)), replace=False))
        square = np.ix_(drawn, drawn)
        similarity = similarity_MM[square]
        again = group_by_similarity(similarity, smallest, None if likeness_MM is None else likeness_MM[square])
        overlap = _jaccard(grouping.group_M[drawn], groups, again.group_M, len(again.partner_G))
        opposed = between_groups(similarity, again.group_M) <= OPPOSES
        group_G += overlap.max(1, initial=0)
        for a, b in pairs:
            both = [min(overlap[a, i], overlap[b, j]) for i, j in zip(*np.nonzero(opposed), strict=True)]
            pairs[a, b] += max(both, default=0.0)
    scale = max(1, rounds)
    return Stability(group_G / scale, {pair: min(1.0, total / scale) for pair, total in pairs.items()})


def _jaccard(left: np.ndarray, left_count: int, right: np.ndarray, right_count: int) -> np.ndarray:
    """Jaccard index of every group of two groupings of the same samples, (left_count, right_count)."""
    table = np.zeros((left_count + 1, right_count + 1))
    np.add.at(table, (left, right), 1)  # -1, for none, is the last row or column
    inside = table[:left_count, :right_count]
    either = table.sum(1)[:left_count, None] + table.sum(0)[:right_count] - inside
    return inside / np.maximum(either, 1)


def kept_at_checkpoints(means_CMG: np.ndarray, grouping: Grouping) -> np.ndarray:
    """Share of each group's members that are nearest to their own group at a single checkpoint, mean of all, (G,).

    `means_CMG`: mean similarity of every sample with every group's members, with itself where it is one.
    """
    sizes = np.array([len(grouping.members(g)) for g in range(len(grouping.partner_G))])
    kept = np.zeros(len(sizes))
    for means in means_CMG:
        for group, size in enumerate(sizes):
            rows = means[grouping.members(group)].copy()
            rows[:, group] = (size * rows[:, group] - 1) / max(1, size - 1)  # without itself
            kept[group] += np.mean(rows.argmax(1) == group)
    return kept / max(1, len(means_CMG))

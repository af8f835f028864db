"""How well groups and pairs come back: of other samples, and at single checkpoints.

M samples, G groups, N pairs, C checkpoints, R rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.gram import Similarity, block
from opsig_cli.analysis.group_means import between_groups
from opsig_cli.analysis.grouping import SMALLEST, Grouping, group_by_similarity
from opsig_cli.analysis.likeness import alike_between
from opsig_cli.analysis.pairing import OPPOSES, opposing
from opsig_cli.analysis.rounds import Rounds, one_after_the_other

MOST_DRAWN = 2000
"""Samples that are grouped anew at a time to see whether a group comes back."""


@dataclass(frozen=True)
class Stability:
    """Of every group, (G,), and of every pair: how well it comes back, 0 to 1."""

    group: np.ndarray
    pair: dict[tuple[int, int], float]


def resampled(
    similarity_MM: Similarity, grouping: Grouping, smallest: int = SMALLEST, likeness_MM: Similarity | None = None,
    labelled: bool = False, rounds: int = 10, seed: int = 0, in_rounds: Rounds = one_after_the_other,
) -> Stability:  # fmt: skip
    """How well groups and pairs come back when four fifths of the samples (at most MOST_DRAWN) are grouped anew.

    For every round the best match among the new ones: the Jaccard index of the group, or the smaller one of a pair's
    two sides where these oppose again, each among the samples drawn (Hennig 2007, Computational Statistics & Data
    Analysis 52).
    """
    if not len(grouping.partner_G):
        return Stability(np.zeros(0), {})
    pairs = grouping.pairs()
    pair_N2 = np.array(pairs, np.int64).reshape(-1, 2)
    sides = grouping.group_M, len(grouping.partner_G), pair_N2
    arguments = (similarity_MM, likeness_MM, *sides, labelled, smallest, seed)
    group_RG, pair_RN = in_rounds(resampled_rounds, arguments, rounds)
    each = np.minimum(1.0, pair_RN.mean(0)).tolist()
    return Stability(group_RG.mean(0), dict(zip(pairs, each, strict=True)))


def resampled_rounds(
    similarity_MM: Similarity, likeness_MM: Similarity | None, group_M: np.ndarray, groups: int, pair_N2: np.ndarray,
    labelled: bool, smallest: int, seed: int, rounds: range,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """How well every group, (R, G), and every one of N pairs of them, (R, N), come back in some rounds of
    `resampled`."""
    count = len(similarity_MM)
    group_RG, pair_RN = np.zeros((len(rounds), groups)), np.zeros((len(rounds), len(pair_N2)))
    for number, its_seed in enumerate(rounds):
        generator = np.random.default_rng([seed, its_seed])
        drawn = np.sort(generator.choice(count, min(MOST_DRAWN, max(2, count * 4 // 5)), replace=False))
        similarity = block(similarity_MM, drawn)
        likeness = None if likeness_MM is None else block(likeness_MM, drawn)
        again = group_by_similarity(similarity, smallest, likeness)
        overlap = _jaccard(group_M[drawn], groups, again.group_M, len(again.partner_G))
        below = OPPOSES
        if likeness is not None:
            below = opposing(alike_between(likeness, again.group_M), labelled)
        opposed = between_groups(similarity, again.group_M) <= below
        group_RG[number] = overlap.max(1, initial=0)
        for place, (a, b) in enumerate(pair_N2):
            both = [min(overlap[a, i], overlap[b, j]) for i, j in zip(*np.nonzero(opposed), strict=True)]
            pair_RN[number, place] = max(both, default=0.0)
    return group_RG, pair_RN


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

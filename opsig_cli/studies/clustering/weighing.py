"""The evidence for every group and pair that was found. M samples, C checkpoints, G groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsig_cli.analysis import evidence, grouping, significance
from opsig_cli.analysis.evidence import Rise
from opsig_cli.analysis.group_means import between_groups
from opsig_cli.analysis.significance import Null
from opsig_cli.studies.clustering.clusters import Clusters, GroupWeight, PairWeight
from opsig_cli.trajectory.file import Trajectory

SHARES = 0.5
"""Two groups share a feature where their centred features have a mean cosine above this."""
CLAIMS = 0.5
"""What this excess, times the opposition relative to the groups' cohesion and the root of their sizes' geometric mean,
must reach. Where labels are random, images that look alike pull apart, too, but each label against all others, by
1 / (C - 1) of the cohesion for C classes: networks with random labels reach 0.42, natural pairs of images 0.5 to 3."""


def claims(similarity_MM: np.ndarray, likeness_MM: np.ndarray | None, group_M: np.ndarray) -> np.ndarray:
    """What speaks for a feature that every two groups share with opposing signals (see CLAIMS), (G, G), or NaN."""
    sizes = np.bincount(group_M[group_M >= 0])
    if likeness_MM is None:
        return np.full((len(sizes), len(sizes)), np.nan)
    between = between_groups(similarity_MM, group_M)
    within = (sizes * np.diagonal(between) - 1) / np.maximum(sizes - 1, 1)
    opposition = -between / np.maximum(np.add.outer(within, within) / 2, 1e-12)
    alike = between_groups(likeness_MM, group_M) - SHARES
    return np.maximum(alike, 0) * opposition * np.outer(sizes, sizes) ** 0.25


def weigh(
    run: Trajectory, clusters: Clusters, tested_MM: np.ndarray, means_CMG: np.ndarray, null: Null,
    likeness_MM: np.ndarray | None, claimed_GG: np.ndarray,
) -> Clusters:  # fmt: skip
    """With the weight of every group and pair, from `tested_MM` and the mean similarity of the samples with each group
    at each checkpoint (by losses: in each half of the window, of which the last is weighed)."""
    found, window = clusters.grouping, clusters.window
    members = [found.members(group) for group in range(len(found.partner_G))]
    stable = significance.resampled(clusters.similarity_MM, found, smallest(clusters.position), likeness_MM)
    kept = significance.kept_at_checkpoints(means_CMG, found)
    weighed_CMG = means_CMG[-1:] if clusters.by == "loss" else means_CMG
    before, after = run.rows("losses/loss", window.first + window.rise_row - 1, window.first + window.rise_row + 1)
    change_S = after.astype(np.float64) - before
    rise = Rise(change_S[clusters.position], float(change_S.sum()), float(np.abs(change_S).sum()))
    claims_GG = claims(clusters.similarity_MM, likeness_MM, found.group_M)
    shared_GG = claims_GG if likeness_MM is None else between_groups(likeness_MM, found.group_M)
    groups, pairs = [], []
    for group, inside in enumerate(members):
        size = len(inside)
        own = (size * weighed_CMG[:, inside, group] - 1) / max(1, size - 1)  # without a sample's similarity with itself
        cohesion, error = evidence.mean_and_error(own.mean(1))
        groups.append(GroupWeight(
            cohesion, error, float(stable.group[group]), float(kept[group]),
            significance.p_value(significance.group_strength(cohesion, size), null.group),
            significance.random_group_p(tested_MM, cohesion, size),
            rise.share(inside), rise.share_of_movement(inside), rise.mean(inside),
        ))  # fmt: skip
    for a, b in found.pairs():
        sides = members[a], members[b]
        sizes = len(sides[0]), len(sides[1])
        both = np.concatenate(sides)
        opposition, error = evidence.mean_and_error(weighed_CMG[:, sides[0], b].mean(1))
        p_value = significance.p_value(significance.pair_strength(opposition, *sizes), null.pair)
        outside_band = opposition < -(clusters.sketch_error or 0)
        p_value = p_value if claimed_GG[a, b] and outside_band else 1.0
        changes = [evidence.mean_changes(clusters.losses_TM, side) for side in sides]
        pairs.append(PairWeight(
            (groups[a].cohesion + groups[b].cohesion) / 2, opposition, error, float(shared_GG[a, b]),
            float(claims_GG[a, b]), evidence.correlation(*changes), stable.pair[a, b],
            min(groups[a].kept, groups[b].kept), p_value,
            significance.random_pair_p(tested_MM, opposition, *sizes),
            significance.series_p_value(changes[0], changes[1]),
            rise.share(both), rise.share_of_movement(both), (groups[a].change, groups[b].change),
        ))  # fmt: skip
    return replace(clusters, groups=groups, pairs=pairs)


def smallest(position: np.ndarray) -> int:
    return grouping.SMALLEST if len(position) >= 10 * grouping.SMALLEST else 2

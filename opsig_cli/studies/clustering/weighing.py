"""The evidence for every group and pair that was found. M samples, C checkpoints, G groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsig_cli.analysis import evidence, grouping, significance, stability
from opsig_cli.analysis.evidence import Rise
from opsig_cli.analysis.gram import Similarity
from opsig_cli.analysis.group_means import between_groups
from opsig_cli.analysis.likeness import ALIKE, families
from opsig_cli.analysis.pairing import opposing
from opsig_cli.analysis.rounds import Rounds, one_after_the_other
from opsig_cli.analysis.significance import Null
from opsig_cli.studies.clustering.clusters import Clusters, GroupWeight, PairWeight
from opsig_cli.trajectory.file import Trajectory


def weigh(
    run: Trajectory, clusters: Clusters, means_CMG: np.ndarray, null: Null, likeness_MM: Similarity | None,
    in_rounds: Rounds = one_after_the_other,
) -> Clusters:  # fmt: skip
    """With the weight of every group and pair, from the mean similarity of the samples with each group at each held-out
    checkpoint (by losses: in the second half of the window)."""
    found, window = clusters.grouping, clusters.window
    members = [found.members(group) for group in range(len(found.partner_G))]
    stable = stability.resampled(
        clusters.similarity_MM, found, smallest(clusters.position), likeness_MM, clusters.labelled, in_rounds=in_rounds
    )
    kept = stability.kept_at_checkpoints(means_CMG, found)
    before, after = run.rows("losses/loss", window.first + window.rise_row - 1, window.first + window.rise_row + 1)
    change_S = after.astype(np.float64) - before
    rise = Rise(change_S[clusters.position], float(change_S.sum()), float(np.abs(change_S).sum()))
    shared_GG = None if likeness_MM is None else between_groups(likeness_MM, found.group_M)
    family_of = {group: number for number, family in enumerate(related(clusters), 1) for group in family}
    groups, pairs = [], []
    for group, inside in enumerate(members):
        size = len(inside)
        own = (size * means_CMG[:, inside, group] - 1) / max(1, size - 1)  # without a sample's similarity with itself
        cohesion, error = evidence.mean_and_error(own.mean(1))
        groups.append(GroupWeight(
            cohesion, error, float(stable.group[group]), float(kept[group]),
            significance.p_value(significance.group_strength(cohesion, size), null.group),
            rise.share(inside), rise.share_of_movement(inside), rise.mean(inside),
        ))  # fmt: skip
    losses_TG = evidence.mean_losses(clusters.losses_TM, members) if members else np.zeros((0, 0))
    for a, b in found.pairs():
        sides = members[a], members[b]
        both = np.concatenate(sides)
        across_C = means_CMG[:, sides[0], b].mean(1)
        opposition, error = evidence.mean_and_error(across_C)
        low, high = evidence.interval(across_C)
        a_T, b_T = losses_TG[:, a], losses_TG[:, b]
        correlation = evidence.correlation_without_drift(a_T, b_T)
        p_value = significance.p_value(significance.pair_strength(opposition, *map(len, sides)), null.pair)
        measured = [groups[a].cohesion, groups[b].cohesion, opposition, correlation]
        measured += [] if clusters.by == "loss" else [error]
        if not np.isfinite(measured).all():
            p_value = 1.0  # what could not be measured speaks for nothing
        row = evidence.moves_apart(a_T, b_T)
        pairs.append(PairWeight(
            (groups[a].cohesion + groups[b].cohesion) / 2, opposition, error,
            (low, high + (clusters.sketch_error or 0)),
            float("nan") if shared_GG is None else float(shared_GG[a, b]),
            float("nan") if clusters.alike_GG is None else float(clusters.alike_GG[a, b]),
            correlation, stable.pair[a, b], min(groups[a].kept, groups[b].kept),
            p_value, significance.series_p_value(np.diff(a_T, 2), np.diff(b_T, 2)) if len(a_T) > 3 else float("nan"),
            rise.share(both), rise.share_of_movement(both), (groups[a].change, groups[b].change),
            None if row is None else (row, float(np.diff(a_T)[row - 1]), float(np.diff(b_T)[row - 1])),
            family_of.get(a, 0) if family_of.get(a) == family_of.get(b) else 0,
            0.0 if row is None else _movement_at(run, window.first + row, clusters.position[both]),
        ))  # fmt: skip
    return replace(clusters, groups=groups, pairs=[_of_family(pair, pairs) for pair in pairs])


def _of_family(pair: PairWeight, pairs: list[PairWeight]) -> PairWeight:
    """A pair with the p-value of its family's strongest: they are one finding, and share one feature."""
    own = [other.p_value for other in pairs if pair.family and other.family == pair.family]
    return replace(pair, p_value=min(own)) if own else pair


def _movement_at(run: Trajectory, row: int, members: np.ndarray) -> float:
    """The part of all samples' movement, up and down, into a row of the losses that is the members'; 0 where nothing
    moves."""
    before, after = run.rows("losses/loss", row - 1, row + 1)
    moved_S = np.nan_to_num(np.abs(after.astype(np.float64) - before))
    return float(moved_S[members].sum() / moved_S.sum()) if moved_S.sum() > 0 else 0.0


def related(clusters: Clusters) -> list[list[int]]:
    """Groups that share one feature under several labels: those that oppose each other, directly or over others, and
    look alike."""
    if clusters.alike_GG is None:
        return []
    between_GG = between_groups(clusters.similarity_MM, clusters.grouping.group_M)
    opposed_GG = between_GG <= opposing(clusters.alike_GG, clusters.labelled)
    return families(opposed_GG & (clusters.alike_GG >= ALIKE))


def smallest(position: np.ndarray) -> int:
    """Members of the smallest group among so many samples."""
    return grouping.SMALLEST if len(position) >= 10 * grouping.SMALLEST else 2

"""From mined samples to groups and opposing pairs: similarities gathered, samples grouped, each group weighed.

M mined samples, C checkpoints, T steps of the window, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from opsig_cli import backends
from opsig_cli.analysis import evidence, grouping, significance
from opsig_cli.analysis.evidence import Rise
from opsig_cli.analysis.grouping import Grouping
from opsig_cli.analysis.mining import WIDTH
from opsig_cli.analysis.significance import Null
from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies.mining import Movers
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.recorder import read_state

BY = ("gradient", "loss", "both")
CHECKPOINTS = 6
"""C: checkpoints that gradient cosines are averaged over."""
SHARES = 0.5
"""Two groups share a feature where their centred features have a mean cosine above this."""
CLAIMS = 0.5
"""What this excess, times the opposition relative to the groups' cohesion and the root of their sizes' geometric mean,
must reach. Where labels are random, images that look alike pull apart, too, but each label against all others, by
1 / (C - 1) of the cohesion for C classes: networks with random labels reach 0.42, natural pairs of images 0.5 to 3."""


@dataclass(frozen=True)
class Window:
    """The rows of `losses` that the evidence is taken from, and where in them the whole loss rose most.

    `first`, `stop`: rows of the file. `steps_T`: their steps. `rise_row`: the row after the largest rise of the mean
    loss, counted from `first`.
    """

    first: int
    stop: int
    steps_T: np.ndarray
    rise_row: int


@dataclass(frozen=True)
class Joined:
    """Samples that were not mined and align with a group: position, group and alignment, (N,) each."""

    position: np.ndarray
    group: np.ndarray
    alignment: np.ndarray


NOBODY = Joined(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class GroupWeight:
    """What speaks for a group. `cohesion`: mean similarity within. `kept`: share of the members that single checkpoints
    (by losses: halves of the window) put in this group; `stability` under resampling; `p_value` against no structure,
    `p_value_random` against random groups of its size. `share` of the whole loss's rise, `movement` of all movement."""

    cohesion: float
    cohesion_error: float
    stability: float
    kept: float
    p_value: float
    p_value_random: float
    share: float
    movement: float
    change: float


@dataclass(frozen=True)
class PairWeight:
    """What speaks for a pair, as for a group, and: `opposition`, the mean similarity across; `shared`, the mean cosine
    of the two groups' centred features, NaN where there are none; `claim`, by how much looks and opposition exceed
    what labels alone give (see CLAIMS), NaN likewise; `p_value`, 1 where that is little or any of this could not be
    measured; `loss_correlation` of their mean loss changes, and `p_value_losses`, its p-value against phase-shuffled
    series."""

    cohesion: float
    opposition: float
    opposition_error: float
    shared: float
    claim: float
    loss_correlation: float
    stability: float
    kept: float
    p_value: float
    p_value_random: float
    p_value_losses: float
    share: float
    movement: float
    changes: tuple[float, float]


@dataclass(frozen=True)
class Clusters:
    """The grouping of the samples at `position`, the weight of its groups and pairs in order, what was grouped by
    (M, M), the samples' losses (T, M), and who joined.

    `period_two`: the share of the samples' movement that turns back in the next step. `sketch_error`: half the width of
    the band in which sketched similarities lie, None for exact ones.
    """

    by: str
    position: np.ndarray
    grouping: Grouping
    groups: list[GroupWeight]
    pairs: list[PairWeight]
    similarity_MM: np.ndarray
    losses_TM: np.ndarray
    window: Window
    period_two: float
    joined: Joined = NOBODY
    sketch_error: float | None = None


def window_of(run: Trajectory, movers: Movers) -> Window:
    """From where the alternation at period two begins (else from the start) to the end of what was mined."""
    movement = movers.movement
    begin = max(0, (movement.first_alternation or 0) - WIDTH)  # it is seen only after that many steps
    if len(movement.mean_T) - begin < 3:
        begin = 0
    rises = np.diff(movement.mean_T[begin:])
    if len(rises) < 2:
        raise OpsigError(
            f"{run.path} has too few steps with losses here to group samples. Widen --window, or record more: opsig "
            "train --track"
        )
    first, stop = movers.first + begin, movers.first + len(movement.mean_T)
    return Window(first, stop, run.steps("losses")[first:stop], int(rises.argmax()) + 1)


def choose_by(run: Trajectory, by: str | None) -> tuple[str, str | None]:
    """What to group by where a person did not say, and a note where it is less than all: losses alone without
    checkpoints."""
    if by is not None:
        return by, None
    if run.has("checkpoints/params") and len(run.steps("checkpoints")):
        return "both", None
    return "loss", f"{run.path} holds no checkpoints, so samples are grouped by their losses alone, as with --by loss"


def checkpoints_in(run: Trajectory, window: Window) -> np.ndarray:
    """The steps of the checkpoints whose gradients are compared. Raises OpsigError where the run has none, or one of
    them is damaged."""
    if not run.has("checkpoints/params") or not len(run.steps("checkpoints")):
        raise OpsigError(f"{run.path} holds no checkpoints, which gradients need. Use --by loss")
    steps = grouping.spread(int(window.steps_T[0]), int(window.steps_T[-1]), run.steps("checkpoints"), CHECKPOINTS)
    run.check("checkpoints", steps.tolist())
    return steps


def _with_largest_gradients(
    run: Trajectory, session: Session, position: np.ndarray, window: Window, advance: Callable[..., None]
) -> np.ndarray:
    """The positions, and as many samples whose gradients are the largest over the window's checkpoints.

    Groups whose loss does not swing yet, as where a network gives both sides even odds, are found by their gradients
    alone; outliers are outliers by either (the paper's Fig. 2). At each checkpoint norms count relative to their root
    mean square. Positions alone for a backend without gradient norms.
    """
    if not isinstance(session, backends.Curvature):
        return position
    score = np.zeros(len(run.samples))
    for step in checkpoints_in(run, window).tolist():
        norms = grouping.known(session.gradient_norms(read_state(run, step)))
        score += norms / (np.sqrt(np.mean(norms**2)) or 1.0)
        advance(note=f"step {step}")
    largest = np.argsort(-score, kind="stable")[: len(position)]
    return np.concatenate([position, largest[~np.isin(largest, position)]])


def _mean_similarity(
    run: Trajectory, session: Session, backend: str, position: np.ndarray, window: Window, sketch: int | None,
    advance: Callable[..., None],
) -> np.ndarray:  # fmt: skip
    """Gradient cosines of the samples, averaged over checkpoints spread over the window, (M, M) float32.

    `sketch`: size of the sketches to estimate them from, each checkpoint's with a seed of its own; None is exact.
    """
    capability = backends.GradientCosines if sketch is None else backends.GradientSketch
    backends.require(session, capability, backend, "gradient cosines" if sketch is None else "gradient sketches")
    samples = run.samples[position]
    total = np.zeros((len(samples), len(samples)), np.float32)
    steps = checkpoints_in(run, window)
    for step in steps.tolist():
        state = read_state(run, step)
        if sketch is None:
            found = session.gradient_cosines(state, samples)  # pyright: ignore[reportAttributeAccessIssue]
            np.add(total, grouping.known(found, copy=False), out=total, casting="same_kind")
        else:
            rows = grouping.known(session.gradient_sketch(state, samples, sketch, step))  # pyright: ignore[reportAttributeAccessIssue]
            for first in range(0, len(rows), grouping.ROWS):
                total[first : first + grouping.ROWS] += rows[first : first + grouping.ROWS] @ rows.T
        advance(note=f"step {step}")
    total /= len(steps)
    if sketch is not None:
        np.fill_diagonal(total, 1)
    return total


def sketch_band(run: Trajectory, window: Window, size: int) -> float:
    """Three standard errors of a similarity from sketches of this size. Raises UsageError where it hides opposition."""
    count = len(checkpoints_in(run, window))
    band = 3 * float(np.sqrt(2 / (size * count)))
    if band > -grouping.OPPOSES:
        least = int(np.ceil(18 / (count * grouping.OPPOSES**2)))
        raise UsageError(
            f"--sketch {size} has an error band of +-{band:.2f}, in which opposition is lost. Give at least {least}"
        )
    return band


def by_gradient(
    run: Trajectory, session: Session, backend: str, position: np.ndarray, by: str, window: Window,
    advance: Callable[..., None], *, widen: bool = True, joining: bool = True, sketch: int | None = None,
) -> Clusters:  # fmt: skip
    """Group the samples at these positions by their mean gradient cosines.

    With `widen` as many samples with the largest gradients are taken with them. A pair is significant only where its
    groups share a feature (see CLAIMS), and with `by` "both" where their losses' changes are anticorrelated: what pulls
    apart by labels alone is not a feature with opposing signals. Every group is scored anew, exactly, at each
    checkpoint from the mean gradients of its members. With `joining`, samples that were not mined join the group with
    which they align and that they look like. `sketch` estimates the cosines to group by from so many numbers a sample.
    """
    sketch_error = None if sketch is None else sketch_band(run, window, sketch)
    if widen:
        position = _with_largest_gradients(run, session, position, window, advance)
    similarity_MM = _mean_similarity(run, session, backend, position, window, sketch, advance)
    likeness_MM = _mean_likeness(run, session, position, window)
    smallest = _smallest(position)
    found = grouping.group_by_similarity(similarity_MM, smallest, likeness_MM)
    members = [found.members(group) for group in range(len(found.partner_G))]
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    claimed_GG = ~(_claims(similarity_MM, likeness_MM, found.group_M) < CLAIMS)  # what is not known is not held against
    if by == "both":
        claimed_GG &= evidence.group_correlation(losses_TM, members) < 0  # losses that do not move claim nothing
    found = grouping.pair_anew(similarity_MM, found, claimed_GG)
    everybody = np.arange(len(run.samples)) if joining else position
    sets = [run.samples[position[inside]] for inside in members]
    means_CNG = _mean_cosines(run, session, window, everybody, sets, advance)
    null = significance.shuffled_null(similarity_MM, smallest=smallest) if members else Null(np.empty(0), np.empty(0))
    clusters = _weigh(
        run, Clusters(by, position, found, [], [], similarity_MM, losses_TM, window,
                      evidence.period_two(losses_TM), sketch_error=sketch_error),
        similarity_MM, means_CNG[:, position if joining else np.arange(len(position))], null, likeness_MM, claimed_GG,
    )  # fmt: skip
    outside = np.setdiff1d(everybody, position)
    if not members or not len(outside):
        return clusters
    likeness_NG = None if likeness_MM is None else _mean_likeness_with(run, session, outside, sets, window)
    group, alignment = grouping.join(means_CNG[:, outside].mean(0), found, likeness_NG)
    inside = group >= 0
    return replace(clusters, joined=Joined(outside[inside], group[inside], alignment[inside]))


def _claims(similarity_MM: np.ndarray, likeness_MM: np.ndarray | None, group_M: np.ndarray) -> np.ndarray:
    """What speaks for a feature that every two groups share with opposing signals (see CLAIMS), (G, G), or NaN."""
    sizes = np.bincount(group_M[group_M >= 0])
    if likeness_MM is None:
        return np.full((len(sizes), len(sizes)), np.nan)
    between = grouping.between_groups(similarity_MM, group_M)
    within = (sizes * np.diagonal(between) - 1) / np.maximum(sizes - 1, 1)
    opposition = -between / np.maximum(np.add.outer(within, within) / 2, 1e-12)
    alike = grouping.between_groups(likeness_MM, group_M) - SHARES
    return np.maximum(alike, 0) * opposition * np.outer(sizes, sizes) ** 0.25


def _mean_cosines(
    run: Trajectory, session: Session, window: Window, everybody: np.ndarray, sets: list[np.ndarray],
    advance: Callable[..., None],
) -> np.ndarray:  # fmt: skip
    """At each checkpoint everybody's mean gradient cosine with every group, (C, N, G)."""
    if not sets:
        return np.zeros((1, len(everybody), 0))
    rows = []
    for step in checkpoints_in(run, window).tolist():
        rows.append(session.mean_cosines(read_state(run, step), run.samples[everybody], sets))  # pyright: ignore[reportAttributeAccessIssue]
        advance(note=f"step {step}")
    return grouping.known(np.stack(rows))


def _mean_likeness(run: Trajectory, session: Session, position: np.ndarray, window: Window) -> np.ndarray | None:
    """Cosines of the samples' centred features, averaged over the checkpoints, (M, M) float32; None without features.

    Holds the features of one checkpoint beside it.
    """
    if not isinstance(session, backends.Features):
        return None
    total = np.zeros((len(position), len(position)), np.float32)
    steps = checkpoints_in(run, window).tolist()
    for step in steps:
        rows = session.features(read_state(run, step), run.samples[position])
        if rows is None:
            return None
        rows = grouping.known(rows, copy=False)
        for first in range(0, len(rows), grouping.ROWS):
            total[first : first + grouping.ROWS] += rows[first : first + grouping.ROWS] @ rows.T / len(steps)
    return total


def _mean_likeness_with(
    run: Trajectory, session: Session, outside: np.ndarray, sets: list[np.ndarray], window: Window
) -> np.ndarray:
    """Mean cosine of these samples' centred features with every group's, averaged over the checkpoints, (N, G)."""
    steps = checkpoints_in(run, window).tolist()
    rows = [session.mean_feature_cosines(read_state(run, step), run.samples[outside], sets) for step in steps]  # pyright: ignore[reportAttributeAccessIssue]
    return grouping.known(np.mean(rows, axis=0))


def by_loss(run: Trajectory, position: np.ndarray, window: Window) -> Clusters:
    """Group the samples by the correlation of their loss changes in the first half of the window, and test the groups
    on the second."""
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    half = (len(losses_TM) - 1) // 2
    first_MM, second_MM = (
        grouping.known(grouping.change_correlation(part)) for part in (losses_TM[: half + 1], losses_TM[half:])
    )
    smallest = _smallest(position)
    found = grouping.group_by_similarity(first_MM, smallest)
    means = np.stack([grouping.group_means(part, found.group_M) for part in (first_MM, second_MM)])
    null = significance.phase_null(losses_TM, smallest=smallest) if len(found.partner_G) else Null(*np.empty((2, 0)))
    clusters = Clusters("loss", position, found, [], [], first_MM, losses_TM, window, evidence.period_two(losses_TM))
    return _weigh(run, clusters, second_MM, means, null, None, np.ones((len(found.partner_G),) * 2, bool))


def _smallest(position: np.ndarray) -> int:
    return grouping.SMALLEST if len(position) >= 10 * grouping.SMALLEST else 2


def _weigh(
    run: Trajectory, clusters: Clusters, tested_MM: np.ndarray, means_CMG: np.ndarray, null: Null,
    likeness_MM: np.ndarray | None, claimed_GG: np.ndarray,
) -> Clusters:  # fmt: skip
    """With the weight of every group and pair, from `tested_MM` and the mean similarity of the samples with each group
    at each checkpoint (by losses: in each half of the window, of which the last is weighed)."""
    found, window = clusters.grouping, clusters.window
    members = [found.members(group) for group in range(len(found.partner_G))]
    stable = significance.resampled(clusters.similarity_MM, found, _smallest(clusters.position), likeness_MM)
    kept = significance.kept_at_checkpoints(means_CMG, found)
    weighed_CMG = means_CMG[-1:] if clusters.by == "loss" else means_CMG
    before, after = run.rows("losses/loss", window.first + window.rise_row - 1, window.first + window.rise_row + 1)
    change_S = after.astype(np.float64) - before
    rise = Rise(change_S[clusters.position], float(change_S.sum()), float(np.abs(change_S).sum()))
    claims_GG = _claims(clusters.similarity_MM, likeness_MM, found.group_M)
    shared_GG = claims_GG if likeness_MM is None else grouping.between_groups(likeness_MM, found.group_M)
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
        correlation = evidence.correlation(*changes)
        measured = [groups[a].cohesion, groups[b].cohesion, opposition, correlation]
        measured += [] if clusters.by == "loss" else [error]
        measured += [] if likeness_MM is None else [shared_GG[a, b], claims_GG[a, b]]
        p_value = p_value if np.isfinite(measured).all() else 1.0  # what could not be measured speaks for nothing
        pairs.append(PairWeight(
            (groups[a].cohesion + groups[b].cohesion) / 2, opposition, error, float(shared_GG[a, b]),
            float(claims_GG[a, b]), correlation, stable.pair[a, b],
            min(groups[a].kept, groups[b].kept), p_value,
            significance.random_pair_p(tested_MM, opposition, *sizes),
            significance.series_p_value(changes[0], changes[1]),
            rise.share(both), rise.share_of_movement(both), (groups[a].change, groups[b].change),
        ))  # fmt: skip
    return replace(clusters, groups=groups, pairs=pairs)

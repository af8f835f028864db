"""A run's groups and pairs from the file alone or with its task: what `cluster` prints and `report` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli.analysis import evidence, grouping, significance
from opsig_cli.analysis.group_means import group_means
from opsig_cli.analysis.significance import Null
from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError
from opsig_cli.studies import mining, tracking
from opsig_cli.studies.clustering import gathering, weighing
from opsig_cli.studies.clustering.clusters import Clusters, Joined
from opsig_cli.studies.clustering.sentences import caveat
from opsig_cli.studies.clustering.window import Window, checkpoints_in, window_of
from opsig_cli.studies.mining import Movers
from opsig_cli.trajectory.file import Trajectory

BY = ("gradient", "loss", "both")


@dataclass(frozen=True)
class Found:
    """Groups and pairs, the mined samples that they began with, and what a person should know of how."""

    clusters: Clusters
    movers: Movers
    notes: list[str]


def find(
    run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None, backend: str,
    warn: Callable[[str], None], progress: Callable[[str, int], AbstractContextManager[Any]], *,
    samples: Sequence[int] | None = None, window: tuple[int | None, int | None] = (None, None),
    join: bool | None = None, sketch: int | None = None,
) -> Found:  # fmt: skip
    """Group the samples of a run that move most, or the `samples` given by index, by what they do in a window of steps.

    `by`, `top`, `join` None: as the run allows. Raises OpsigError where the run lacks what is asked for, or its task.
    """
    run.require("losses/loss")
    by, fallback = choose_by(run, by)
    found = mining.find(run, top or mining.default_count(len(run.samples)), window=window)
    position = found.position if samples is None else mining.positions_of(run, samples)
    if len(position) < 2:
        raise OpsigError(f"{len(position)} samples cannot be grouped. Mine more: opsig mine {run.path} --top 200")
    weighed = window_of(run, found)
    if by == "loss":
        clusters = by_loss(run, position, weighed)
    else:
        steps = checkpoints_in(run, weighed)
        if sketch is not None:
            gathering.sketch_band(run, weighed, sketch)  # refused before anything is loaded
        session, _ = tracking.open_session(run, task, device, backend, warn)
        if join is None and not (join := not getattr(session, "couples_samples", False)):
            warn("note: nobody joins: with batch norm in chunks each costs a chunk; see --join")
        with progress("gradients", (3 if samples is None else 2) * len(steps)) as advance:
            clusters = by_gradient(
                run, session, backend, position, by, weighed, advance,
                widen=samples is None, joining=join, sketch=sketch,
            )  # fmt: skip
    notes = [words for words in (fallback, found.note, caveat(clusters)) if words]
    return Found(clusters, found, notes)


def choose_by(run: Trajectory, by: str | None) -> tuple[str, str | None]:
    """What to group by where a person did not say, and a note where it is less than all: losses alone without
    checkpoints."""
    if by is not None:
        return by, None
    if run.has("checkpoints/params") and len(run.steps("checkpoints")):
        return "both", None
    return "loss", f"{run.path} holds no checkpoints, so samples are grouped by their losses alone, as with --by loss"


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
    sketch_error = None if sketch is None else gathering.sketch_band(run, window, sketch)
    if widen:
        position = gathering.with_largest_gradients(run, session, position, window, advance)
    similarity_MM = gathering.mean_similarity(run, session, backend, position, window, sketch, advance)
    likeness_MM = gathering.mean_likeness(run, session, position, window)
    smallest = weighing.smallest(position)
    found = grouping.group_by_similarity(similarity_MM, smallest, likeness_MM)
    members = [found.members(group) for group in range(len(found.partner_G))]
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    claimed_GG = ~(
        weighing.claims(similarity_MM, likeness_MM, found.group_M) < weighing.CLAIMS
    )  # what is not known is not held against
    if by == "both":
        claimed_GG &= ~(evidence.group_correlation(losses_TM, members) >= 0)
    found = grouping.pair_anew(similarity_MM, found, claimed_GG)
    everybody = np.arange(len(run.samples)) if joining else position
    sets = [run.samples[position[inside]] for inside in members]
    means_CNG = gathering.group_cosines(run, session, window, everybody, sets, advance)
    null = significance.shuffled_null(similarity_MM, smallest=smallest) if members else Null(np.empty(0), np.empty(0))
    clusters = weighing.weigh(
        run, Clusters(by, position, found, [], [], similarity_MM, losses_TM, window,
                      evidence.period_two(losses_TM), sketch_error=sketch_error),
        similarity_MM, means_CNG[:, position if joining else np.arange(len(position))], null, likeness_MM, claimed_GG,
    )  # fmt: skip
    outside = np.setdiff1d(everybody, position)
    if not members or not len(outside):
        return clusters
    likeness_NG = None if likeness_MM is None else gathering.mean_likeness_with(run, session, outside, sets, window)
    group, alignment = grouping.join(means_CNG[:, outside].mean(0), found, likeness_NG)
    inside = group >= 0
    return replace(clusters, joined=Joined(outside[inside], group[inside], alignment[inside]))


def by_loss(run: Trajectory, position: np.ndarray, window: Window) -> Clusters:
    """Group the samples by the correlation of their loss changes in the first half of the window, and test the groups
    on the second."""
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    half = (len(losses_TM) - 1) // 2
    first_MM, second_MM = (
        np.nan_to_num(grouping.change_correlation(part)) for part in (losses_TM[: half + 1], losses_TM[half:])
    )
    smallest = weighing.smallest(position)
    found = grouping.group_by_similarity(first_MM, smallest)
    means = np.stack([group_means(part, found.group_M) for part in (first_MM, second_MM)])
    null = significance.phase_null(losses_TM, smallest=smallest) if len(found.partner_G) else Null(*np.empty((2, 0)))
    clusters = Clusters("loss", position, found, [], [], first_MM, losses_TM, window, evidence.period_two(losses_TM))
    return weighing.weigh(run, clusters, second_MM, means, null, None, np.ones((len(found.partner_G),) * 2, bool))

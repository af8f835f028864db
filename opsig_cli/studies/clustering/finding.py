"""A run's groups and pairs from the file alone or with its task: what `cluster` prints and `report` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.analysis import evidence, grouping, significance
from opsig_cli.analysis.gram import Similarity, formed
from opsig_cli.analysis.group_means import group_means
from opsig_cli.analysis.grouping import Grouping
from opsig_cli.analysis.likeness import ALIKE, alike_between
from opsig_cli.analysis.pairing import opposing
from opsig_cli.analysis.rounds import one_after_the_other
from opsig_cli.analysis.significance import NOTHING
from opsig_cli.backends import PRODUCTS, Session
from opsig_cli.studies import tracking
from opsig_cli.studies.clustering import gathering, silencing, slopes, weighing
from opsig_cli.studies.clustering.asked import prepared
from opsig_cli.studies.clustering.clusters import Clusters, Tests
from opsig_cli.studies.clustering.joining import Candidates, candidates, cosines
from opsig_cli.studies.clustering.sentences import caveat
from opsig_cli.studies.clustering.trying import judged, tried
from opsig_cli.studies.clustering.window import Window, checkpoints_in, held_out_in
from opsig_cli.studies.filled import filled
from opsig_cli.studies.mining import Movers
from opsig_cli.studies.pace import paced
from opsig_cli.trajectory.file import Trajectory

BY = ("gradient", "slope", "loss", "both")
TESTS = ("replay", "held-out", "none")
MOST_CHANGES = 2048
"""Steps by whose loss changes samples are grouped with --by loss: the null takes a transform of them a round."""


@dataclass(frozen=True)
class Found:
    """Groups and pairs, the mined samples that they began with, and what a person should know of how.

    `view`: the run with the losses that they were weighed on, where these are not the file's.
    """

    clusters: Clusters
    movers: Movers
    notes: list[str]
    view: Trajectory | None = None

    def whole(self, run: Trajectory) -> Trajectory:
        """The run, to be read, with losses of all samples in all its rows."""
        return self.view or filled(run, self.movers.known)


def find(
    run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None, backend: str | None,
    warn: Callable[[str], None], progress: Callable[[str, int], AbstractContextManager[Any]], *,
    samples: Sequence[int] | None = None, window: tuple[int | None, int | None] = (None, None),
    join: bool | None = None, sketch: int | None = None, test: str = "replay", budget: int | None = None,
    allow_changed_data: bool = False,
) -> Found:  # fmt: skip
    """Group the samples of a run that move most, or the `samples` given by index, by what they do in a window of steps.

    `by`, `top`, `join` None: as the run allows. `test`: whether pairs are tried by repeating training with their
    samples silent ("replay", for at most `budget` steps in all), on held-out checkpoints alone, or not. Raises
    OpsigError where the run lacks what is asked for, or its task.
    """
    asked = prepared(run, by, top, samples, window)
    run, by, found, position, weighed = asked.run, asked.by, asked.movers, asked.position, asked.window
    if sketch is None and by not in ("loss", "slope") and not formed(asked.grouped):
        sketch = gathering.sketch_size(run, weighed)
    if words := asked.by_rows(sketch):
        warn(words)
    if by == "loss":
        clusters = judged(by_loss(run, position, weighed), silencing.Outcome({}, {}, []), test)
        if len(weighed.steps_T) > MOST_CHANGES + 1:
            warn(f"note: losses are compared over the last {MOST_CHANGES:,} changes alone. Choose others with --window")
    else:
        steps = checkpoints_in(run, weighed)
        if sketch is not None:
            gathering.sketch_band(run, weighed, sketch)  # refused before anything is loaded
        session, _ = tracking.open_session(run, task, device, backend, warn, allow_changed_data)
        if join is None and (why := gathering.why_nobody_joins(session)):
            warn(f"note: nobody joins: {why}; see --join")
            join = False
        asked.require(session, join is not False, test, budget)
        coordinates = None
        if by == "slope":
            parts = len(slopes.checkpoints_of(run, weighed))
            bar = progress("eigenvectors", parts)
            with bar as shown, paced(session, shown, parts, slopes.COUNT * PRODUCTS) as advance:
                coordinates = slopes.gather(run, session, backend, weighed, warn, advance)
        parts = (3 if samples is None else 2) * len(steps)
        with progress("gradients", parts) as shown, paced(session, shown, parts) as advance:
            clusters = by_gradient(
                run, session, backend, position, by, weighed, advance,
                widen=samples is None, joining=join is not False, sketch=sketch, coordinates=coordinates,
            )  # fmt: skip
        outcome = tried(run, session, clusters, held_out_in(run, weighed), test, budget, progress)
        clusters = judged(clusters, outcome, test)
        if coordinates is not None:
            warn(f"note: {coordinates.note}")
            clusters = slopes.with_vectors(clusters, coordinates.measured[-1])
    if clusters.on_vectors is None:
        clusters = slopes.with_vectors(clusters, slopes.kept_near(run, weighed))
    first, second = (asked.fallback, found.note) if found.known is None else (found.note, asked.fallback)
    notes = [words for words in (first, second, caveat(clusters)) if words]
    return Found(clusters, found, notes)


def by_gradient(
    run: Trajectory, session: Session, backend: str | None, position: np.ndarray, by: str, window: Window,
    advance: Callable[..., None], *, widen: bool = True, joining: bool = True, sketch: int | None = None,
    coordinates: slopes.Coordinates | None = None,
) -> Clusters:  # fmt: skip
    """Group the samples at these positions by their mean gradient cosines, or by those of their `coordinates`.

    With `widen` as many samples with the largest gradients are taken with them. Groups that look alike are paired
    first, and with `by` "both" those whose losses swing against each other. Every group is scored anew, exactly, by
    the mean gradients of its members at checkpoints that had no part in finding it. With `joining`, samples that were
    not mined join the group with which they align there and that they look like, no more than were mined. `sketch`
    estimates the cosines to group by from so many numbers a sample.
    """
    sketch_error = None if sketch is None else gathering.sketch_band(run, window, sketch)
    if widen and coordinates is not None:
        position = coordinates.widened(position)
    elif widen:
        position = gathering.with_largest_gradients(run, session, position, window, advance)
    smallest = weighing.smallest(position)
    if coordinates is not None:
        similarity_MM = coordinates.similarity(position, smallest)
    else:
        similarity_MM = gathering.mean_similarity(run, session, backend, position, window, sketch, advance)
    in_rounds = session.in_rounds if isinstance(session, backends.Together) else one_after_the_other
    likeness_MM = gathering.mean_likeness(run, session, position, window, in_rounds)
    found = grouping.group_by_similarity(similarity_MM, smallest, likeness_MM)
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    alike_GG = None if likeness_MM is None else alike_between(likeness_MM, found.group_M)
    labels = run.read("samples/label")[position] if run.has("samples/label") else None
    labelled = labels is not None and significance.shared(labels)
    below_GG = None if alike_GG is None else opposing(alike_GG, labelled)
    found = grouping.pair_anew(similarity_MM, found, _preferred(found, alike_GG, losses_TM, by == "both"), below_GG)
    members = [found.members(group) for group in range(len(found.partner_G))]
    sets = [run.samples[position[inside]] for inside in members]
    steps, held_out = checkpoints_in(run, window), held_out_in(run, window)
    tested_on = held_out if len(held_out) else steps
    others = Candidates(position[:0], None)
    if joining:
        others = candidates(run, session, position, sets, window, looks=likeness_MM is not None)
    means_CMG, joined = cosines(run, session, tested_on, position, others, found, sets, advance)
    null = NOTHING
    if members and coordinates is None:
        null = significance.gaussian_null(similarity_MM, likeness_MM, labels, smallest=smallest, in_rounds=in_rounds)
    elif members:  # what a pair is weighed by are cosines of gradients
        some = significance.fitted(len(position))
        cosines_MM = gathering.mean_similarity(run, session, backend, position[some], window, sketch, advance)
        looks_MM = None if likeness_MM is None else likeness_MM[np.ix_(some, some)]
        labels = None if labels is None else labels[some]
        null = significance.gaussian_null(
            cosines_MM, looks_MM, labels, smallest=smallest, total=len(position), in_rounds=in_rounds
        )
    clusters = Clusters(
        by, position, found, [], [], similarity_MM, losses_TM, window, evidence.period_two(losses_TM), alike_GG, joined,
        tests=Tests(steps.tolist(), held_out.tolist(), []), sketch_error=sketch_error, labelled=labelled,
    )  # fmt: skip
    return weighing.weigh(run, clusters, means_CMG, null, likeness_MM, in_rounds)


def _preferred(found: Grouping, alike_GG: np.ndarray | None, losses_TM: np.ndarray, by_losses: bool) -> np.ndarray:
    """Which groups are paired first, (G, G): those that look alike, and whose losses do not swing together; what is not
    known is not held against a pair."""
    count = len(found.partner_G)
    preferred_GG = np.ones((count, count), bool) if alike_GG is None else ~(alike_GG < ALIKE)
    if by_losses and count > 1:
        means_TG = evidence.mean_losses(losses_TM, [found.members(group) for group in range(count)])
        for a, b in np.argwhere(preferred_GG):
            preferred_GG[a, b] = not evidence.correlation_without_drift(means_TG[:, a], means_TG[:, b]) >= 0
    return preferred_GG


def _correlation(losses_TM: np.ndarray) -> Similarity:
    """Correlation of the loss changes of every two samples; of more than are formed by rows."""
    if formed(losses_TM.shape[1]):
        return grouping.known(grouping.change_correlation(losses_TM))
    return grouping.change_rows(losses_TM)


def by_loss(run: Trajectory, position: np.ndarray, window: Window) -> Clusters:
    """Group the samples by the correlation of their loss changes in the first half of the window, and test the groups
    on the second; of a window longer than MOST_CHANGES its end is taken."""
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    recent_TM = losses_TM[-MOST_CHANGES - 1 :]
    half = (len(recent_TM) - 1) // 2
    first_MM, second_MM = map(_correlation, (recent_TM[: half + 1], recent_TM[half:]))
    smallest = weighing.smallest(position)
    found = grouping.group_by_similarity(first_MM, smallest)
    means = group_means(second_MM, found.group_M)[None]
    null = significance.phase_null(recent_TM, smallest=smallest) if len(found.partner_G) else NOTHING
    clusters = Clusters("loss", position, found, [], [], first_MM, losses_TM, window, evidence.period_two(losses_TM))
    return weighing.weigh(run, clusters, means, null, None)

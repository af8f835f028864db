"""The groups behind a spike in a run that saw its samples batch by batch: gradients at the checkpoints around it.

A sample is seen a few times in a whole run, so that losses say who was hit and when, and not who moves with whom. Those
who were hit are grouped by their gradients, and those who pushed them are looked for among all samples: whose gradients
oppose theirs. N samples, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.analysis import grouping, mining
from opsig_cli.analysis.gram import formed
from opsig_cli.analysis.pairing import OPPOSES
from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies import missing, planning, sighted, tracking
from opsig_cli.studies.clustering import finding, gathering, slopes, weighing
from opsig_cli.studies.clustering.asked import WORDS, by_rows, bytes_of, require_few
from opsig_cli.studies.clustering.finding import Found
from opsig_cli.studies.clustering.sentences import caveat
from opsig_cli.studies.clustering.trying import judged, tried
from opsig_cli.studies.clustering.window import CHECKPOINTS, HELD_OUT, Window, checkpoints_in, divided, held_out_in
from opsig_cli.studies.measured import measured
from opsig_cli.studies.mining import Movers, default_count, positions_of
from opsig_cli.studies.pace import paced
from opsig_cli.studies.planning import Count, Plan, Stage
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

AROUND = 16
"""Steps before and after the spike that are mined where a person names no window."""
OPPONENTS = 2
"""Samples that oppose a group, at most, for each that it has."""
EACH_SIDE = 2
"""Checkpoints before and after the window that are taken with those in it."""


@dataclass(frozen=True)
class Asked:
    """What is to be grouped, before any task is opened: whom, by the gradients of which checkpoints, and the steps
    that were `mined`, first and last."""

    run: Trajectory
    position: np.ndarray
    steps: np.ndarray
    mined: tuple[int, int]

    def stages(self, first: int, session: Session, joining: bool, test: str) -> list[Stage]:
        """What grouping so many samples measures, with as many opponents as they may have."""
        times, held_out = map(len, divided(self.steps))
        grouped = self.grouped(first)
        what = "gradients" if formed(first) else "norms"
        return [
            Stage("losses", len(self.steps) + times),
            Stage(what, times, first, bytes_of(first)),
            Stage("alignment", times, session.samples),
            Stage(what, times, grouped, bytes_of(grouped, first)),
            Stage("alignment", held_out or times, session.samples if joining else grouped),
            *([Stage("curvature", held_out)] if test != "none" else []),
        ]

    def grouped(self, first: int) -> int:
        """How many samples are grouped with so many, at the most."""
        return min((1 + OPPONENTS) * first, len(self.run.samples))

    def counted(self, *how: Any) -> Count:
        """The number of samples that memory is a question of."""
        return Count("--top", len(self.position), lambda first: self.stages(first, *how))

    def require(self, session: Session, joining: bool, test: str) -> None:
        """Raise OpsigError for what does not fit the memory."""
        how = (session, joining, test)
        state = read_state(self.run, int(self.steps[0]))
        planning.require(session, WORDS, self.stages(len(self.position), *how), state, self.counted(*how))


def find(
    run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None, backend: str | None,
    warn: Callable[[str], None], progress: Callable[[str, int], AbstractContextManager[Any]], *,
    samples: Sequence[int] | None = None, window: tuple[int | None, int | None] = (None, None),
    join: bool | None = None, sketch: int | None = None, test: str = "replay", budget: int | None = None,
    allow_changed_data: bool = False,
) -> Found:  # fmt: skip
    """Group the samples that were above or below the expected around a spike, or the `samples` given by index, and
    those that oppose them.

    Arguments as of `finding.find`. Raises OpsigError where the run has no two checkpoints, UsageError for what needs
    the losses of all samples at many steps.
    """
    asked = prepared(run, by, top, samples, window)
    position, steps = asked.position, asked.steps
    session, _ = tracking.open_session(run, task, device, backend, warn, allow_changed_data)
    if join is None:
        join = joins(session)
    asked.require(session, join, test)
    view = measured(run, session, steps.tolist())
    moved = mining.largest_changes([view.losses()])
    weighed = Window(0, len(steps), steps, int(np.diff(moved.mean_T).argmax()) + 1)
    if sketch is not None:
        gathering.sketch_band(view, weighed, sketch)
    with progress("gradients", 4 * len(steps)) as shown, paced(session, shown, 4 * len(steps)) as advance:
        position = with_opponents(view, session, backend, position, weighed, advance)
        if sketch is None and not formed(len(position)):
            sketch = gathering.sketch_size(view, weighed)
            warn(by_rows(len(position), sketch))
        clusters = finding.by_gradient(
            view, session, backend, position, "gradient", weighed, advance, widen=False, joining=join, sketch=sketch
        )
    outcome = tried(view, session, clusters, held_out_in(view, weighed), test, budget, progress)
    clusters = slopes.with_vectors(judged(clusters, outcome, test), slopes.kept_near(view, weighed))
    first, last = asked.mined
    span = f"step {first}" if first == last else f"steps {first} to {last}"
    note = (
        f"seen batch by batch (sightings): grouped by gradients at the checkpoints of steps "
        f"{', '.join(map(str, steps))}, the nearest to {span}; changes of losses are between these"
    )
    movers = Movers(position, moved.place[position], moved, 0, "change", note)
    return Found(clusters, movers, [words for words in (note, caveat(clusters)) if words], view)


def prepared(
    run: Trajectory, by: str | None, top: int | None, samples: Sequence[int] | None,
    window: tuple[int | None, int | None],
) -> Asked:  # fmt: skip
    """What `find` is asked for. Raises as that does."""
    if by not in (None, "gradient"):
        raise UsageError(f"{run.path} saw its samples batch by batch, which --by {by} cannot group. Use --by gradient")
    held = run.steps("checkpoints")
    if not run.has("checkpoints/params") or len(held) < 2:
        raise OpsigError(
            f"{run.path} holds sightings and {len(held)} checkpoints: groups need gradients at two checkpoints around "
            f"the spike. Who was hit is told without them: opsig mine {run.path} --step N"
        )
    if window == (None, None):
        spike = _spike(run)
        window = (spike - AROUND, spike + AROUND)
    mined = sighted.find(run, top or default_count(len(run.samples)), None, None, window, "both")
    position = mined.rows["place"] if samples is None else positions_of(run, samples)
    if len(position) < 2:
        raise OpsigError(missing.too_few(run, len(position)))
    asked = Asked(run, position, near(held, *mined.window), mined.window)
    require_few(asked.grouped(len(position)), 1 + OPPONENTS)
    return asked


def joins(session: Session) -> bool:
    """Whether others join where a person did not say."""
    return not getattr(session, "couples_samples", False)


def plan(
    run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None, backend: str | None,
    warn: Callable[[str], None], *, samples: Sequence[int] | None = None,
    window: tuple[int | None, int | None] = (None, None), join: bool | None = None, test: str = "replay",
    allow_changed_data: bool = False, **others: Any,
) -> Plan:  # fmt: skip
    """What `find` takes with the same options, of which `others` change nothing: one record."""
    asked = prepared(run, by, top, samples, window)
    session, _ = tracking.open_session(run, task, device, backend, warn, allow_changed_data)
    how = (session, joins(session) if join is None else join, test)
    state = read_state(run, int(asked.steps[0]))
    return planning.plan(
        run.path, session, backend, WORDS, asked.stages(len(asked.position), *how), state, len(asked.steps),
        counted=asked.counted(*how),
    )  # fmt: skip


def near(held: np.ndarray, first: int, last: int) -> np.ndarray:
    """The checkpoints in a window and EACH_SIDE of it, increasing, at least two; at most so many as evidence takes.

    >>> near(np.array([0, 10, 20, 30, 40, 50]), 25, 25).tolist(), near(np.array([0, 10]), 25, 25).tolist()
    ([10, 20, 30, 40], [0, 10])
    """
    low = max(0, int(np.searchsorted(held, first)) - EACH_SIDE)
    high = min(len(held), int(np.searchsorted(held, last, side="right")) + EACH_SIDE)
    low, high = min(low, max(0, high - 2)), max(high, min(len(held), low + 2))
    return grouping.spread(int(held[low]), int(held[high - 1]), held, CHECKPOINTS + HELD_OUT)


def with_opponents(
    run: Trajectory,
    session: Session,
    backend: str | None,
    position: np.ndarray,
    window: Window,
    advance: Callable[..., None],
) -> np.ndarray:
    """The positions, and for each group among them up to twice as many samples of the run that oppose it most.

    What finds them are the checkpoints that groups are found by; groups are weighed on others.
    """
    sketch = None if formed(len(position)) else gathering.sketch_size(run, window)
    similarity_MM = gathering.mean_similarity(run, session, backend, position, window, sketch, advance)
    found = grouping.group_by_similarity(similarity_MM, weighing.smallest(position))
    members = [position[found.members(group)] for group in range(len(found.partner_G))]
    if not members:
        return position
    everybody = np.arange(len(run.samples))
    sets = [run.samples[inside] for inside in members]
    steps, rows = checkpoints_in(run, window), []
    every = gathering.group_cosines(run, session, steps, everybody, sets)
    for step, means_NG in zip(steps.tolist(), every, strict=True):
        rows.append(means_NG)
        advance(note=f"step {step}")
    cosine_NG = np.mean(rows, axis=0)
    opponents = []
    for inside, cosine_N in zip(members, cosine_NG.T, strict=True):
        most = np.argsort(cosine_N, kind="stable")[: OPPONENTS * len(inside)]
        opponents.append(most[cosine_N[most] <= OPPOSES])
    added = np.concatenate(opponents)
    _, first = np.unique(added, return_index=True)
    added = added[np.sort(first)]
    return np.concatenate([position, added[~np.isin(added, position)]])


def _spike(run: Trajectory) -> int:
    """The step whose batch was furthest above the expected of all."""
    found = sighted.find(run, 1, None, None, (None, None), "both")
    above = found.means_T - found.trend.before
    return int(found.steps_T[np.nanargmax(above)] if np.isfinite(above).any() else found.steps_T[-1])

"""What is to be grouped, before a task is opened, and what that will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.analysis import gram
from opsig_cli.analysis.gram import formed
from opsig_cli.analysis.significance import MOST_FITTED
from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError
from opsig_cli.studies import mining, missing, planning, tracking
from opsig_cli.studies.clustering import gathering, silencing, slopes
from opsig_cli.studies.clustering.window import Window, checkpoints_in, held_out_in, window_of
from opsig_cli.studies.filled import filled
from opsig_cli.studies.mining import Movers
from opsig_cli.studies.planning import LOADED_LATER, Count, Plan, Stage
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

MOST_GROUPED = 100_000
"""M: samples that are compared, in a time that grows with M^2."""
BYTES_A_PAIR = 20
"""Similarity, likeness and their mean in float32, and the distances that a tree is made from."""
BYTES_A_SAMPLE = 40_000
"""Where more than MOST_FORMED are grouped by rows: these, weighted, and the mean rows of clusters."""
WORDS = "cluster"


@dataclass(frozen=True)
class Asked:
    """What is to be grouped, before any task is opened: the run with losses of all, how, whom and where.

    `widens`: whether as many samples by their gradients are taken to those at `position`.
    """

    run: Trajectory
    by: str
    fallback: str | None
    movers: Movers
    position: np.ndarray
    window: Window
    widens: bool

    def stages(self, mined: int, session: Session, joining: bool, test: str, budget: int | None) -> list[Stage]:
        """What grouping so many mined samples measures, one after the other."""
        times, held_out = len(checkpoints_in(self.run, self.window)), len(held_out_in(self.run, self.window))
        grouped = self._widened(mined)
        found = [Stage("eigenpairs", len(slopes.checkpoints_of(self.run, self.window)), slopes.COUNT)]
        found = found if self.by == "slope" else []
        if self.widens:
            found.append(Stage("norms", times, session.samples))
        compared = min(grouped, MOST_FITTED) if self.by == "slope" else grouped
        what = "gradients" if formed(compared) else "norms"
        found.append(Stage(what, times, compared, LOADED_LATER + bytes_of(grouped, mined)))
        found += [
            Stage("losses", times),
            Stage("alignment", held_out or times, session.samples if joining else grouped, LOADED_LATER),
        ]
        if test == "replay" and silencing.replayable(self.run, session):
            found.append(Stage("training", silencing.BUDGET if budget is None else budget))
        if test != "none":
            found.append(Stage("curvature", held_out))
        return found

    @property
    def grouped(self) -> int:
        """How many samples are grouped, at the most."""
        return self._widened(len(self.position))

    def _widened(self, mined: int) -> int:
        return min(2 * mined, len(self.run.samples)) if self.widens else mined

    def by_rows(self, sketch: int | None) -> str | None:
        """What to say where these are too many for the similarity of every two; None where they are not."""
        if formed(self.grouped):
            return None
        return by_rows(self.grouped, None if self.by in ("loss", "slope") else sketch)

    def counted(self, *how: Any) -> Count:
        """The number of samples that memory is a question of."""
        return Count("--top", len(self.position), lambda mined: self.stages(mined, *how))

    def require(self, session: Session, joining: bool, test: str, budget: int | None) -> None:
        """Raise OpsigError for what does not fit the memory."""
        how = (session, joining, test, budget)
        state = read_state(self.run, int(checkpoints_in(self.run, self.window)[0]))
        planning.require(session, WORDS, self.stages(len(self.position), *how), state, self.counted(*how))


def by_rows(count: int, sketch: int | None) -> str:
    """What to say of so many samples, which are grouped by their rows, or by sketches of this size a checkpoint."""
    exact = "what is said of the groups that are found is exact"
    how = "" if sketch is None else f" of sketches of {sketch} numbers a checkpoint; {exact}"
    return f"note: {count:,} samples, more than {gram.MOST_FORMED:,}, are grouped by rows{how}"


def require_few(grouped: int, times: int) -> None:
    """Raise OpsigError where more are to be grouped than are compared: `times` as many as are asked for, or all."""
    if grouped > MOST_GROUPED:
        raise OpsigError(
            f"{grouped:,} samples cannot be compared with each other: that takes hours. Give at most "
            f"{MOST_GROUPED // times:,}: those left out can still join the groups that are found"
        )


def bytes_of(count: int, least: int | None = None) -> int:
    """Memory that grouping so many samples takes, beside what measuring them does; of a number that may turn out to be
    as small as `least` the most that any takes."""
    if formed(count):
        return count**2 * BYTES_A_PAIR
    as_pairs = gram.MOST_FORMED**2 * BYTES_A_PAIR if least is not None and formed(least) else 0
    return max(count * BYTES_A_SAMPLE, as_pairs)


def prepared(
    run: Trajectory, by: str | None, top: int | None, samples: Sequence[int] | None,
    window: tuple[int | None, int | None],
) -> Asked:  # fmt: skip
    """What `find` is asked for. Raises OpsigError where the run lacks it."""
    run.require("losses/loss")
    by, fallback = choose_by(run, by)
    found = mining.find(run, top or mining.default_count(len(run.samples)), window=window)
    run = filled(run, found.known)
    position = found.position if samples is None else mining.positions_of(run, samples)
    if found.known is not None:
        position = position[~np.isin(position, found.known.never)]
    if len(position) < 2:
        raise OpsigError(missing.too_few(run, len(position)))
    asked = Asked(run, by, fallback, found, position, window_of(run, found), samples is None and by != "loss")
    require_few(asked.grouped, 2 if asked.widens else 1)
    return asked


def choose_by(run: Trajectory, by: str | None) -> tuple[str, str | None]:
    """What to group by where a person did not say, and a note where it is less than all: losses alone without
    checkpoints."""
    if by is not None:
        return by, None
    if run.has("checkpoints/params") and len(run.steps("checkpoints")):
        return "both", None
    return "loss", f"{run.path} holds no checkpoints, so samples are grouped by their losses alone, as with --by loss"


def plan(
    run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None, backend: str | None,
    warn: Callable[[str], None], *, samples: Sequence[int] | None = None,
    window: tuple[int | None, int | None] = (None, None), join: bool | None = None, sketch: int | None = None,
    test: str = "replay",
    budget: int | None = None, allow_changed_data: bool = False,
) -> Plan:  # fmt: skip
    """What `finding.find` takes with the same options: one record."""
    asked = prepared(run, by, top, samples, window)
    if asked.by == "loss":
        return planning.plan_of_file(run.path, WORDS, bytes_of(len(asked.position)))
    session, _ = tracking.open_session(asked.run, task, device, backend, warn, allow_changed_data)
    how = (session, join if join is not None else gathering.why_nobody_joins(session) is None, test, budget)
    steps = [*checkpoints_in(asked.run, asked.window), *held_out_in(asked.run, asked.window)]
    return planning.plan(
        run.path, session, backend, WORDS, asked.stages(len(asked.position), *how),
        read_state(asked.run, int(steps[0])), len(steps), counted=asked.counted(*how),
    )  # fmt: skip

"""The futures of one fork, trained into a file of their own or in memory. S samples, K sets of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.courses import Course, Tally
from opsig_cli.backends import Session, State, targets_of
from opsig_cli.errors import OpsigError
from opsig_cli.settings import Settings
from opsig_cli.studies import answers, training
from opsig_cli.studies.branching.fork import sharpness_at
from opsig_cli.studies.replaying import replay
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder
from opsig_cli.trajectory.states import read_state

Advance = Callable[..., None]
Observe = Callable[[int, float, np.ndarray | None], None]
"""Takes a step, its training loss, and the losses (S,) of all samples where they were measured."""


@dataclass(frozen=True)
class Plan:
    """What to train: settings (their `steps` is where it ends), first state, and the samples' weights (S,) or None."""

    settings: Settings
    start: State
    weights: np.ndarray | None

    def is_like(self, other: Plan) -> bool:
        """Whether two plans from one fork have the same future."""
        return self.settings == other.settings and self.start is other.start and self.weights is other.weights


@dataclass(frozen=True)
class Future:
    """What came: the course of every set, the share predicted right in the end, the last sharpness where measured, and
    the step at which the loss stopped being finite."""

    course: Course
    accuracy: float | None
    sharpness: float | None
    stopped_at: int | None


class Futures:
    """Trains plans and tells what came.

    `sets`: positions or masks, for all of which every future is tallied; `labels`: (S,) integers as predicted, or None;
    `sharpness`: whether to measure it at the end of each.
    """

    def __init__(
        self, session: Session, sets: Sequence[np.ndarray], labels: np.ndarray | None, sharpness: bool, advance: Advance
    ):
        self._session = session
        self._sets = sets
        self._labels = labels
        self._sharpness = sharpness
        self._advance = advance

    def in_memory(self, plan: Plan, stop: training.StopRequest, observe: Observe | None = None) -> Future:
        """Train in memory. Raises OpsigError, with exit code 130, where a person asks to stop."""
        tally, predicted, last, stopped = Tally(self._sets), None, None, plan.start.step
        settings, fork = plan.settings, plan.start.step
        for snapshot in replay(
            self._session, settings, plan.start, settings.steps - fork, plan.weights,
            lambda step: settings.losses_at(step) or step == fork,
            lambda step: self._sharpness and step == settings.steps,
        ):  # fmt: skip
            if stop.asked:
                raise OpsigError("interrupted. Branches that were finished are kept", exit_code=130)
            if snapshot.losses is not None:
                tally.add(snapshot.step, snapshot.losses)
                predicted = snapshot.predictions
            if observe:
                observe(snapshot.step, snapshot.train_loss, snapshot.losses)
            last, stopped = snapshot.state, snapshot.step + 1
            self._advance(note=f"step {snapshot.step}")
        return self._future(plan, tally, predicted, last, None if stopped > settings.steps else stopped)

    def into_file(
        self, plan: Plan, recorder: Recorder, stop: training.StopRequest, observe: Observe | None = None
    ) -> Future:
        """Train into a new file, which holds the fork's checkpoint; a loss that stops being finite ends it early.

        Raises OpsigError, with exit code 130, where a person asks to stop: what was trained is kept.
        """
        path, ended = recorder.run.path, None
        try:
            with recorder:
                for _ in training.run(recorder, self._session, plan.settings, plan.start, stop, self._advance):
                    pass
        except OpsigError:
            with open_trajectory(path) as branch:
                ended = str(branch.attributes.get("state", ""))
                begun = branch.has("losses/loss")
            if not begun:
                os.unlink(path)  # a branch that cannot be trained leaves no file
            if not ended.startswith("stopped"):
                raise
        with open_trajectory(path) as branch:
            if stop.asked and branch.attributes["state"] != "complete":
                follow = answers.resuming(str(path), answers.task_of(branch, None))
                raise OpsigError(f"interrupted. Continue with: {follow}", exit_code=130)
            return self._read(plan, branch, observe, ended is not None)

    def _read(self, plan: Plan, branch: Trajectory, observe: Observe | None, stopped: bool) -> Future:
        tally, predicted = Tally(self._sets), None
        steps = branch.steps("losses").tolist()
        logged = branch.steps("scalars")
        train_loss = dict(zip(logged.tolist(), branch.rows("scalars/train_loss", 0, len(logged)).tolist(), strict=True))
        row, last, targets = -1, plan.start.step - 1, targets_of(self._session)
        for first, rows in branch.blocks("losses/loss") if branch.has("losses/loss") else ():
            for row, losses in enumerate(rows, first):
                if not np.isfinite(losses[targets]).all():
                    break
                last = steps[row]
                tally.add(last, losses)
                if observe:
                    observe(last, train_loss.get(last, np.nan), losses)
        if row >= 0 and branch.has("losses/prediction"):
            predicted = branch.rows("losses/prediction", row, row + 1)[0]
        wanted = self._sharpness and not stopped
        state = read_state(branch, plan.settings.steps) if wanted else None
        return self._future(plan, tally, predicted, state, last + 1 if stopped else None)

    def _future(
        self, plan: Plan, tally: Tally, predicted: np.ndarray | None, last: State | None, stopped: int | None
    ) -> Future:
        accuracy = sharpness = None
        if predicted is not None and self._labels is not None:
            accuracy = float(np.mean((predicted == self._labels)[targets_of(self._session)]))
        if last is not None:
            sharpness = sharpness_at(self._session, plan.settings, last)
        return Future(tally.course(), accuracy, sharpness, stopped)

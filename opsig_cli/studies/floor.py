"""The floor of the valley: a run's state without its oscillation at period two. P parameters.

At the edge of stability the iterates bounce between the walls of a valley, (-1)^t a away from its floor, and the
Hessian is sharper where they stand than between them. (theta_t + 2 theta_t+1 + theta_t+2) / 4 takes the bounce out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsig_cli.analysis import mining
from opsig_cli.backends import Session, State
from opsig_cli.errors import OpsigError
from opsig_cli.studies.filled import LOSS, coverage_of, filled
from opsig_cli.studies.replaying import replay
from opsig_cli.studies.trained import settings_at, settings_of, weights_of, why_not_repeated
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

PLACES = ("floor", "iterate")
WEIGHTS = (0.25, 0.5, 0.25)
BOUNCING = ("gd", "sgd", "momentum", "adam")
"""Optimizers that lose stability at a multiplier of -1, where iterates alternate: see `Settings.threshold`."""
SAMPLES = 2000
"""Samples whose losses tell whether a run alternates."""


def why_no_floor(run: Trajectory, step: int) -> str | None:
    """Why a run has no floor at a checkpoint that can be measured, in words; None where it has.

    The floor of a step takes the states of that step and of the two that follow. They are in the file, or are made from
    the checkpoint as the run made them.
    """
    settings = settings_of(run)
    if settings is not None and settings.batch_size:
        return f"its steps are of {settings.batches}, whose noise is no oscillation at period two"
    if settings is not None and settings.optimizer not in (*BOUNCING, "other"):
        return f"{settings.optimizer} does not bounce at an edge that the Hessian decides"
    if {step, step + 1, step + 2} <= set(run.steps("checkpoints").tolist()):
        return None
    needed = f"the checkpoints of steps {step} to {step + 2} are not all there"
    why = why_not_repeated(run, settings, step)
    return None if why is None else f"{why}, and {needed}"


def three_states(run: Trajectory, session: Session, step: int) -> list[State]:
    """The checkpoint of a step and the two states after it, from the file or by the run's own optimizer.

    Raises OpsigError where `why_no_floor` has a reason.
    """
    if why := why_no_floor(run, step):
        raise OpsigError(no_floor(run, step, why))
    if {step + 1, step + 2} <= set(run.steps("checkpoints").tolist()):
        return [read_state(run, step + ahead) for ahead in range(3)]
    settings = settings_of(run)
    assert settings is not None
    again = replay(
        session, settings_at(run, settings, step), read_state(run, step), 2, weights_of(run),
        wants_losses=lambda step: False, wants_state=lambda step: True,
    )  # fmt: skip
    states = [snapshot.state for snapshot in again if snapshot.state is not None]
    if len(states) < 3:
        raise OpsigError(no_floor(run, step, "the loss stops being finite in the two steps that follow"))
    return states


def floor_state(run: Trajectory, session: Session, step: int) -> State:
    """The floor between a checkpoint and the two states after it; buffers and optimizer state are those between."""
    states = three_states(run, session, step)
    params = sum(weight * state.params.astype(np.float64) for weight, state in zip(WEIGHTS, states, strict=True))
    assert isinstance(params, np.ndarray)
    return replace(states[1], params=params.astype(states[1].params.dtype))


def state_at(run: Trajectory, session: Session, step: int, place: str) -> State:
    """The state of a checkpoint at the "iterate", or at the "floor"."""
    return floor_state(run, session, step) if place == "floor" else read_state(run, step)


def bounce(states: list[State]) -> float:
    """How much of the way of three consecutive states is period two: |second difference| over |two steps' drift|.

    >>> three = [State(t, np.array([(-1.0) ** t, 0.5 * t]), np.empty(0)) for t in range(3)]
    >>> bounce(three)
    4.0
    """
    first, middle, last = (state.params.astype(np.float64) for state in states)
    drift = np.linalg.norm(last - first)
    return float(np.linalg.norm(first - 2 * middle + last) / drift) if drift else float("inf")


def alternates(run: Trajectory, session: Session, steps: list[int]) -> bool:
    """Whether a run alternates at period two: by its losses, as `mine` tells, else by the last of these checkpoints.

    Losses are looked at where there are those of consecutive steps, of at most SAMPLES samples. Elsewhere the states
    after the checkpoint must move more at period two than they drift.
    """
    recorded = run.steps("losses")
    if len(recorded) >= mining.WIDTH + 2 and bool(np.all(np.diff(recorded) == 1)):
        chosen = np.unique(np.linspace(0, len(run.samples) - 1, SAMPLES).astype(int))
        losses_TS = run.series(LOSS, chosen)
        if not np.isfinite(losses_TS).all():
            losses_TS = filled(run, coverage_of(run)).series(LOSS, chosen)
        with np.errstate(invalid="ignore", over="ignore"):  # a run that diverged
            return mining.oscillation([losses_TS]).first_alternation is not None
    return bounce(three_states(run, session, steps[-1])) > 1


def choose_place(run: Trajectory, session: Session, steps: list[int], given: str | None) -> tuple[str, str | None]:
    """Where to measure the checkpoints, and a note where a person did not say: the floor where the run alternates.

    Raises OpsigError for a floor that a run does not have.
    """
    if given == "iterate":
        return given, None
    lacking = [why_no_floor(run, step) for step in steps]
    if given == "floor":
        for step, why in zip(steps, lacking, strict=True):
            if why:
                raise OpsigError(no_floor(run, step, why))
        return given, None
    if any(lacking) or not alternates(run, session, steps):
        return "iterate", None
    words = "note: the run alternates at period two: measured at the floor of the valley, between its iterates "
    return "floor", words + "(--at iterate measures where they stand)"


def no_floor(run: Trajectory, step: int, why: str) -> str:
    """What to say of a run that has no floor."""
    return f"{run.path} has no floor at step {step}: {why}. Measure at the iterates: --at iterate"

"""The point where branches begin: the run's checkpoint, how it was trained there, and what is not known of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.backends import Session, State
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import OTHER, UNKNOWN_BATCH, Settings
from opsig_cli.studies import floor, training
from opsig_cli.studies.branching.changes import EDGES, Change
from opsig_cli.studies.curvature import group_of, scale_of
from opsig_cli.studies.trained import settings_at, weights_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

ASSUMED = {
    "optimizer": str, "learning_rate": float, "batch_size": int, "momentum": float, "beta1": float, "beta2": float,
    "weight_decay": float, "seed": int,
}  # fmt: skip
"""What a person can say of a run that does not tell it."""
COUNTING = ("momentum", "adam", "splitsgd")
"""Optimizers with a state of their own."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Fork:
    """A checkpoint of a run, and the settings, and of a branch the samples' weights (S,), that trained it on."""

    run: Trajectory
    state: State
    settings: Settings
    weights: np.ndarray | None

    @property
    def step(self) -> int:
        """Where it is."""
        return self.state.step

    def weighted(self, factors: np.ndarray) -> np.ndarray:
        """The samples' weights here times factors (S,)."""
        return factors if self.weights is None else self.weights * factors

    def changed(self, change: Change, session: Session, warn: Warn) -> tuple[Settings, State]:
        """Settings and first state of a branch. Another optimizer begins to count anew, without the run's moments.

        The convention of batch norm stays the run's, in which its losses were measured.
        """
        given = dict(change.settings)
        if change.edge:
            given["learning_rate"] = self._rate_at_edge(change.edge, session, warn)
        if not given:
            return self.settings, self.state
        kept = {"statistics": self.settings.statistics}
        settings = self.settings.varied(given | kept)
        if "momentum" in given and settings.optimizer not in ("momentum", "splitsgd"):
            raise UsageError(f"--momentum: {settings.optimizer} has none. Give --optimizer momentum")
        if "seed" in given and settings.batch_size is None:
            raise UsageError("--seed orders batches, and this is full batch. Leave it out")
        training.check_batch(settings, session)
        if settings.optimizer == self.settings.optimizer:
            return settings, self.state
        return replace(settings, began=self.step), replace(self.state, optimizer={})

    def sharpness(self, session: Session, place: str) -> float:
        """The (preconditioned) sharpness at the floor here, or at the iterate: the file's, or measured now."""
        group = group_of(self.settings, place)
        if self.step in self.run.steps(group) and self.run.has(f"{group}/eigenvalue"):
            return float(self.run.row(f"{group}/eigenvalue", self.step)[0])
        return sharpness_at(session, self.settings, floor.state_at(self.run, session, self.step, place))

    def _rate_at_edge(self, edge: str, session: Session, warn: Warn) -> float:
        """The learning rate whose threshold is EDGES of the sharpness."""
        settings = self.settings
        scale = settings.threshold * settings.learning_rate  # 2 for gradient descent
        if not math.isfinite(scale) or settings.learning_rate == 0:
            raise UsageError(
                f"no sharpness decides the stability of {settings.optimizer}. Give --learning-rate instead"
            )
        if settings.preconditioned and "exp_avg_sq" not in self.state.optimizer:
            raise OpsigError(f"Adam has no preconditioner yet at step {self.step}. Branch from a later checkpoint")
        place, _ = floor.choose_place(self.run, session, [self.step], None)
        sharpness = self.sharpness(session, place)
        if not sharpness > 0:
            raise OpsigError(f"the sharpness at step {self.step} is {sharpness:.3g}: there is no edge to choose from")
        rate = scale / (EDGES[edge] * sharpness)
        warn(
            f"sharpness at step {self.step}, at the {place}: {sharpness:.4g}, "
            f"{sharpness / settings.threshold:.2f} of the threshold. "
            f"{edge.capitalize()} the edge: learning rate {rate:.3g} for {settings.learning_rate:g}"
        )
        return rate


def fork_of(run: Trajectory, settings: Settings, step: int, until: int, warn: Warn) -> Fork:
    """The fork at a checkpoint, with the learning rate of that step. Raises OpsigError, naming the nearest, where there
    is none."""
    state = read_state(run, step)
    here = settings_at(run, settings, step)
    if run.has("scalars/learning_rate"):
        steps = run.steps("scalars")
        rates = run.rows("scalars/learning_rate", 0, len(steps))[(steps >= step) & (steps < until)]
        if len(rates) and np.nanmin(rates) < np.nanmax(rates):
            warn(f"the run's learning rate changes after step {step}; branches keep that of step {step}, "
                 f"{here.learning_rate:g}")  # fmt: skip
    if settings.checkpoint_dtype == "bfloat16":
        warn("the run's checkpoints are rounded to bfloat16, and so is where branches begin")
    if here.optimizer in COUNTING and step > 0 and not state.optimizer:
        warn(f"the run holds no state of its optimizer at step {step}: branches begin with a fresh one")
        here = replace(here, began=step)
    return Fork(run, state, here, weights_of(run))


def told(run: Trajectory, task: str | None, assume: Mapping[str, Any]) -> Settings:
    """How the run was trained: what its file tells, and what a person says of the rest.

    Raises UsageError for a setting that neither tells.
    """
    if "settings_json" in run.attributes or task is None:
        settings = Settings.stored(run.attributes, run.path)
    else:
        settings = Settings(task, optimizer=OTHER, learning_rate=math.nan, batch_size=UNKNOWN_BATCH)
    said = dict(assume)
    if "optimizer" in said:
        said["nesterov"] = False
    if said.get("optimizer") == "gd":
        said["batch_size"] = None
    settings = replace(settings, **said)
    if task is not None:
        settings = replace(settings, task=task)
    for option, why in settings.untold().items():
        example = {"learning_rate": "0.1", "batch_size": "128, or full", "optimizer": "sgd"}[option]
        raise UsageError(f"{run.path} {why}. Say what it was: --assume {option}={example}")
    return settings


def assumed(texts: Sequence[str]) -> dict[str, Any]:
    """What a person says a run was trained with, from KEY=VALUE; UsageError for anything else.

    >>> assumed(["learning-rate=0.1", "batch_size=full"])
    {'learning_rate': 0.1, 'batch_size': None}
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if key not in ASSUMED:
            raise UsageError(f"--assume '{text}' is not KEY=VALUE with a KEY of {', '.join(ASSUMED)}")
        try:
            found[key] = None if key == "batch_size" and value == "full" else ASSUMED[key](value)
        except ValueError:
            raise UsageError(f"--assume {key}: '{value}' is not a number") from None
    return found


def sharpness_at(session: Session, settings: Settings, state: State) -> float:
    """The top eigenvalue, of the preconditioned Hessian for Adam, of the mean loss of all samples."""
    backends.require(session, backends.Curvature, None, "sharpness")
    scale = scale_of(settings, state)
    return float(session.top_eigenpairs(state, 1, training.SHARPNESS_TOLERANCE, None, scale).values[0])  # pyright: ignore

"""How a run was trained, as its file says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsig_cli.settings import Settings
from opsig_cli.trajectory.file import Trajectory

STATE = {"momentum": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"], "splitsgd": ["radius"]}
"""What of an optimizer's state a checkpoint must hold, after the first step, for it to go on as it did."""

SCHEDULED = ("learning_rate", "momentum", "beta1", "beta2")
"""Settings of which a run may record one for each step."""


def settings_of(run: Trajectory) -> Settings | None:
    """How the run was trained, or None where it does not say."""
    attributes = run.attributes
    return Settings.stored(attributes, run.path) if "settings_json" in attributes else None


def backend_of(run: Trajectory, given: str | None) -> str:
    """The name of the backend to measure a run with: the one that was given, or that which trained it."""
    kept = run.attributes.get("settings_json") or {}
    return given or str(kept.get("backend", Settings.backend))


def why_not_repeated(run: Trajectory, settings: Settings | None, step: int) -> str | None:
    """Why training cannot be repeated from a checkpoint as the run made it, in words; None where it can."""
    if settings is None:
        return "it does not say how it was trained"
    if untold := list(settings.untold().values()):
        return f"it {untold[0]}"
    names = [f"checkpoints/optimizer/{name}" for name in STATE.get(settings.optimizer, [])]
    if step > settings.began and any(not run.has(name) or np.isnan(run.row(name, step)).all() for name in names):
        return "its checkpoints lack the optimizer's state"
    return None


def settings_at(run: Trajectory, settings: Settings, step: int) -> Settings:
    """The settings with those of the step that follows, where the run recorded them: schedules change a learning rate,
    a momentum and betas."""
    if step not in run.steps("scalars"):
        return settings
    told = {name: float(run.row(f"scalars/{name}", step)) for name in SCHEDULED if run.has(f"scalars/{name}")}
    return replace(settings, **{name: value for name, value in told.items() if not np.isnan(value)})


def weights_of(run: Trajectory) -> np.ndarray | None:
    """The weights of the samples (S,) in what a branch minimises; None for any other run."""
    return run.read("samples/weight") if run.has("samples/weight") else None


def other_loss(run: Trajectory, settings: Settings | None) -> str | None:
    """What a run minimised where that is not the mean loss of all samples, in words."""
    if run.has("samples/weight"):
        return "the loss with its samples' weights"
    if settings is not None and settings.label_smoothing is not None:
        return "the loss over smoothed labels"
    return None

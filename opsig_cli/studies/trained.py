"""How a run was trained, as its file says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsig_cli.settings import Settings
from opsig_cli.trajectory.file import Trajectory


def settings_of(run: Trajectory) -> Settings | None:
    """How the run was trained, or None where it does not say."""
    attributes = run.attributes
    return Settings.stored(attributes, run.path) if "settings_json" in attributes else None


def settings_at(run: Trajectory, settings: Settings, step: int) -> Settings:
    """The settings with the learning rate of the step that follows, where the run recorded it: schedules change it."""
    if run.has("scalars/learning_rate") and step in run.steps("scalars"):
        rate = float(run.row("scalars/learning_rate", step))
        return settings if np.isnan(rate) else replace(settings, learning_rate=rate)
    return settings


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

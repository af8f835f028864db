"""What one of several processes does from end to end, and a replay's way to it and back as plain values.

S samples, M of them that are tracked, T steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from opsig_cli.backends import Snapshot, State, Training

CALLS = ("gradient_cosines", "mean_cosines", "features", "mean_feature_cosines")
"""Measurements at a state of which a process may do one for all."""
REPLAY = "replay"
ASKED = ("wants_losses", "wants_state")
"""What of a training cannot be told: a replay wants the losses of every step, and no state."""


def told(training: Training) -> dict[str, Any]:
    """A training in values that can be told to another process."""
    return {each.name: getattr(training, each.name) for each in fields(training) if each.name not in ASKED}


def understood(values: dict[str, Any]) -> Training:
    """The training that was told."""
    known: dict[str, Any] = values | {"betas": tuple(values["betas"])}
    return Training(**known, wants_losses=lambda step: True)


def replayed(snapshots: Iterable[Snapshot], training: dict[str, Any]) -> list[Any]:
    """Of a replay the steps, the training losses, and the losses of tracked samples, (T, M) float32, or of all."""
    kept = slice(None) if training["tracked"] is None else training["tracked"]
    rows = [(one.step, one.train_loss, one.losses[kept]) for one in snapshots if one.losses is not None]
    return [[step for step, _, _ in rows], [mean for _, mean, _ in rows], np.stack([losses for _, _, losses in rows])]


def snapshots(found: Sequence[Any], training: Training, samples: int) -> list[Snapshot]:
    """The snapshots that `replayed` has taken apart; losses of samples that are not tracked are NaN."""
    made, nothing = [], float("nan")
    for step, mean, losses in zip(*found, strict=True):
        if training.tracked is not None:
            whole = np.full(samples, np.nan, np.float32)
            whole[training.tracked] = losses
            losses = whole
        made.append(Snapshot(step, mean, training.learning_rate, nothing, nothing, losses))
    return made


class Latest:
    """The same object for one state as often as it is told, by which its first gradient is known again."""

    def __init__(self):
        self._state: State | None = None

    def __call__(self, state: State) -> State:
        if self._state is None or not _same(self._state, state):
            self._state = state
        return self._state


def _same(one: State, other: State) -> bool:
    arrays = [(one.params, other.params), (one.buffers, other.buffers), (one.frozen, other.frozen)]
    if one.step != other.step or one.optimizer.keys() != other.optimizer.keys():
        return False
    arrays += [(one.optimizer[name], other.optimizer[name]) for name in one.optimizer]
    return all(np.array_equal(left, right) for left, right in arrays)

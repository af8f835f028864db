"""A run's settings, out of what a person gave and what the checkpoints' optimizers say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.settings import OTHER, UNKNOWN_BATCH, Settings
from opsig_cli.studies.importing.flow import Glance

Warn = Callable[[str], None]
PER_STEP = ("learning_rate", "momentum", "beta1", "beta2")
"""Settings that schedules change: each checkpoint has its own."""


def counts_of(glances: Sequence[Glance]) -> list[int | None]:
    """How many steps each one's optimizer has counted; 0 for one that has no state yet, where others have counted."""
    counted = any(each.count for each in glances)
    return [0 if each.fresh and counted and each.count is None else each.count for each in glances]


def settle(
    glances: Sequence[Glance], steps: Sequence[int], given: Mapping[str, Any], task: str, model: str | None, warn: Warn
) -> tuple[Settings, dict[int, dict[str, float]]]:
    """The run's settings, and those of PER_STEP at each step of which the checkpoints tell them.

    What is `given` comes before what the checkpoints' optimizers say. What neither tells is not made up: a learning
    rate is NaN, and so are thresholds; a batch size is UNKNOWN_BATCH.
    """
    found: dict[str, Any] = {}
    for each in glances:
        found |= each.settings
    kinds = {each.settings["optimizer"] for each in glances if each.settings}
    if OTHER in kinds:  # a first checkpoint without state may look like Adam's
        found["optimizer"] = OTHER
    if given.get("optimizer", found.get("optimizer")) != found.get("optimizer") or OTHER in kinds:
        found = {key: value for key, value in found.items() if key in ("learning_rate", "optimizer")}
    if found.get("nesterov") and "optimizer" in given:
        del found["nesterov"]
    told: dict[int, dict[str, float]] = {}
    for step, each in zip(steps, glances, strict=True):
        values = {name: each.settings[name] for name in PER_STEP if name in found and name in each.settings}
        if values:
            told[step] = {name: given.get(name, value) for name, value in values.items()}
    rates = [values["learning_rate"] for values in told.values() if "learning_rate" in values]
    if rates and "learning_rate" not in given:
        found["learning_rate"] = max(rates)
    merged: dict[str, Any] = {"learning_rate": math.nan, "optimizer": "gd", "batch_size": UNKNOWN_BATCH} | found
    merged |= given
    if merged["optimizer"] == "gd" and merged["batch_size"] is not None:
        merged["optimizer"] = "sgd"
    between = int(min(np.diff(sorted(steps)), default=1))
    settings = Settings(task=task, model=model, steps=max(steps), checkpoint_every=between, **merged)
    _say_settings(settings, found, given, told, warn)
    return settings, told


def _say_settings(
    settings: Settings, found: Mapping[str, Any], given: Mapping[str, Any], told: Mapping[int, Mapping[str, float]],
    warn: Warn,
) -> None:  # fmt: skip
    taken = [f"{key.replace('_', ' ')} {found[key]:g}" if isinstance(found[key], float) else f"{key} {found[key]}"
             for key in found if key not in given]  # fmt: skip
    if taken:
        warn(f"from the checkpoints: {', '.join(taken)}")
    for name in PER_STEP:
        values = {at[name] for at in told.values() if name in at}
        if len(values) > 1:
            what = "learning rates go" if name == "learning_rate" else f"{name} goes"
            warn(f"{what} from {min(values):g} to {max(values):g}; each step has its own")
    if "optimizer" not in found and "optimizer" not in given:
        warn(f"the checkpoints do not say the optimizer: taken as {settings.optimizer}. --optimizer says otherwise")
    if settings.optimizer == OTHER:
        warn("the optimizer is not one of opsig's: thresholds are left out. --optimizer says what comes nearest")
    if settings.batch_size == UNKNOWN_BATCH:
        warn(
            "the checkpoints do not say the batch size: thresholds are those of full-batch training, pairs cannot be "
            "silenced, and losses are not held against a log. --batch-size N or full says it"
        )
    if math.isnan(settings.learning_rate):
        warn("the checkpoints do not say the learning rate: thresholds are left out. --learning-rate says it")


def say_counts(glances: Sequence[Glance], steps: Sequence[int], warn: Warn) -> None:
    """Say where the optimizer's own count of steps is another than the step that was taken."""
    for each, step in zip(glances, steps, strict=True):
        if each.count is not None and each.count != step:
            warn(
                f"at step {step} the optimizer's own count is {each.count}, which its preconditioner goes by. "
                "--steps-from optimizer takes its count"
            )
            return

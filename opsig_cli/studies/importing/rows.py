"""Series of losses and scalars as rows of a trajectory: those that it lacks. S samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing.series import Losses
from opsig_cli.trajectory.recorder import SCALARS, Recorder

Warn = Callable[[str], None]


def lacking(recorder: Recorder, group: str, steps: Iterable[int], warn: Warn) -> set[int]:
    """Those of these steps at which a run has no row yet; how many it has is said."""
    wanted = set(steps)
    new = wanted - set(recorder.run.steps(group).tolist())
    if len(new) < len(wanted):
        warn(f"{len(wanted) - len(new)} of {len(wanted)} steps of {group} are in {recorder.run.path} already")
    return new


def import_scalars(recorder: Recorder, scalars: Mapping[int, Mapping[str, float]], warn: Warn) -> None:
    """Append scalars at the steps that have none: those that the schema knows, and any others as `logged`."""
    known = {
        step: {name: value for name, value in values.items() if name in SCALARS} for step, values in scalars.items()
    }
    other = {step: {name: value for name, value in values.items() if name not in SCALARS}
             for step, values in scalars.items()}  # fmt: skip
    new = lacking(recorder, "scalars", [step for step, values in known.items() if values], warn)
    new_other = lacking(recorder, "logged", [step for step, values in other.items() if values], warn)
    for step in sorted(new | new_other):
        values = (known[step] if step in new else {}) | (other[step] if step in new_other else {})
        recorder.record(step, scalars=values)


def places_of(losses: Losses, samples: np.ndarray) -> np.ndarray:
    """Where the samples of a series lie among a run's, (S,). Raises OpsigError where it has one that the run lacks."""
    places = np.searchsorted(samples, losses.samples)
    known = (places < len(samples)) & (samples[np.minimum(places, len(samples) - 1)] == losses.samples)
    if not known.all():
        raise OpsigError(
            f"the losses have a sample {losses.samples[~known][0]}, and the run's samples are {samples[0]} to "
            f"{samples[-1]}"
        )
    return places


def import_losses(recorder: Recorder, losses: Losses, steps: Sequence[int] | None, warn: Warn) -> list[int]:
    """Append a series of losses at the steps that have none; returns its steps. Raises OpsigError where it has samples
    that the run lacks."""
    samples = recorder.run.samples
    places = places_of(losses, samples)
    if len(places) < len(samples):
        warn(f"losses of {len(places)} of the {len(samples)} samples are given")
    times = losses.steps.tolist() if steps is None else list(steps)
    new = lacking(recorder, "losses", times, warn)
    for t, step in enumerate(times):
        if step not in new:
            continue
        values, predictions = losses.row(t)
        row = np.full(len(samples), np.nan, np.float32)
        row[places] = values
        spread = None
        if predictions is not None:
            spread = np.full(len(samples), -1)
            spread[places] = predictions
        recorder.record(step, losses=row, predictions=spread)
    return times

"""From checkpoints to rows of a trajectory. S samples, P parameters, B buffers.

Two passes: the first looks at every checkpoint's names and numbers and settles steps, settings and what fits, so that
nothing is written where something is wrong; the second reads one checkpoint after the other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opsig_cli.backends import Session, State, Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.settings import OTHER, UNKNOWN_BATCH, Settings
from opsig_cli.studies.importing import checkpoints, names, optimizers
from opsig_cli.studies.importing.logs import Log
from opsig_cli.studies.importing.series import Losses
from opsig_cli.studies.importing.torch_files import first_words
from opsig_cli.studies.importing.weights import FrozenRow, put
from opsig_cli.tasks import Task
from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder
from opsig_cli.trajectory.schema import FIELDS
from opsig_cli.trajectory.sightings import Sightings
from opsig_cli.trajectory.states import check_trained

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """The model that checkpoints must fit: its layout, all names of each tensor, its buffers (B,) as it is made, and
    what it does not train.

    `prefix` is where in a checkpoint to look for it, None for anywhere.
    """

    layout: list[Tensor]
    aliases: dict[str, list[str]]
    buffers: np.ndarray
    frozen: FrozenRow
    prefix: str | None = None


@dataclass(frozen=True)
class Glance:
    """What the first pass learns of a checkpoint: whole numbers by key, and what its optimizer says of itself."""

    path: str
    numbers: dict[str, int]
    count: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def target_of(task: Task, session: Session, prefix: str | None, added_to: str | None = None) -> Target:
    """The task's model as what checkpoints must fit, and the run that they are added to."""
    aliases = names.aliases_of(task.model())
    made = session.initial(0)
    frozen = FrozenRow(session.layout, made.frozen)
    if added_to is not None:
        with open_trajectory(added_to) as kept:
            frozen = FrozenRow(session.layout, kept.frozen, added_to)
    return Target(session.layout, aliases, made.buffers, frozen, prefix)


def once(warn: Warn) -> Warn:
    """Say each thing once, however many checkpoints it is true of."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    return say


def glance(path: str, target: Target, warn: Warn) -> Glance:
    """Look at a checkpoint, reading of its weights no more than the frozen ones.

    Raises OpsigError where it cannot be read or does not fit.
    """
    with checkpoints.opened(path) as content:
        fit = _fit(content, target, path)
        target.frozen.take(content, fit, path, warn)
        _say(fit, target, warn)
        saved = content.optimizers[0] if content.optimizers else None
        if saved is None:
            return Glance(path, content.numbers)
        if len(content.optimizers) > 1:
            warn("there are several optimizers: the first is taken")
        settings, notes = optimizers.settings_of(saved)
        for note in notes:
            warn(f"optimizer: {note}")
        return Glance(path, content.numbers, optimizers.count_of(saved), settings)


def _fit(content: checkpoints.Content, target: Target, path: str) -> names.Fit:
    shapes = {name: entry.shape for name, entry in content.tensors.items()}
    return names.fit(shapes, target.layout, target.aliases, target.prefix, path)


def _say(fit: names.Fit, target: Target, warn: Warn) -> None:
    if fit.prefix and fit.prefix != target.prefix:
        warn(f"the model's weights lie under {fit.prefix}")
    if fit.others:
        warn(f"they also lie under {names.listed(fit.others)}, which --prefix chooses")
    if fit.unused:
        warn(f"not used, as the model has no such tensors: {names.listed(fit.unused)}")
    if fit.kept:
        warn(f"not in the checkpoints, and left as the model makes them: {names.listed(fit.kept)}")


def settle(
    glances: Sequence[Glance], steps: Sequence[int], given: Mapping[str, Any], task: str, model: str | None, warn: Warn
) -> tuple[Settings, dict[int, float]]:
    """The run's settings, and its learning rate at each step where the checkpoints tell.

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
    told = [(step, each.settings["learning_rate"])
            for step, each in zip(steps, glances, strict=True) if "learning_rate" in each.settings]  # fmt: skip
    rates: dict[int, Any] = dict(told)
    if "learning_rate" in given:
        rates = dict.fromkeys(rates, given["learning_rate"])
    elif rates:
        found["learning_rate"] = max(rates.values())
    merged: dict[str, Any] = {"learning_rate": math.nan, "optimizer": "gd", "batch_size": UNKNOWN_BATCH} | found
    merged |= given
    if merged["optimizer"] == "gd" and merged["batch_size"] is not None:
        merged["optimizer"] = "sgd"
    between = int(min(np.diff(sorted(steps)), default=1))
    settings = Settings(task=task, model=model, steps=max(steps), checkpoint_every=between, **merged)
    _say_settings(settings, found, given, rates, warn)
    return settings, rates


def _say_settings(
    settings: Settings, found: Mapping[str, Any], given: Mapping[str, Any], rates: Mapping[int, float], warn: Warn
) -> None:
    taken = [f"{key.replace('_', ' ')} {found[key]:g}" if isinstance(found[key], float) else f"{key} {found[key]}"
             for key in found if key not in given]  # fmt: skip
    if taken:
        warn(f"from the checkpoints: {', '.join(taken)}")
    if len(set(rates.values())) > 1:
        warn(f"learning rates go from {min(rates.values()):g} to {max(rates.values()):g}; each step has its own")
    if "optimizer" not in found and "optimizer" not in given:
        warn(f"the checkpoints do not say the optimizer: taken as {settings.optimizer}. --optimizer says otherwise")
    if settings.optimizer == OTHER:
        warn("the optimizer is not one of opsig's: thresholds are left out. --optimizer says what comes nearest")
    if settings.batch_size == UNKNOWN_BATCH:
        warn(
            "the checkpoints do not say the batch size: thresholds are those of full-batch training, and losses are "
            "not held against a log. --batch-size N or full says it"
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


def check_layout(run: Trajectory, layout: Sequence[Tensor]) -> None:
    """Raise OpsigError where a file holds checkpoints of another model."""
    if not run.has("layout/name"):
        raise OpsigError(f"{run.path} holds no checkpoints to add to. Import them together, with --replace")
    shapes = [tuple(n for n in row if n >= 0) for row in run.read("layout/shape").tolist()]
    held = list(zip(run.read("layout/name").tolist(), shapes, strict=True))
    if held != [(tensor.name, tensor.shape) for tensor in layout]:
        raise OpsigError(f"{run.path} holds checkpoints of another model. Give the --task and --model it was made with")
    check_trained(run, layout)


def import_all(recorder: Recorder, paths: Mapping[int, str], target: Target, warn: Warn) -> Iterator[dict[str, Any]]:
    """Read and append one checkpoint after the other, by step, each committed; yields a record of each."""
    run = recorder.run
    with ThreadPoolExecutor(1) as beside:  # SHA-256 takes longer than the reading
        for step, path in sorted(paths.items()):
            summed = beside.submit(checkpoints.source_of, path)
            with checkpoints.opened(path) as content:
                state = read(content, target, path, step, warn)
            source = _result(summed, path)
            if source.damaged:
                warn(f"note: {path} is damaged or was written without checksums: {source.damaged} differs from its own")
            about = {"bytes": source.bytes, "sha256": source.sha256}
            recorder.record(step, state=state, source={"path": _kept(path)} | about)
            about["optimizer_state"] = sorted(state.optimizer)
            del state
            yield {"trajectory": run.path, "step": step, "source": path} | about


def _result(summed: Future[checkpoints.Source], path: str) -> checkpoints.Source:
    try:
        return summed.result()
    except OSError as error:
        raise OpsigError(f"{path}: {error.strerror or first_words(error)}") from error


def _kept(path: str) -> str:
    """As much of the end of a path as the file has room for."""
    room = int(FIELDS["checkpoints/source/path"].dtype[1:])
    return path.encode(errors="replace")[-room:].decode(errors="ignore")


def read(content: checkpoints.Content, target: Target, path: str, step: int, warn: Warn) -> State:
    """A checkpoint's state in the layout of the model. Raises OpsigError where a tensor cannot be read."""
    fit = _fit(content, target, path)
    parameters = sum(tensor.size for tensor in target.layout if tensor.kind == "parameter")
    rows = {"parameter": np.empty(parameters, np.float32), "buffer": target.buffers.copy()}
    slots: dict[str, np.ndarray] = {}
    try:
        for tensor in target.layout:
            if tensor.kind in rows and tensor.name in fit.keys:
                row = rows[tensor.kind][tensor.offset : tensor.offset + tensor.size]
                put(row, tensor, content.tensors[fit.keys[tensor.name]].read(), path, warn)
        if content.optimizers:
            slots, why = optimizers.slots_of(content.optimizers[0], target.layout, fit.prefix)
            if why:
                warn(f"optimizer state is left out: {why}")
    except (MemoryError, OpsigError):
        raise
    except Exception as error:  # reading is where a damaged file shows
        raise OpsigError(f"{path} cannot be read: {first_words(error)}") from error
    if not np.isfinite(rows["parameter"]).all():
        warn(f"{os.path.basename(path)} (step {step}) has parameters that are not finite")
    return State(step, rows["parameter"], rows["buffer"], slots, target.frozen.row)


def lacking(recorder: Recorder, group: str, steps: Iterable[int], warn: Warn) -> set[int]:
    """Those of these steps at which a run has no row yet; how many it has is said."""
    wanted = set(steps)
    new = wanted - set(recorder.run.steps(group).tolist())
    if len(new) < len(wanted):
        warn(f"{len(wanted) - len(new)} of {len(wanted)} steps of {group} are in {recorder.run.path} already")
    return new


def import_scalars(recorder: Recorder, scalars: Mapping[int, Mapping[str, float]], warn: Warn) -> None:
    """Append scalars at the steps that have none."""
    known = [step for step, values in scalars.items() if values]
    for step in sorted(lacking(recorder, "scalars", known, warn)):
        recorder.record(step, scalars=scalars[step])


def places_of(losses: Losses | Log, samples: np.ndarray) -> np.ndarray:
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


def import_sightings(recorder: Recorder, log: Log, warn: Warn) -> list[int]:
    """Append a log's losses as sightings, at the steps that have none; returns its steps. Raises OpsigError where it
    has samples that the run lacks."""
    run = recorder.run
    samples = np.sort(run.samples)
    places_of(log, samples)
    times = np.unique(log.step)
    held = {step for step, _ in sightings.batches(run)} if sightings.count(run) else set()
    new = ~np.isin(log.step, list(held))
    if not new.all():
        warn(f"{len(held & set(times.tolist()))} of {len(times)} steps of sightings are in {run.path} already")
    order = np.flatnonzero(new)[np.argsort(log.step[new], kind="stable")]
    with np.errstate(over="ignore"):  # beyond float32 it is infinite
        losses = log.loss.astype(np.float32)
    for first in range(0, len(order), sightings.BLOCK):
        part = order[first : first + sightings.BLOCK]
        sightings.append(
            run, Sightings(log.step[part], log.samples[log.place[part]], losses[part], log.prediction[part])
        )
        recorder.commit()
    return times.tolist()

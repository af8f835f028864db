"""From checkpoints to rows of a trajectory. S samples, P parameters, B buffers.

Two passes: the first looks at every checkpoint's names and numbers and settles steps, settings and what fits, so that
nothing is written where something is wrong; the second reads one checkpoint after the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opsig_cli.backends import Session, State, Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.studies.importing import checkpoints, conversion, names, optimizers, referring, unnamed
from opsig_cli.studies.importing.logs import Log
from opsig_cli.studies.importing.pytrees import plain
from opsig_cli.studies.importing.series import Losses
from opsig_cli.studies.importing.torch_files import first_words
from opsig_cli.studies.importing.weights import FrozenRow, put
from opsig_cli.tasks import Task
from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.external import Extent
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.recorder import SCALARS, Recorder
from opsig_cli.trajectory.schema import FIELDS
from opsig_cli.trajectory.sightings import Sightings
from opsig_cli.trajectory.states import check_trained

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """The model that checkpoints must fit: its layout, all names of each tensor, its buffers (B,) as it is made, and
    what it does not train.

    `prefix` is where in a checkpoint to look for it, None for anywhere; `converted`: tensors that files hold in parts.
    """

    layout: list[Tensor]
    aliases: dict[str, list[str]]
    buffers: np.ndarray
    frozen: FrozenRow
    prefix: str | None = None
    converted: dict[str, conversion.Converted] = field(default_factory=dict)


@dataclass(frozen=True)
class Glance:
    """What the first pass learns of a checkpoint: whole numbers by key, what its optimizer says of itself, whether that
    has no state yet, and what a trainer logged until then. `size`: files and stretches, where it is referred to."""

    path: str
    numbers: dict[str, int]
    count: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False
    size: tuple[int, int] = (0, 0)
    log: list[Mapping[str, Any]] = field(default_factory=list)


def target_of(task: Task, session: Session, prefix: str | None, added_to: str | None = None) -> Target:
    """The task's model as what checkpoints must fit, and the run that they are added to."""
    if callable(getattr(task, "dataset", None)):
        model = task.model()
        aliases, converted = names.aliases_of(model), conversion.written_by_transformers(model)[1]
    else:  # parameters are a tree of JAX
        aliases = {tensor.name: list(dict.fromkeys((tensor.name, plain(tensor.name)))) for tensor in session.layout}
        converted = {}
    made = session.initial(0)
    frozen = FrozenRow(session.layout, made.frozen)
    if added_to is not None:
        with open_trajectory(added_to) as kept:
            frozen = FrozenRow(session.layout, kept.frozen, added_to)
    return Target(session.layout, aliases, made.buffers, frozen, prefix, converted)


def once(warn: Warn) -> Warn:
    """Say each thing once, however many checkpoints it is true of."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    return say


def glance(path: str, target: Target, warn: Warn, reference: bool = False) -> Glance:
    """Look at a checkpoint, reading of its weights no more than the frozen ones.

    Raises OpsigError where it cannot be read, does not fit, or cannot be referred to.
    """
    with checkpoints.opened(path) as content:
        fit = _fit(content, target, path)
        names.check_tied(content.tensors, fit, path)
        target.frozen.take(content, fit, path, warn)
        _say(fit, target, warn)
        extents = referring.extents_of(content, target.layout, fit, path) if reference else []
        found = Glance(path, content.numbers, size=(len(referring.files_of(extents)), len(extents)),
                       log=list(content.log))  # fmt: skip
        saved = content.optimizers[0] if content.optimizers else None
        if saved is None:
            return found
        if len(content.optimizers) > 1:
            warn("there are several optimizers: the first is taken")
        settings, notes = optimizers.settings_of(saved)
        for note in notes:
            warn(f"optimizer: {note}")
        fresh = settings.get("optimizer") == "adam" and not saved["state"]
        return replace(found, count=optimizers.count_of(saved), settings=settings, fresh=fresh)


def _fit(content: checkpoints.Content, target: Target, path: str) -> names.Fit:
    if content.unnamed:
        unnamed.give_names(content, target.layout, path)
    conversion.put_together(content.tensors, target.converted)
    shapes = {name: entry.shape for name, entry in content.tensors.items()}
    try:
        return names.fit(shapes, target.layout, target.aliases, target.prefix, path)
    except OpsigError as error:
        raise OpsigError(f"{error}{conversion.hint(path)}") from error


def _say(fit: names.Fit, target: Target, warn: Warn) -> None:
    if fit.prefix and fit.prefix != target.prefix:
        warn(f"the model's weights lie under {fit.prefix}")
    if fit.others:
        warn(f"they also lie under {names.listed(fit.others)}, which --prefix chooses")
    if fit.unused:
        warn(f"not used, as the model has no such tensors: {names.listed(fit.unused)}")
    if fit.kept:
        warn(f"not in the checkpoints, and left as the model makes them: {names.listed(fit.kept)}")


def check_layout(run: Trajectory, layout: Sequence[Tensor]) -> None:
    """Raise OpsigError where a file holds checkpoints of another model."""
    if not run.has("layout/name"):
        raise OpsigError(f"{run.path} holds no checkpoints to add to. Import them together, with --replace")
    shapes = [tuple(n for n in row if n >= 0) for row in run.read("layout/shape").tolist()]
    held = list(zip(run.read("layout/name").tolist(), shapes, strict=True))
    if held != [(tensor.name, tensor.shape) for tensor in layout]:
        raise OpsigError(f"{run.path} holds checkpoints of another model. Give the --task and --model it was made with")
    check_trained(run, layout)


def import_all(
    recorder: Recorder, paths: Mapping[int, str], target: Target, warn: Warn, size: tuple[int, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Read and append one checkpoint after the other, by step, each committed; yields a record of each. With `size`,
    the most files and stretches that one has, they are referred to."""
    run = recorder.run
    with ThreadPoolExecutor(1) as beside:  # SHA-256 takes longer than the reading
        for step, path in sorted(paths.items()):
            summed = beside.submit(checkpoints.source_of, path, size is not None)
            with checkpoints.opened(path) as content:
                if size is None:
                    state, extents = read(content, target, path, step, warn), []
                else:
                    state, extents = _outlined(content, target, path, step, warn)
            source = _result(summed, path)
            if source.damaged:
                warn(f"note: {path} is damaged or was written without checksums: {source.damaged} differs from its own")
            about = {"bytes": source.bytes, "sha256": source.sha256}
            if size is None:
                recorder.record(step, state=state, source={"path": _kept(path)} | about)
                about["optimizer_state"] = sorted(state.optimizer)
            else:
                hashes = dict(referring.hashes_of(extents, source))
                recorder._refer(step, state, extents, hashes, size, {"path": _kept(path)} | about)
                kinds = {each.kind.rpartition("/")[2] for each in extents}
                about["optimizer_state"] = sorted(kinds - {"params"})
            del state
            yield {"trajectory": run.path, "step": step, "source": path} | about


def _outlined(
    content: checkpoints.Content, target: Target, path: str, step: int, warn: Warn
) -> tuple[State, list[Extent]]:
    """A state of buffers and frozen parameters alone, and where the rest lies."""
    fit = _fit(content, target, path)
    buffers = target.buffers.copy()
    for tensor in target.layout:
        if tensor.kind == "buffer" and tensor.name in fit.keys:
            put(buffers[tensor.offset : tensor.offset + tensor.size], tensor,
                content.tensors[fit.keys[tensor.name]].read(), path, warn)  # fmt: skip
    extents = referring.extents_of(content, target.layout, fit, path)
    return State(step, np.empty(0, np.float32), buffers, {}, target.frozen.row), extents


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

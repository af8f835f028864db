"""An existing run made into a trajectory: what `opsig import` does, from its options to its records. S samples."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from opsig_cli import tasks
from opsig_cli.backends import Session, load_backend
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.studies import tracking, training
from opsig_cli.studies.importing import checkpoints, doubles, flow, order, series, settling, trainer_logs
from opsig_cli.studies.importing.logs import Log
from opsig_cli.studies.importing.steps import PLACES, REMEDY, given_steps, steps_of
from opsig_cli.studies.importing.table_lines import is_table
from opsig_cli.trajectory import external
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder
from opsig_cli.trajectory.states import check_samples

Bar = Callable[[str, int], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Request:
    """The options of `opsig import`. `given`: the settings among them that the person gave, by name."""

    output: str
    paths: Sequence[str]
    task: str | None
    model: str | None
    steps: str | None
    steps_from: str | None
    prefix: str | None
    given: Mapping[str, Any]
    losses: str | None
    scalars: str | None
    track: bool
    append: bool
    replace: bool
    device: str | None
    backend: str | None
    allow_changed_data: bool = False
    reference: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    sightings: bool | None = None
    order: str | None = None


def chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a person gave, out of options that are None where they did not.

    A `batch_size` of None is then full batch. Raises UsageError where they contradict, or where it is neither a number
    nor `full`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if text := given.get("batch_size"):
        if text != "full" and not (text.isdecimal() and int(text[:18]) > 0):
            raise UsageError(f"--batch-size is a number or 'full', not '{text}'")
        given["batch_size"] = None if text == "full" else int(text)
    if given.get("optimizer") == "gd" and given.setdefault("batch_size", None) is not None:
        raise UsageError("gd is full batch. Use --optimizer sgd with --batch-size")
    return given


def run(request: Request, warn: flow.Warn, bar: Bar) -> list[dict[str, Any]]:
    """Write the trajectory; returns a record of each checkpoint, or of each step of losses where there are none.

    Raises OpsigError or UsageError before anything is written where a checkpoint is damaged or does not fit, or steps
    are not clear; with what is done so far kept where the work is interrupted.
    """
    _check(request)
    losses = None
    if request.losses:
        losses = series.read_losses(request.losses, request.columns, request.sightings, warn)
    elif request.order:
        losses = order.read_order(request.order)
    scalars: dict[int, dict[str, float]] = {}
    if request.scalars:
        if (logged := trainer_logs.read(request.scalars)) is not None:
            scalars = logged
        else:
            scalars, unknown = series.read_scalars(request.scalars)
            if unknown:
                warn(f"{request.scalars}: columns without a place in a trajectory: {', '.join(unknown)}")
    try:
        if request.paths:
            return _import_checkpoints(request, losses, scalars, flow.once(warn), bar)
        assert losses is not None
        return _import_series(request, losses, scalars, warn)
    except KeyboardInterrupt:
        raise OpsigError("interrupted before anything was read in: nothing was written", exit_code=130) from None


@contextmanager
def _kept_when_interrupted(request: Request) -> Iterator[None]:
    """Where Ctrl-C comes while rows are written, say how to go on: the recorder keeps what it has."""
    try:
        yield
    except KeyboardInterrupt:
        instead = " in place of --replace" if request.replace else ""
        message = f"interrupted. Give the same command with --append{instead} to go on"
        raise OpsigError(message, exit_code=130) from None


def _check(request: Request) -> None:
    if not request.paths and request.losses is None and request.order is None:
        raise UsageError("there is nothing to import. Name checkpoints, or --losses FILE")
    if request.losses is not None and request.order is not None:
        raise UsageError("--losses says of each step who was in its batch, and --order, too. Give one of them")
    if request.losses is None and (request.columns or request.sightings is not None):
        raise UsageError("columns, --sightings and --rows are of a table of losses. Give it: --losses FILE")
    if not request.paths and request.reference:
        raise UsageError("--reference is about checkpoints. Name some")
    if not request.paths and (request.track or request.task is not None):
        raise UsageError("--task and --track are about checkpoints. Name some")
    if request.steps is not None and request.steps_from is not None:
        raise UsageError("--steps says the steps and --steps-from where they are. Give one of them")
    if request.append and request.replace:
        raise UsageError("--append adds to a run and --replace overwrites it. Give one of them")
    exists = os.path.exists(request.output)
    if request.append and not exists:
        raise OpsigError(f"{request.output} does not exist. Leave --append out to make it")
    if exists and not (request.append or request.replace):
        raise OpsigError(f"{request.output} exists. Add new steps with --append, or overwrite it with --replace")


def _import_checkpoints(
    request: Request,
    losses: series.Losses | Log | None,
    scalars: dict[int, dict[str, float]],
    warn: flow.Warn,
    bar: Bar,
) -> list[dict[str, Any]]:
    paths = checkpoints.find(list(request.paths))
    stored = _stored(request) if request.append else None
    if stored is None and request.task is None:
        table = next(filter(is_table, request.paths), None)
        hint = "" if table is None else f". A table of losses needs none: --losses {table}"
        raise UsageError(f"--task is missing. Write --task NAME or --task file.py:Name{hint}")
    given = {"statistics": "running", "chunk_size": None} | dict(request.given)
    spec = tasks.parse_spec(request.task or (stored.task if stored else ""), request.model or (stored and stored.model))
    if request.task is None and tasks.is_own(spec):
        raise OpsigError(f"{request.output} was made with a task of your own. Give it again: --task {spec.name}")
    task, spec = tasks.load(spec)
    used = stored or Settings(str(spec), chunk_size=given["chunk_size"], statistics=given["statistics"])
    backend = request.backend or (stored or Settings).backend
    session = load_backend(backend).open(task, request.device, used.chunk_size, used.statistics)
    session.tell = warn
    _check_session(request, session, losses, warn)
    warn(f"device: {session.device_name}")
    target = flow.target_of(task, session, request.prefix, request.output if request.append else None)
    if used.statistics == "running" and any(t.name.endswith("running_mean") for t in target.layout):
        warn("batch norm goes by its running statistics, as in evaluation; --statistics chunk takes those of the data")
    glances = []
    with bar("looking", len(paths)) as advance:
        for path in paths:
            glances.append(flow.glance(path, target, warn, request.reference))
            advance()
    if request.steps is None:
        paths, glances = doubles.without(paths, glances, target, warn)
    if request.steps is not None:
        steps = given_steps(request.steps, len(paths))
        if len(set(steps)) < len(steps):
            raise UsageError(f"--steps {request.steps} names a step twice")
    else:
        steps, source = steps_of(paths, [g.numbers for g in glances], settling.counts_of(glances), request.steps_from)
        several = f"steps {min(steps)} to {max(steps)} are" if len(steps) > 1 else f"step {steps[0]} is"
        warn(f"{several} taken from {source}")
        if source == PLACES:
            warn(f"these are no optimizer steps. {REMEDY[0].lower()}{REMEDY[1:]}")
        if "epoch" in source:
            warn(
                "these are epochs, not optimizer steps, by which --scalars and Adam go. --steps 0,10,20 says the steps"
            )
    settling.say_counts(glances, steps, warn)
    settings, told = settling.settle(glances, steps, given, request.task or used.task, spec.model, warn)
    settings = replace(settings, backend=backend)
    longest = max((each.log for each in glances), key=len)
    logged = trainer_logs.of_trainer(
        longest, {step: at["learning_rate"] for step, at in told.items() if "learning_rate" in at}
    )
    if logged:
        warn(f"what the trainer logged is taken at {len(logged):,} steps")
    for step in {*logged, *told}:
        scalars[step] = logged.get(step, {}) | told.get(step, {}) | scalars.get(step, {})
    if stored is not None:
        settings = replace(stored, steps=max(stored.steps, settings.steps))
    elif request.append:
        warn(f"{request.output} holds losses alone: from now on it tells its task and what the checkpoints say")
    recorder = _recorder(request, settings, session, task, spec)
    with _kept_when_interrupted(request), recorder:
        return _write(
            request, recorder, session, target, dict(zip(steps, paths, strict=True)), losses, scalars, warn, bar,
            (max(each.size[0] for each in glances), max(each.size[1] for each in glances)),
        )  # fmt: skip


def _check_session(request: Request, session: Session, losses: series.Losses | Log | None, warn: flow.Warn) -> None:
    """Raise OpsigError or UsageError where the task or the options do not go with what is to be written."""
    if "optimizer" in request.given:
        training.check_optimizer(request.given["optimizer"], session)
    if losses is not None:
        if losses.names is not None:
            raise OpsigError(
                f"{request.losses} names samples by text, and checkpoints go by indices in the task's dataset: which "
                "is which is not known. Give a column with these: --sample-column NAME"
            )
        flow.places_of(losses, np.arange(session.samples))
    if request.append:
        with open_trajectory(request.output) as kept:
            check_samples(kept, session.samples)
            if kept.has("samples/name"):
                raise OpsigError(
                    f"{request.output} names samples by text, and checkpoints go by indices in the task's dataset: "
                    "which is which is not known"
                )
            if len(kept.steps("checkpoints")) or kept.has("layout/name"):
                flow.check_layout(kept, session.layout)
            if len(kept.steps("checkpoints")) and kept.has(external.EXTENTS) != request.reference:
                what = (
                    "refers to its checkpoints: add" if kept.has(external.EXTENTS) else "holds its checkpoints: leave"
                )
                raise UsageError(f"{request.output} {what} --reference{'' if kept.has(external.EXTENTS) else ' out'}")
            tracking.check_data(kept, session, warn, request.allow_changed_data)


def _stored(request: Request) -> Settings | None:
    """The settings of the run that is added to, None where it holds losses alone and does not tell them. Raises
    UsageError where an option contradicts them."""
    with open_trajectory(request.output) as kept:
        if not isinstance(told := kept.attributes.get("settings_json"), dict) or "task" not in told:
            return None
        settings = Settings.stored(kept.attributes, request.output)
    for key, value in request.given.items():
        if key != "learning_rate" and value != getattr(settings, key):
            option = key.replace("_", "-")
            raise UsageError(f"{request.output} was imported with another --{option}. Leave it out, or use --replace")
    return settings


def _recorder(request: Request, settings: Settings, session: Session, task: Any, spec: tasks.TaskSpec) -> Recorder:
    if not request.append:
        return training.new_recorder(request.output, settings, session, task, spec, request.replace, commit_every=10)
    recorder = Recorder(request.output, session.samples, resume=True, layout=session.layout)
    if "task" not in recorder.run.attributes:
        training.describe(recorder, settings, session, task, spec)
    elif not len(recorder.run.steps("checkpoints")):  # the import may have been cut off before it had said it
        training.describe_samples(recorder.run, session, task)
    recorder.run.set_attributes(settings_json=settings.stored_form())
    return recorder


def _write(
    request: Request, recorder: Recorder, session: Session, target: flow.Target, paths: dict[int, str],
    losses: series.Losses | Log | None, scalars: Mapping[int, Mapping[str, float]], warn: flow.Warn, bar: Bar,
    size: tuple[int, int],
) -> list[dict[str, Any]]:  # fmt: skip
    kept = recorder.run
    kept.set_attributes(state="importing")
    held = set(kept.steps("checkpoints").tolist())
    new = {step: path for step, path in paths.items() if step not in held}
    if len(new) < len(paths):
        warn(f"{len(paths) - len(new)} of {len(paths)} steps are in {request.output} already")
    flow.import_scalars(recorder, scalars, warn)
    records = []
    with bar("importing", len(new)) as advance:
        for record in flow.import_all(recorder, new, target, warn, _room(kept, size) if request.reference else None):
            records.append(record)
            advance(note=f"step {record['step']}")
    if isinstance(losses, Log):
        flow.import_sightings(recorder, losses, warn)
    elif losses is not None:
        flow.import_losses(recorder, losses, None, warn)
    if request.track:
        session.adopt(kept.frozen)
        missing = tracking.missing_losses(kept)
        tracked = {}
        with bar("tracking", len(missing)) as advance:
            for step, values in tracking.fill_losses(kept, session, missing, request.allow_changed_data):
                tracked[step] = tracking.mean_loss(values)
                advance(note=f"step {step}")
        records = [record | {"loss": tracked.get(record["step"])} for record in records]
    kept.set_attributes(state="imported")
    return records


def _room(run: Trajectory, size: tuple[int, int]) -> tuple[int, int]:
    """Files and stretches for which a checkpoint has room: those of the first import, or all there are now."""
    if not run.has(external.EXTENTS):
        return size
    held = run.shape(external.PATH)[1], run.shape(external.EXTENTS)[2]
    return (max(held[0], size[0]), max(held[1], size[1]))


def _import_series(
    request: Request, losses: series.Losses | Log, scalars: Mapping[int, Mapping[str, float]], warn: flow.Warn
) -> list[dict[str, Any]]:
    if isinstance(losses, Log):
        if request.steps is not None:
            raise UsageError("--steps says the steps of checkpoints or rows of losses. The log has its own")
        steps, count = None, len(losses.samples)
    else:
        steps = None if request.steps is None else given_steps(request.steps, len(losses.steps), "rows of losses")
        count = len(losses.samples)
    if request.append:
        recorder = _resumed(request.output, losses)
    else:
        recorder = Recorder(
            request.output, losses.samples.tolist() if count else 0, replace=request.replace,
            labels=None if losses.labels is None else losses.labels.tolist(), classes=losses.classes,
            attributes={"opsig_version": version("opsig"), "command": shlex.join(["opsig", *sys.argv[1:]])},
            commit_every=10,
        )  # fmt: skip
        if losses.names is not None:
            recorder.run.write("samples/name", losses.names)
    with _kept_when_interrupted(request), recorder:
        flow.import_scalars(recorder, scalars, warn)
        if isinstance(losses, Log):
            times = flow.import_sightings(recorder, losses, warn)
        else:
            times = flow.import_losses(recorder, losses, steps, warn)
        recorder.run.set_attributes(state="imported")
    source = request.losses or request.order
    return [{"trajectory": request.output, "step": step, "source": source} for step in times]


def _resumed(path: str, losses: series.Losses | Log) -> Recorder:
    """A run of losses to go on with. Raises OpsigError where its samples are called otherwise."""
    with open_trajectory(path) as kept:
        held = kept.read("samples/name").tolist() if kept.has("samples/name") else None
        ids = kept.samples
    given = None if losses.names is None else losses.names.tolist()
    if held != given:
        raise OpsigError(f"the samples are not called as in {path}, which it could not be added to. Use --replace")
    return Recorder(path, ids.tolist() if isinstance(losses, Log) else losses.samples.tolist(), resume=True)

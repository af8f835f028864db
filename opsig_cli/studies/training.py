"""Training into a trajectory: the run's provenance, its schedule, and how it ends. S samples."""

from __future__ import annotations

import math
import platform
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np

from opsig_cli import backends, tasks
from opsig_cli.backends import Session, Snapshot, State, Training
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.studies import describing, divergence, tracking
from opsig_cli.studies.trained import weights_of
from opsig_cli.trajectory import external
from opsig_cli.trajectory.checking import without_damage
from opsig_cli.trajectory.file import Trajectory, check_new, open_trajectory
from opsig_cli.trajectory.recorder import Recorder
from opsig_cli.trajectory.states import check_samples, read_state, write_layout

SHARPNESS_TOLERANCE = 1e-2
"""Enough for the eigenvalue, whose error goes with the residual's square. Each solve begins anew, so that a resumed run
measures the same bits: from the last one's memory it would take 2% to 25% fewer products (measured on MLPs), and every
checkpoint would have to hold 16 more vectors of its size."""


class StopRequest:
    """Whether a person or the system has asked the run to end; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a request while inside; a thread that is not the main one gets no signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, _: Any) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def tracked_samples(settings: Settings, samples: int) -> np.ndarray | None:
    """Those of so many samples whose losses are recorded, drawn with the run's seed, increasing; None for all."""
    if not 0 < settings.track_samples < samples:
        return None
    generator = np.random.default_rng([settings.seed, settings.track_samples])
    return np.sort(generator.choice(samples, settings.track_samples, replace=False))


def training_of(
    settings: Settings, stop: StopRequest, weights: np.ndarray | None = None, fork: int | None = None,
    tracked: np.ndarray | None = None,
) -> Training:  # fmt: skip
    """What the backend is asked to do; a requested stop makes the next snapshot carry a checkpoint.

    `weights` (S,) of the samples; `tracked`: those whose losses are recorded; `fork`: the step at which a branch
    begins, which has losses whatever the schedule.
    """
    return Training(
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        batch_size=settings.batch_size,
        momentum=settings.momentum,
        betas=(settings.beta1, settings.beta2),
        epsilon=settings.epsilon,
        sign_learning_rate=settings.sign_learning_rate,
        dampening=settings.dampening,
        radius=settings.radius,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        label_smoothing=settings.label_smoothing,
        began=settings.began,
        weights=weights,
        tracked=tracked,
        seed=settings.seed,
        wants_losses=lambda step: settings.losses_at(step) or step == fork,
        wants_state=lambda step: settings.checkpoint_at(step) or settings.sharpness_at(step) or stop.asked,
    )


def check_optimizer(name: str, session: Session) -> None:
    """Raise UsageError for an optimizer that the backend lacks."""
    if name not in session.optimizers:
        raise UsageError(f"no optimizer is called '{name}'. Known: {', '.join(session.optimizers)}")


def check_batch(settings: Settings, session: Session) -> None:
    """Raise UsageError for a batch larger than the data. A batch is of items, each with all its samples."""
    positions = getattr(session, "positions", 1)
    if (settings.batch_size or 0) * positions > session.samples:
        what = "samples" if positions == 1 else f"items of {positions} samples"
        raise UsageError(
            f"--batch-size {settings.batch_size} is more than the {session.samples // positions} {what} there are"
        )


def new_recorder(
    path: str, settings: Settings, session: Session, task: tasks.Task, spec: tasks.TaskSpec, replace: bool,
    commit_every: int,
) -> Recorder:  # fmt: skip
    """A file for a new run, with its provenance and what its samples are.

    Raises UsageError, before there is a file, for a batch larger than the data.
    """
    count = session.samples
    check_batch(settings, session)
    check_new(path, replace)
    about = _about(session, task)
    recorder = Recorder(
        path,
        count,
        attributes=provenance(settings, session)
        | {"task": str(spec), "task_source": spec.source, "task_sha256": spec.digest}
        | {"loss_unit": tasks.loss_unit(task)},
        replace=replace,
        commit_every=commit_every,
        bfloat16=settings.checkpoint_dtype == "bfloat16",
    )
    _describe(recorder.run, session, about)
    return recorder


def describe(recorder: Recorder, settings: Settings, session: Session, task: tasks.Task, spec: tasks.TaskSpec) -> None:
    """Say of a run that a loop of one's own made how it was trained and what its samples are, where it does not."""
    run = recorder.run
    told = {"task": str(spec), "task_source": spec.source, "task_sha256": spec.digest}
    run.set_attributes(**(provenance(settings, session) | told))
    describe_samples(run, session, task)
    run.commit()


def describe_samples(run: Trajectory, session: Session, task: tasks.Task) -> None:
    """Say of a run what its samples are, where it does not."""
    for name, values in _about(session, task).items():
        if not run.has(name):
            run.write(name, values)


def _about(session: Session, task: tasks.Task) -> dict[str, np.ndarray]:
    """What all samples are, by the datasets that say it."""
    return describing.description(task, range(session.samples), backends.targets_of(session))


def _describe(run: Trajectory, session: Session, about: dict[str, np.ndarray]) -> None:
    for name, values in about.items():
        run.write(name, values)
    write_layout(run, list(session.layout))
    run.commit()


def resumed_recorder(path: str, session: Session, commit_every: int) -> Recorder:
    """A file to go on with. Raises OpsigError where the task's data is not what it was."""
    with open_trajectory(path) as kept:
        check_samples(kept, session.samples)
        tracking.check_model(kept, session)
    return Recorder(path, session.samples, resume=True, commit_every=commit_every)


def run(
    recorder: Recorder, session: Session, settings: Settings, start: State, stop: StopRequest,
    advance: Callable[..., None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Train from `start` and record; yields a record for every checkpoint written.

    Raises OpsigError where the loss or the gradient stops being finite; see `opsig_cli.studies.divergence`.
    """
    trajectory = recorder.run
    trajectory.set_attributes(state="training")
    fork = trajectory.attributes.get("from_step")
    tracked = tracked_samples(settings, session.samples)
    training, latest = training_of(settings, stop, weights_of(trajectory), fork, tracked), start
    for snapshot in session.train(training, start):
        if (what := divergence.not_finite(snapshot, session, tracked)) is not None:
            recorder.record(
                snapshot.step, scalars=_scalars(snapshot), losses=snapshot.losses, predictions=snapshot.predictions
            )
            divergence.stop(recorder, session, training, latest, snapshot.step, what)
        latest = latest if snapshot.state is None else snapshot.state
        ending = stop.asked and snapshot.state is not None
        sharpness = None
        if settings.sharpness_at(snapshot.step) and snapshot.state is not None:
            sharpness = _record_sharpness(recorder, session, settings, snapshot.state)
        due = settings.checkpoint_at(snapshot.step) or ending
        recorder.record(
            snapshot.step,
            scalars=_scalars(snapshot),
            losses=snapshot.losses,
            predictions=snapshot.predictions,
            state=snapshot.state if due and snapshot.step not in trajectory.steps("checkpoints") else None,
        )
        advance(note=f"loss {snapshot.train_loss:.4f}" + ("" if sharpness is None else f"  sharpness {sharpness:.4g}"))
        if due:
            yield _checkpoint_record(trajectory.path, snapshot, sharpness)
        if ending and snapshot.step < settings.steps:
            trajectory.set_attributes(state=f"interrupted at step {snapshot.step}")
            trajectory.commit()
            return
    trajectory.set_attributes(state="complete")
    trajectory.commit()


def resume_point(
    recorder: Recorder, session: Session, task: tasks.Task, settings: Settings, warn: Callable[[str], None]
) -> State:
    """The last intact checkpoint, to which the run is rewound, or the initial state where there is none yet.

    Says what the samples are where the run was killed before it did. Raises OpsigError where there is no checkpoint of
    a run that did not begin with its seed.
    """
    if not recorder.run.has("layout/name"):
        _describe(recorder.run, session, _about(session, task))
    if recorder.run.has(external.EXTENTS):
        raise OpsigError(
            f"{recorder.run.path} keeps its checkpoints in other files, and takes none into itself. Import the run "
            "without --reference to go on with it"
        )
    initial = session.initial(settings.seed)

    def last() -> State | None:
        steps = recorder.run.steps("checkpoints")
        return read_state(recorder.run, int(steps[-1])) if len(steps) else None

    state = without_damage(last, warn)
    if state is None and ("from_step" in recorder.run.attributes or recorder.run.has("checkpoints/source/path")):
        raise OpsigError(
            f"{recorder.run.path} holds no checkpoint to go on from, and did not begin with its seed. Make it again: "
            "opsig branch, or opsig import"
        )
    recorder.rewind(0 if state is None else state.step)  # what came later is trained, and recorded, again
    return initial if state is None else state


def _scalars(snapshot: Snapshot) -> dict[str, float]:
    names = ["train_loss", "learning_rate", "grad_norm", "update_norm"]
    if math.isfinite(snapshot.signed_fraction):
        names.append("signed_fraction")
    return {name: getattr(snapshot, name) for name in names}


def _checkpoint_record(path: str, snapshot: Snapshot, sharpness: float | None) -> dict[str, Any]:
    record: dict[str, Any] = {"trajectory": path, "step": snapshot.step, "loss": snapshot.train_loss}
    record |= {"learning_rate": snapshot.learning_rate, "grad_norm": snapshot.grad_norm}
    return record if sharpness is None else record | {"sharpness": sharpness}


def _record_sharpness(recorder: Recorder, session: Session, settings: Settings, state: State) -> float:
    """Append the top eigenvalue at a state where the file lacks it; returns it."""
    if state.step in recorder.run.steps("sharpness"):
        return float(recorder.run.row("sharpness/eigenvalue", state.step)[0])
    backends.require(session, backends.Curvature, None, "sharpness")
    found = session.top_eigenpairs(state, 1, SHARPNESS_TOLERANCE)  # pyright: ignore
    threshold = float("nan") if settings.preconditioned else settings.threshold
    recorder.run.append("sharpness", state.step, eigenvalue=found.values, residual=found.residuals, threshold=threshold)
    return float(found.values[0])


def provenance(settings: Settings, session: Session) -> dict[str, Any]:
    """What a new file says of how it was made, its task excepted."""
    return {
        "opsig_version": version("opsig"),
        "python_version": platform.python_version(),
        "torch_version": version("torch"),
        "command": shlex.join(["opsig", *sys.argv[1:]]),
        "git_commit": _git_commit(),
        "device": session.device_name,
        "settings_json": settings.stored_form(),
        "state": "training",
    } | getattr(session, "versions", {})


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None

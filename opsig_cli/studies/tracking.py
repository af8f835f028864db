"""Filling in what a trajectory lacks: open the run's task, see which cells are missing, ask the backend, append."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import numpy as np

from opsig_cli import backends, tasks
from opsig_cli.backends import Session, load_backend
from opsig_cli.errors import OpsigError
from opsig_cli.settings import Settings
from opsig_cli.studies.trained import backend_of, weights_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import check_samples, check_trained, in_order_of, read_state

STATES_BYTES = 256 << 20
"""Bound on the checkpoints held in memory at a time."""
STATES_PART = 32
"""The same as a part of the memory, where that is bounded: a 32nd."""

COMMIT_SECONDS = 1.0

MEMORY: ContextVar[int | None] = ContextVar("memory", default=None)
"""Bytes that sessions opened from now on may take; None for what is free, less a margin."""

AGREES = 1e-4
"""Relative difference up to which a measured mean loss is the one in the training log."""
AGREES_ROUNDED = 0.1
"""The same where checkpoints were rounded to bfloat16."""
HELD = 16
"""Samples whose losses are measured again before a task is used on a run."""
SAME = 1e-3
"""Part of its recorded loss, and a tenth of that part of the samples' mean, up to which a sample's is the same."""
SAME_ROUNDED = 0.3
"""Part of its recorded loss and of the mean where checkpoints were rounded to bfloat16."""


def open_session(
    run: Trajectory, task: str | None, device: str | None, backend: str | None, warn: Callable[[str], None],
    allow_changed_data: bool = False,
) -> tuple[Session, tasks.Task]:  # fmt: skip
    """Open the run's task on a backend, as it was trained: same options, model, chunks and batch-norm convention.

    A person's own task must be named again by `task`; code or labels that have changed since are warnings. Raises
    OpsigError where the task is not given, its dataset has another length, or a sample's loss is another than it was,
    unless `allow_changed_data`.
    """
    return open_run(run, task, device, backend, warn, allow_changed_data)[:2]


def open_run(
    run: Trajectory,
    task: str | None,
    device: str | None,
    backend: str | None,
    warn: Callable[[str], None],
    allow_changed_data: bool = False,
) -> tuple[Session, tasks.Task, tasks.TaskSpec]:
    """What `open_session` opens, and the task's name with where its code came from."""
    attributes = run.attributes
    stored = Settings.stored(attributes, run.path) if task is None or "settings_json" in attributes else Settings(task)
    spec = tasks.parse_spec(task or stored.task, stored.model)
    if task is None and tasks.is_own(spec):
        raise OpsigError(
            f"{run.path} was trained with a task of your own, {stored.task}. Give it again: --task {stored.task}"
        )
    tasks.check_recorded(spec if task is None else replace(spec, options={}), run.path, len(run.samples))
    loaded, found = tasks.load(spec)
    if found.digest and attributes.get("task_sha256") not in (None, found.digest):
        warn(f"{spec.name} has changed since {run.path} was recorded")
    name = backend_of(run, backend)
    session = load_backend(name).open(loaded, device, stored.chunk_size, stored.statistics)
    session.tell = warn
    if (most := MEMORY.get()) is not None:
        backends.require(session, backends.Bounded, name, "within a bound of memory")
        session.bound_by(most)  # pyright: ignore[reportAttributeAccessIssue]
    check_samples(run, session.samples)
    check_model(run, session)
    if run.has("checkpoints/params"):
        check_trained(run, session.layout)
        in_order_of(run, session)
        session.adopt(run.frozen)
    if changed := _changed_label(run, loaded):
        warn(f"{run.path}: {changed}. Has the task's data changed?")
    warn(f"device: {session.device_name}")
    check_data(run, session, warn, allow_changed_data)
    return session, loaded, found


class _Later:
    """Passes everything on to a session, which is opened when it is first asked for anything."""

    def __init__(self, open: Callable[[], Session]):
        self._open = open
        self._session: Session | None = None

    def _opened(self) -> Session:
        if self._session is None:
            self._session = self._open()
        return self._session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened(), name)

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The session's own, by which `isinstance` knows its capabilities (from Python 3.12 on by that alone)."""
        return type(self._opened())


def opened_later(open: Callable[[], Session]) -> Session:
    """The session that `open` gives, opened when it is used: what a file holds already needs no task, nor torch."""
    return cast(Session, _Later(open))


def check_model(run: Trajectory, session: Session) -> None:
    """Raise OpsigError, before the model is built, where it is not of the size that the checkpoints have."""
    count = getattr(session, "parameter_count", lambda: None)()
    if count is None or not run.has("checkpoints/params"):
        return
    held = run.shape("checkpoints/params")[1] + (run.shape("frozen/params")[0] if run.has("frozen/params") else 0)
    if count != held:
        raise OpsigError(
            f"{run.path} holds {held:,} parameters a checkpoint and the task's model has {count:,}. Give the --task, "
            "with the options, that the run was made with"
        )


def check_data(run: Trajectory, session: Session, warn: Callable[[str], None], allow_changed_data: bool) -> None:
    """Hold recomputed losses of HELD samples against those that the file has of the same checkpoint.

    Raises OpsigError, naming the first sample whose loss is another; a warning with `allow_changed_data`. Nothing is
    said where the file has no losses at a checkpoint.
    """
    found = _recorded(run, bool(getattr(session, "couples_samples", False)))
    if found is None:
        return
    step, positions, recorded = found
    samples, state = run.samples[positions], read_state(run, step)

    def measure() -> np.ndarray:
        if isinstance(session, backends.SampleLosses):
            return session.sample_losses(state, samples)
        return session.losses([state])[0][0][samples]

    measured = measure()
    rounded = (run.attributes.get("settings_json") or {}).get("checkpoint_dtype") == "bfloat16"
    part, rest = (SAME_ROUNDED, SAME_ROUNDED) if rounded else (SAME, SAME / 10)
    other = np.flatnonzero(~(np.abs(measured - recorded) <= part * np.abs(recorded) + rest * np.abs(recorded).mean()))
    if not len(other):
        return
    text = (
        f"{run.path}: at step {step} the loss of sample {samples[other[0]]} is {measured[other[0]]:.6g} and was "
        f"recorded as {recorded[other[0]]:.6g} ({len(other)} of {len(samples)} samples differ)"
    )
    if not allow_changed_data:
        again = measure()
        if not np.array_equal(measured, again, equal_nan=True):
            raise OpsigError(
                f"{text}, and as {again[other[0]]:.6g} when it is measured again: the task's losses() are random. Draw "
                "its random numbers from a generator that each call seeds anew, or go on with --allow-changed-data"
            )
        raise OpsigError(
            f"{text}. The task's data, their order or its losses() are not those of the run. Give the --task that it "
            "was made with, or go on with --allow-changed-data"
        )
    warn(f"note: {text}")


def _recorded(run: Trajectory, together: bool) -> tuple[int, np.ndarray, np.ndarray] | None:
    """A step with a checkpoint and losses, columns of some samples, and their losses then, (M,) float64.

    Of the first, middle and last such step it is the one at which losses differ most, relative to their mean. Columns
    are spread over all samples, or lie `together` at both ends. None where the file has no such step.
    """
    steps = np.intersect1d(run.steps("checkpoints"), run.steps("losses"))
    count = len(run.samples)
    ends = np.concatenate([np.arange(HELD // 2), count - 1 - np.arange(HELD // 2)])
    columns = ends[(ends >= 0) & (ends < count)] if together else np.linspace(0, count - 1, HELD).round().astype(int)
    best, most = None, -1.0
    for step in np.unique(steps[[0, len(steps) // 2, -1]]).tolist() if len(steps) else []:
        positions = np.unique(columns)
        losses = run.row("losses/loss", step)[positions].astype(np.float64)
        positions, losses = positions[np.isfinite(losses)], losses[np.isfinite(losses)]
        if len(losses) and (spread := losses.std() / (np.abs(losses).mean() or 1.0)) > most:
            best, most = (step, positions, losses), spread
    return best


def _changed_label(run: Trajectory, task: tasks.Task) -> str | None:
    """What differs where a sample has another label than when it was recorded, such as in a text that was edited."""
    now = tasks.labels(task, len(run.samples))
    if now is None or not run.has("samples/label"):
        return None
    kept = run.read("samples/label").tolist()
    for position, sample in enumerate(run.samples.tolist()):
        if sample < len(now) and kept[position] != now[sample]:
            return f"sample {sample} was {kept[position]} and is {now[sample]}"
    return None


def missing_losses(run: Trajectory) -> np.ndarray:
    """Steps that have a checkpoint but no losses, increasing. Raises DamagedRows for what is damaged of what is asked:
    the checkpoints, the losses at them, and the log that new ones are held against."""
    checkpoints = run.steps("checkpoints")
    recorded = run.steps("losses")
    last = recorded[-1:]  # perhaps of a checkpoint, had its step not been damaged
    run.check("losses", np.union1d(np.intersect1d(checkpoints, recorded), last).tolist())
    steps = np.setdiff1d(checkpoints, run.steps("losses"))
    run.check("checkpoints", steps.tolist())
    run.check("scalars", np.intersect1d(steps, run.steps("scalars")).tolist())
    return steps


def fill_losses(
    run: Trajectory, session: Session, steps: np.ndarray, allow_changed_data: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Measure every sample's loss at these checkpoints and append it; yields the step and losses (S,).

    What is measured becomes durable every COMMIT_SECONDS, and in the end when the caller closes the file. As many
    checkpoints are measured at a time as take no longer, but where each pass loads the data anew: then as many as fit.

    Raises OpsigError where the mean of a full-batch run's losses, weighted as training weighed them, is not the loss
    that its training logged, unless `allow_changed_data`.
    """
    weights = weights_of(run)
    most = states_together(run)
    together, start = most if getattr(session, "loads", True) else 1, 0
    logged = {} if allow_changed_data else _logged_losses(run, steps)
    settings = run.attributes.get("settings_json") or {}
    agrees = AGREES_ROUNDED if settings.get("checkpoint_dtype") == "bfloat16" else AGREES
    committed, targets = time.monotonic(), backends.targets_of(session) if logged else slice(None)
    while start < len(steps):
        chosen, begin = steps[start : start + together].tolist(), time.monotonic()
        start += len(chosen)
        try:
            measured = session.losses([read_state(run, step) for step in chosen])
        except BaseException:  # what was measured before is kept
            run.commit()
            raise
        if together < most and time.monotonic() - begin < COMMIT_SECONDS:
            together = min(2 * together, most)
        for step, (losses, predictions) in zip(chosen, measured, strict=True):
            minimised = losses if weights is None else losses * weights
            _check_mean(run, step, float(minimised[targets].mean(dtype=np.float64)), logged, agrees)
            run.append("losses", step, loss=losses, **({} if predictions is None else {"prediction": predictions}))
            if time.monotonic() - committed > COMMIT_SECONDS:
                run.commit()
                committed = time.monotonic()
            yield step, losses


def states_together(run: Trajectory) -> int:
    """At how many checkpoints losses are measured at a time."""
    most = min(STATES_BYTES, (MEMORY.get() or STATES_BYTES * STATES_PART) // STATES_PART)
    return max(1, most // (4 * run.shape("checkpoints/params")[1]))


def mean_loss(losses_S: np.ndarray) -> float:
    """The mean of what was measured; NaN of nothing."""
    measured = losses_S[~np.isnan(losses_S)]
    return float(measured.mean(dtype=np.float64)) if len(measured) else float("nan")


def _logged_losses(run: Trajectory, wanted: np.ndarray) -> dict[int, float]:
    settings = run.attributes.get("settings_json") or {}
    of_others = settings.get("batch_size") is not None or settings.get("label_smoothing") is not None
    if of_others or not run.has("scalars/train_loss"):  # logged is the loss of a minibatch, or over smoothed labels
        return {}
    steps = np.intersect1d(wanted, run.steps("scalars")).tolist()
    return {step: float(run.row("scalars/train_loss", step)) for step in steps}


def _check_mean(run: Trajectory, step: int, mean: float, logged: dict[int, float], agrees: float) -> None:
    expected = logged.get(step)
    if expected is not None and abs(mean - expected) > agrees * abs(expected) + 1e-6:
        raise OpsigError(
            f"{run.path}: at step {step} the task's mean loss is {mean:.6g} and training logged {expected:.6g}. "
            "The task, its data or its model is not the one that was trained"
        )

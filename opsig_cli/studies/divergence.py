"""A training run that meets a loss or a gradient that is not finite: what is kept, and whose it is. S samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NoReturn

import numpy as np

from opsig_cli import backends
from opsig_cli.backends import Session, Snapshot, State, Training
from opsig_cli.errors import OpsigError
from opsig_cli.studies.missing import named
from opsig_cli.trajectory.recorder import Recorder


def not_finite(snapshot: Snapshot, session: Session, tracked: np.ndarray | None = None) -> str | None:
    """What of a step is not finite, "loss" (of the `tracked` samples, all by default) or "gradient"; None where both
    are. Samples that never have a loss do not count."""
    if not math.isfinite(snapshot.train_loss):
        return "loss"
    broken = np.empty(0) if snapshot.losses is None else _broken(snapshot.losses, session)
    if len(broken) and (tracked is None or np.isin(broken, tracked).any()):
        return "loss"
    return None if math.isfinite(snapshot.grad_norm) else "gradient"


def stop(recorder: Recorder, session: Session, training: Training, latest: State, step: int, what: str) -> NoReturn:
    """Keep the state of the step before, and raise OpsigError, naming the samples whose loss or gradient it is.

    `latest`: the last state that is known, from which the steps since are trained again. The learning rate is spoken of
    only where no sample alone, or most of them, are not finite.
    """
    run = recorder.run
    states = {latest.step: latest}
    if latest.step < step:
        wanted = (step - 1, step)
        again = replace(training, wants_losses=lambda _: False, wants_state=lambda at: at in wanted)
        for snapshot in session.train(again, latest):
            if snapshot.state is not None:
                states[snapshot.step] = snapshot.state
            if snapshot.step == step:
                break
    kept = max(0, step - 1) if max(0, step - 1) in states else step
    if kept not in run.steps("checkpoints") and np.isfinite(states[kept].params).all():
        recorder.record(kept, state=states[kept])
    run.set_attributes(state=f"stopped: the {what} is not finite at step {step}")
    run.commit()
    of, samples = _whose(session, states[step])
    words = f"the {what} is not finite at step {step}"
    keeps = f"{run.path} keeps this row, and the state at step {kept}"
    if 0 < len(samples) <= session.samples / 2:
        raise OpsigError(f"{words}: the {of} of {named(run, samples)} is not. {keeps}. Look at this part of the data")
    if not step:  # nothing has been trained yet
        raise OpsigError(f"{words}. {keeps}. Look at the first weights, the data and the scale of losses()")
    raise OpsigError(f"{words}. {keeps}. Try a learning rate below {training.learning_rate:g}")


def _whose(session: Session, state: State) -> tuple[str, np.ndarray]:
    """The samples whose loss at a state is not finite, else those whose gradient is not."""
    broken = _broken(session.losses([state])[0][0], session)
    if len(broken) or not isinstance(session, backends.Curvature):
        return "loss", broken
    return "gradient", np.flatnonzero(~np.isfinite(session.gradient_norms(state)))


def _broken(losses: np.ndarray, session: Session) -> np.ndarray:
    """The samples whose loss is not finite, among those that have one."""
    broken = ~np.isfinite(losses)
    return np.flatnonzero(broken & backends.targets_of(session)) if broken.any() else np.empty(0, np.int64)

"""Training again from a checkpoint, with samples weighted, without writing a file. S samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import tee

import numpy as np

from opsig_cli.backends import Session, Snapshot, State, Together, Training, targets_of
from opsig_cli.settings import Settings
from opsig_cli.studies.training import StopRequest, training_of


def replay(
    session: Session, settings: Settings, start: State, steps: int, weights: np.ndarray | None = None,
    wants_losses: Callable[[int], bool] = lambda step: True, wants_state: Callable[[int], bool] = lambda step: False,
    tracked: np.ndarray | None = None,
) -> Iterator[Snapshot]:  # fmt: skip
    """Snapshots of `steps` steps from `start`, its own included, as the run's settings say; every one has losses (S,),
    of the `tracked` samples alone where these are given.

    `weights` (S,) multiply the samples' losses in what is minimised. Ends before the first step that is not finite. On
    the CPU, without weights and with the run's own settings, it is the run bit for bit.
    """
    plan = training_of(replace(settings, steps=start.step + steps), StopRequest(), weights, tracked=tracked)
    plan = replace(plan, wants_losses=wants_losses, wants_state=wants_state)
    yield from _finite(session, session.train(plan, start), tracked)


def for_losses(
    settings: Settings, start: State, steps: int, weights: np.ndarray | None, tracked: np.ndarray | None
) -> Training:
    """The training that `replay` does, of which losses are all that is wanted (`Training.replayed`)."""
    plan = training_of(replace(settings, steps=start.step + steps), StopRequest(), weights, tracked=tracked)
    return replace(plan, wants_losses=lambda step: True, wants_state=lambda step: False, replayed=True)


def replays(session: Session, trainings: Iterable[tuple[Training, State]]) -> Iterator[Iterator[Snapshot]]:
    """Snapshots of each of these trainings, which know nothing of each other; they end as those of `replay`."""
    trainings, asked = tee(trainings)
    if isinstance(session, Together):
        found = session.replays(trainings)
    else:
        found = (session.train(training, start) for training, start in trainings)
    for snapshots, (training, _) in zip(found, asked, strict=True):
        yield _finite(session, snapshots, training.tracked)


def _finite(session: Session, snapshots: Iterable[Snapshot], tracked: np.ndarray | None) -> Iterator[Snapshot]:
    for snapshot in snapshots:
        if not is_finite(snapshot, session, tracked):
            return
        yield snapshot


def is_finite(snapshot: Snapshot, session: Session, tracked: np.ndarray | None = None) -> bool:
    """Whether the losses of a step are finite, of the samples that have one and are tracked."""
    if not math.isfinite(snapshot.train_loss):
        return False
    if snapshot.losses is None:
        return True
    asked = slice(None) if tracked is None else tracked
    finite = np.isfinite(snapshot.losses)[asked]
    return bool(np.all(finite)) or bool(np.all(finite | ~targets_of(session)[asked]))

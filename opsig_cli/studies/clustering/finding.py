"""A run's groups and pairs from the file alone or with its task: what `cluster` prints and `report` shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies import mining, tracking
from opsig_cli.studies.clustering import saying, weighing
from opsig_cli.studies.clustering.weighing import Clusters
from opsig_cli.studies.filled import filled
from opsig_cli.studies.mining import Movers
from opsig_cli.trajectory.file import Trajectory


@dataclass(frozen=True)
class Found:
    """Groups and pairs, the mined samples that they began with, and what a person should know of how."""

    clusters: Clusters
    movers: Movers
    notes: list[str]


def find(
    run: Trajectory, by: str | None, top: int | None, task: str | None, device: str | None, backend: str,
    warn: Callable[[str], None], progress: Callable[[str, int], AbstractContextManager[Any]], *,
    samples: Sequence[int] | None = None, window: tuple[int | None, int | None] = (None, None),
    join: bool | None = None, sketch: int | None = None, allow_changed_data: bool = False,
) -> Found:  # fmt: skip
    """Group the samples of a run that move most, or the `samples` given by index, by what they do in a window of steps.

    `by`, `top`, `join` None: as the run allows. Raises OpsigError where the run lacks what is asked for, or its task.
    """
    run.require("losses/loss")
    by, fallback = weighing.choose_by(run, by)
    found = mining.find(run, top or mining.default_count(len(run.samples)), window=window)
    run = filled(run, found.known)
    position = found.position if samples is None else mining.positions_of(run, samples)
    if found.known is not None:
        position = position[~np.isin(position, found.known.never)]
    if len(position) < 2:
        raise OpsigError(f"{len(position)} samples cannot be grouped. Mine more: opsig mine {run.path} --top 200")
    weighed = weighing.window_of(run, found)
    if by == "loss":
        clusters = weighing.by_loss(run, position, weighed)
    else:
        steps = weighing.checkpoints_in(run, weighed)
        if sketch is not None:
            weighing.sketch_band(run, weighed, sketch)  # refused before anything is loaded
        session, _ = tracking.open_session(run, task, device, backend, warn, allow_changed_data)
        if join is None and not (join := not getattr(session, "couples_samples", False)):
            warn("note: nobody joins: with batch norm in chunks each costs a chunk; see --join")
        with progress("gradients", (3 if samples is None else 2) * len(steps)) as advance:
            clusters = weighing.by_gradient(
                run, session, backend, position, by, weighed, advance,
                widen=samples is None, joining=join, sketch=sketch,
            )  # fmt: skip
    first, second = (fallback, found.note) if found.known is None else (found.note, fallback)
    notes = [words for words in (first, second, saying.caveat(clusters)) if words]
    return Found(clusters, found, notes)

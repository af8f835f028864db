"""What branches will take: every future is trained, and some of it is kept in files."""

from __future__ import annotations

from opsig_cli.backends import Session
from opsig_cli.studies.branching.request import Request
from opsig_cli.studies.planning import Stage
from opsig_cli.trajectory.file import Trajectory

KINDS_OF_CONTROL = 2
"""Draws of any samples, and of the same labels."""


def stages_of(request: Request, session: Session) -> list[Stage]:
    """The stages of all futures, with every control that can be drawn."""
    trained = measured = futures = 0.0
    for step in request.from_steps:
        settings = request.schedule(request.settings, step)
        share = 1.0 if settings.batch_size is None else min(1.0, settings.batch_size / session.samples)
        controls = sum(1 + KINDS_OF_CONTROL * request.draws * bool(change.weights) for change in request.changes)
        futures += 1 + controls
        trained += (1 + controls) * request.steps * share
        if settings.batch_size is not None:
            measured += (1 + controls) * (request.steps / settings.track_every)
    found = [Stage("training", trained), Stage("losses", measured)]
    found += [Stage("eigenpairs", futures)] if request.sharpness else []
    return [stage for stage in found if stage.times]


def disk_of(request: Request, run: Trajectory) -> int:
    """Bytes that the branches' files take: losses, and checkpoints with the optimizer's state."""
    vectors, parameters = 1, run.shape("checkpoints/params")[1]
    vectors += sum(run.has(f"checkpoints/optimizer/{name}") for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"))
    total = 0
    for step in request.from_steps:
        settings = request.schedule(request.settings, step)
        rows = request.steps // settings.track_every + 1
        states = request.steps // settings.checkpoint_every + 1
        total += len(request.changes) * (rows * 8 * len(run.samples) + states * vectors * 4 * parameters)
    return total

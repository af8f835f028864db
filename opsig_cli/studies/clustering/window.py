"""Where in a run the evidence is taken from: the rows of its losses and the checkpoints among them. T steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.grouping import spread
from opsig_cli.analysis.mining import WIDTH
from opsig_cli.errors import OpsigError
from opsig_cli.studies.mining import Movers
from opsig_cli.trajectory.file import Trajectory

CHECKPOINTS = 6
"""Checkpoints that gradient cosines are averaged over to find groups."""
HELD_OUT = 4
"""C: checkpoints that have no part in that, on which groups are weighed."""


@dataclass(frozen=True)
class Window:
    """The rows of `losses` that the evidence is taken from, and where in them the whole loss rose most.

    `first`, `stop`: rows of the file. `steps_T`: their steps. `rise_row`: the row after the largest rise of the mean
    loss, counted from `first`.
    """

    first: int
    stop: int
    steps_T: np.ndarray
    rise_row: int


def window_of(run: Trajectory, movers: Movers) -> Window:
    """From where the alternation at period two begins (else from the start) to the end of what was mined."""
    movement = movers.movement
    begin = max(0, (movement.first_alternation or 0) - WIDTH)  # it is seen only after that many steps
    if len(movement.mean_T) - begin < 3:
        begin = 0
    rises = np.diff(movement.mean_T[begin:])
    if len(rises) < 2:
        raise OpsigError(
            f"{run.path} has too few steps with losses here to group samples. Widen --window, or record more: opsig "
            "train --track"
        )
    first, stop = movers.first + begin, movers.first + len(movement.mean_T)
    return Window(first, stop, run.steps("losses")[first:stop], int(rises.argmax()) + 1)


def checkpoints_in(run: Trajectory, window: Window) -> np.ndarray:
    """The steps of the checkpoints by which groups are found. Raises OpsigError where the run has none."""
    return _divided(run, window)[0]


def held_out_in(run: Trajectory, window: Window) -> np.ndarray:
    """The steps of the checkpoints, between those, that have no part in finding groups: groups are weighed on them.

    None where the window holds a single checkpoint.
    """
    return _divided(run, window)[1]


def _divided(run: Trajectory, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Checkpoints spread over the window: to find groups by, and to test them on."""
    if not run.has("checkpoints/params") or not len(run.steps("checkpoints")):
        raise OpsigError(f"{run.path} holds no checkpoints, which gradients need. Use --by loss")
    first, last = int(window.steps_T[0]), int(window.steps_T[-1])
    steps = run.steps("checkpoints")
    chosen = spread(first, last, steps, CHECKPOINTS + HELD_OUT)
    strays = steps[steps > run.steps("losses")[-1]]  # perhaps of the window, had their step not been damaged
    run.check("checkpoints", [*chosen.tolist(), *strays.tolist()])
    return divided(chosen)


def divided(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of some checkpoints those to find groups by and those to test them on.

    >>> [part.tolist() for part in divided(np.array([0, 10, 20, 30]))]
    [[0, 20], [10, 30]]
    """
    held = chosen[1::2][:HELD_OUT]
    return np.setdiff1d(chosen, held), held

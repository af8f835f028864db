"""What `analyse` can afford to measure of a run's curvature."""

from __future__ import annotations

from opsig_cli.backends import PRODUCTS
from opsig_cli.trajectory.file import Trajectory

AFFORDABLE = 3e11
"""Samples times parameters times products: about a minute of one core for fully connected layers. It is a number of
operations and no time, so that the same command measures the same steps anywhere."""


def affordable_steps(run: Trajectory) -> tuple[str | None, str]:
    """The checkpoints whose sharpness can be measured, as `A:B:C`, or None; and in words why not all of them."""
    if not run.has("checkpoints/params") or not len(run.steps("checkpoints")):
        return None, "the file holds no checkpoints, without which there is no sharpness"
    steps = run.steps("checkpoints")
    cost = len(run.samples) * run.shape("checkpoints/params")[1] * PRODUCTS
    most = int(AFFORDABLE // max(1, cost))
    if most == 0:
        return None, f"its sharpness would take about {cost / AFFORDABLE:.0f} times what analyse spends"
    every = -(-len(steps) // most)
    words = (
        "" if every == 1 else f"sharpness is measured at every {every}th of {len(steps)} checkpoints: all would take "
    )
    words += "" if every == 1 else f"about {len(steps) * cost / AFFORDABLE:.0f} times what analyse spends"
    return f"{steps[0]}:{steps[-1]}:{every}", words

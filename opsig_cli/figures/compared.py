"""Runs laid over each other (the paper's Figs. 36, 38 and 39 to 45). T steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import FAINT, MARGIN, WIDTH, Area, Block, heading, over_steps, page, quiet_axes
from opsig_cli.figures.curvature import PALETTE
from opsig_cli.figures.curves import legend, log_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 2.6

FEW = 80
"""Measured values up to which each has a point."""
LEVELS = {"sharpness": (1.0, "the stability threshold"), "rising": (0.5, "as many rise as fall")}
"""What a quantity is held against, and what that is."""

Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By the name of a run, steps and values, (T,) each."""


def compared_page(panels: Sequence[tuple[str, str, Lines]], names: Sequence[str], title: str) -> Figure:
    """One panel a quantity (its name, its axis, and the lines); a run has the same colour in all of them, and all share
    a range of steps. Points are where a quantity was measured, unless that is at every step."""
    every = np.concatenate([steps for _, _, lines in panels for steps, _ in lines.values()] or [np.zeros(1)])
    first, last = float(every.min()), float(every.max())
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(names)}

    def block(quantity: str, axis: str, lines: Lines) -> Block:
        def draw(area: Area) -> None:
            axes = area.axes(MARGIN + 0.6, 0.4, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.9)
            for name, (steps, values) in lines.items():
                axes.plot(steps, values, color=colours[name], linewidth=0.9, label=name,
                          marker="." if np.isfinite(values).sum() <= FEW else None)  # fmt: skip
            if quantity == "loss":
                log_scale(axes, [values for _, values in lines.values()])
            if quantity in LEVELS:
                level, name = LEVELS[quantity]
                axes.axhline(level, color=FAINT, linewidth=0.8, linestyle="--", label=name)
            over_steps(axes, first, last)
            axes.set(ylabel=axis)
            quiet_axes(axes)
            legend(axes, 6)

        return HEIGHT, draw

    return page([heading(title), *(block(*panel) for panel in panels)])

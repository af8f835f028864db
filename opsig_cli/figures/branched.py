"""Futures of one fork: the loss of the samples that nobody touched, changed, unchanged, and in random controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import (
    FAINT,
    MARGIN,
    WHOLE,
    WIDTH,
    Area,
    Block,
    heading,
    over_steps,
    page,
    quiet_axes,
    sentence,
    typeset,
    visible,
)
from opsig_cli.figures.curvature import PALETTE
from opsig_cli.figures.curves import legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 2.6
CHANGED = PALETTE[2]
"""What was changed; blue and vermilion are a pair's sides."""

Line = tuple[str, np.ndarray, np.ndarray]
"""What it is of, steps (T,) and values (T,)."""


def branches_page(panels: Sequence[tuple[str, Line, Line, Sequence[Line]]], title: str, axis: str = "loss") -> Figure:
    """A panel a branch: its title, its own line, the unchanged one, and those of controls. All panels share an axis."""
    said = sentence(f"mean {axis} of the samples that neither the branch nor its controls touched")
    return page([heading(title), said, *(_panel(*panel, _range(panels)) for panel in panels)])


def _panel(title: str, branch: Line, unchanged: Line, controls: Sequence[Line], limits: tuple[float, float]) -> Block:
    def draw(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.55, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 1.05)
        for number, (name, steps, values) in enumerate(controls):
            known = name in [other for other, *_ in controls[:number]]
            dashes = "-" if name == controls[0][0] else "--"
            axes.plot(steps, values, color=FAINT, linewidth=0.7, alpha=0.7, linestyle=dashes,
                      label=None if known else f"{name} instead")  # fmt: skip
        axes.plot(*unchanged[1:], color=WHOLE, linewidth=1.1, label=unchanged[0])
        axes.plot(*branch[1:], color=CHANGED, linewidth=1.4, label=visible(typeset(branch[0])))
        over_steps(axes)
        axes.set(ylim=limits)
        quiet_axes(axes)
        legend(axes, 5)
        area.text(MARGIN, 0.02, typeset(title), fontsize=10, fontweight="bold")

    return HEIGHT, draw


def _range(panels: Sequence[tuple[str, Line, Line, Sequence[Line]]]) -> tuple[float, float]:
    """Room for all of the unchanged lines and controls, and for branches up to twice as high."""
    calm = np.concatenate([line[2] for _, _, unchanged, controls in panels for line in (unchanged, *controls)])
    every = np.concatenate([calm, *(branch[2] for _, branch, _, _ in panels)])
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    high = min(high, 2 * float(np.nanmax(calm)))
    return low - 0.05 * (high - low), high + 0.15 * (high - low)

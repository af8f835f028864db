"""Futures of one fork: the loss of the samples that nobody touched, changed, unchanged, and in random controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import (
    FAINT,
    MARGIN,
    SIDES,
    WHOLE,
    WIDTH,
    Area,
    Block,
    heading,
    over_steps,
    page,
    quiet_axes,
    sentence,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 2.4

Line = tuple[str, np.ndarray, np.ndarray]
"""What it is of, steps (T,) and values (T,)."""


def branches_page(panels: Sequence[tuple[str, Line, Line, Sequence[Line]]], title: str) -> Figure:
    """A panel a branch: its title, its own line, the unchanged one, and those of controls. All panels share an axis."""
    return page([heading(title), sentence("mean loss of the samples that were not touched (nats)"),
                 *(_panel(*panel, _range(panels)) for panel in panels)])  # fmt: skip


def _panel(title: str, branch: Line, unchanged: Line, controls: Sequence[Line], limits: tuple[float, float]) -> Block:
    def draw(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.4, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.85)
        for number, (name, steps, values) in enumerate(controls):
            known = name in [other for other, *_ in controls[:number]]
            dashes = "-" if name == controls[0][0] else "--"
            axes.plot(steps, values, color=FAINT, linewidth=0.7, alpha=0.7, linestyle=dashes,
                      label=None if known else f"{name} instead")  # fmt: skip
        axes.plot(*unchanged[1:], color=WHOLE, linewidth=1.1, label=unchanged[0])
        axes.plot(*branch[1:], color=SIDES[1], linewidth=1.4, label=branch[0])
        over_steps(axes)
        axes.set(ylim=limits)
        quiet_axes(axes)
        legend = axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
        area.text(MARGIN, 0.1, title, fontsize=10, fontweight="bold")

    return HEIGHT, draw


def _range(panels: Sequence[tuple[str, Line, Line, Sequence[Line]]]) -> tuple[float, float]:
    """Room for all of the unchanged lines and controls, and for branches up to twice as high."""
    calm = np.concatenate([line[2] for _, _, unchanged, controls in panels for line in (unchanged, *controls)])
    every = np.concatenate([calm, *(branch[2] for _, branch, _, _ in panels)])
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    high = min(high, 2 * float(np.nanmax(calm)))
    return low - 0.05 * (high - low), high + 0.15 * (high - low)

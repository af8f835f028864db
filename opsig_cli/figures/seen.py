"""The picture of `mine` for samples that were seen in batches: points where they were, and no line between them.

T steps that have sightings, N points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import (
    DOWN,
    MARGIN,
    UP,
    WHOLE,
    WIDTH,
    Area,
    heading,
    over_steps,
    page,
    quiet_axes,
    visible,
)
from opsig_cli.figures.contact_sheet import Tile
from opsig_cli.figures.curves import HEIGHT, log_scale
from opsig_cli.figures.pages import sheet_block

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Points:
    """Losses of some samples at the steps at which they were seen, (N,) each."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def seen_figure(
    sheets: Sequence[tuple[str, Sequence[Tile]]], steps: np.ndarray, means: np.ndarray, trend: np.ndarray,
    points: Sequence[Points], zoom: tuple[int, int], title: str,
) -> Figure:  # fmt: skip
    """Sheets of mined samples, each in a colour, under their points of the same colours over the mean loss of every
    batch (T,) and the trend that was to be expected (T,)."""
    blocks = [heading(title), (HEIGHT, lambda area: _draw(area, steps, means, trend, points, zoom))]
    for number, (name, tiles) in enumerate(sheets):
        blocks.append(sheet_block(name, tiles, (UP, DOWN)[number % 2]))
    return page(blocks)


def _draw(
    area: Area, steps: np.ndarray, means: np.ndarray, trend: np.ndarray, points: Sequence[Points], zoom: tuple[int, int]
) -> None:
    plot_height = HEIGHT - 0.85
    left = area.axes(MARGIN + 0.45, 0.32, WIDTH * 0.55 - 0.9, plot_height)
    right = area.axes(WIDTH * 0.55 + 0.35, 0.32, WIDTH * 0.45 - 0.35 - MARGIN, plot_height)
    for axes, (first, last) in ((left, (steps[0], steps[-1])), (right, zoom)):
        inside = (steps >= first) & (steps <= last)
        axes.plot(steps[inside], means[inside], ".", color=WHOLE, markersize=3, alpha=0.5, label="mean of a batch")
        axes.plot(steps[inside], trend[inside], "--", color=WHOLE, linewidth=1.2, label="expected of all")
        shown = [means[inside], trend[inside]]
        for number, each in enumerate(points):
            here = (each.steps >= first) & (each.steps <= last)
            axes.plot(
                each.steps[here], each.values[here], "o", color=(UP, DOWN)[number % 2], markersize=4, alpha=0.8,
                label=visible(each.name),
            )  # fmt: skip
            shown.append(each.values[here])
        over_steps(axes)
        log_scale(axes, shown)
        quiet_axes(axes)
    left.axvspan(*zoom, color="black", alpha=0.08, linewidth=0)
    left.set(ylabel="loss")
    right.set_title(f"steps {zoom[0]} to {zoom[1]}", fontsize=8, loc="right", color="#555555")
    legend = left.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2 + len(points), frameon=False, fontsize=8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)

"""Mean losses of groups against the whole loss over time (the paper's Fig. 1). T steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import MARGIN, WHOLE, WIDTH, Area, columns, cut, over_steps, quiet_axes, typeset, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT = 2.75
EVEN = 4
"""How many times the least the largest loss is up to which ticks of a logarithmic axis are evenly spaced numbers."""
NAME = 44
"""Columns of a line's name; longer ones are cut."""


@dataclass(frozen=True)
class Curve:
    """A line: its name, values (T,), colour and style."""

    name: str
    values: np.ndarray
    colour: str = WHOLE
    style: str = "-"


def draw_losses(
    area: Area, steps: np.ndarray, curves: Sequence[Curve], zoom: tuple[int, int], axis: str = "loss"
) -> None:
    """All steps on the left; on the right the steps of `zoom`, both ends included, which is shaded on the left. `axis`:
    what the losses are, with their unit."""
    plot_height = HEIGHT - 0.85
    left = area.axes(MARGIN + 0.45, 0.32, WIDTH * 0.55 - 0.9, plot_height)
    right = area.axes(WIDTH * 0.55 + 0.35, 0.32, WIDTH * 0.45 - 0.35 - MARGIN, plot_height)
    close = (steps >= zoom[0]) & (steps <= zoom[1])
    for axes, chosen, marker in ((left, slice(None), ""), (right, close, ".")):
        for curve in curves:
            axes.plot(
                steps[chosen], curve.values[chosen], curve.style, color=curve.colour, linewidth=1.2, marker=marker,
                markersize=4, label=visible(cut(typeset(curve.name), NAME)),
            )  # fmt: skip
        over_steps(axes)
        log_scale(axes, [curve.values[chosen] for curve in curves])
        quiet_axes(axes)
    left.axvspan(*zoom, color="black", alpha=0.08, linewidth=0)
    left.set(ylabel=axis)
    right.set_title(f"close-up, steps {zoom[0]} to {zoom[1]}", fontsize=8, loc="right", color="#555555")
    legend(left, len(curves))


def legend(axes: Axes, most: int, size: float = 8) -> None:
    """A legend over the axes, in as many columns as its names leave room for, `most` at most; names are no
    mathematics."""
    names = [str(name) for name in axes.get_legend_handles_labels()[1]]
    if not names:
        return
    width = axes.get_position().width * axes.figure.get_size_inches()[0]  # pyright: ignore[reportAttributeAccessIssue]
    room = int(width / (max(map(columns, names)) * 0.6 * size / 72 + 0.55))
    rows = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=max(1, min(most, room)), frameon=False, fontsize=size,
        columnspacing=1.2,
    )  # fmt: skip
    for text in rows.get_texts():
        text.set_parse_math(False)


def log_scale(axes: Axes, values: Sequence[np.ndarray]) -> None:
    """A logarithmic y axis where there is anything positive, with few and plain ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    everything = np.concatenate([np.ravel(v) for v in values]) if values else np.empty(0)
    positive = everything[np.isfinite(everything) & (everything > 0)]
    if not positive.size:
        return
    axes.set_yscale("log", nonpositive="mask")
    low, high = positive.min(), positive.max()
    axes.set_ylim(low / 1.15, high * 1.15)
    if high / low < EVEN:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

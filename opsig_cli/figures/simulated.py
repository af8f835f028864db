"""Pictures of the theory's runs (the paper's Figs. 4 and 38). T points of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    page,
    quiet_axes,
    sentence,
)
from opsig_cli.figures.curves import legend, log_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 3.3
APPROACH, BURST = 39, 14
"""Steps of the valley's first phase that are drawn, and those around its spike."""


def simulation_page(
    times: np.ndarray, loss: np.ndarray, groups: Mapping[str, np.ndarray], sharpness: np.ndarray,
    threshold: float, title: str,
) -> Figure:  # fmt: skip
    """The losses of the groups and the whole loss, and the sharpness against its threshold, (T,) each."""

    return page([heading(title), *_over_time(times, loss, groups, sharpness, threshold)])


def valley_page(
    path_T2: np.ndarray, loss: np.ndarray, groups: Mapping[str, np.ndarray], sharpness: np.ndarray,
    threshold: float, landscape: Callable[[np.ndarray, float], Mapping[str, np.ndarray]], title: str, whole: str = "",
) -> Figure:  # fmt: skip
    """The valley across u as descent enters it and as it spikes (Fig. 4), and losses and sharpness over time.

    `path_T2`: u and v; `landscape(u, v)`: the losses of the two sides and their average over (U,) values of u; `whole`:
    what the whole loss is made of.
    """
    peak = int(np.argmax(loss[10:])) + 10 if len(loss) > 10 else len(loss) - 1
    phases = [(0, min(APPROACH, len(loss) - 1)), (max(0, peak - BURST), min(peak + 3, len(loss) - 1))]

    def phase(area: Area) -> None:
        width = (WIDTH - 2 * MARGIN - 1.5) / 2
        for number, (first, last) in enumerate(phases):
            axes = area.axes(MARGIN + 0.6 + number * (width + 0.7), 0.35, width, HEIGHT - 0.95)
            u, v = path_T2[first : last + 1].T
            side = 1.25 * max(np.abs(u).max(), 0.1)
            grid = np.linspace(-side, side, 301)
            for step, faint in ((first, 0.35), (last, 1.0)):
                curves = landscape(grid, float(path_T2[step, 1]))
                for (name, values), colour in zip(curves.items(), (*SIDES, WHOLE), strict=True):
                    label = name if faint == 1 else None
                    axes.plot(grid, values, color=colour, alpha=faint, linewidth=1.2, label=label)
            heights = [float(landscape(np.array([x]), float(y))["average"][0]) for x, y in zip(u, v, strict=True)]
            axes.plot(u, heights, "o-", color=FAINT, markersize=3, linewidth=0.7, label="descent")
            axes.set(xlabel=f"u, steps {first} to {last} (faint: the valley at step {first})", ylabel="loss")
            axes.set_ylim(-0.05 * max(heights), max(1.6 * max(heights), 2.0))
            quiet_axes(axes)
            legend(axes, 4)

    steps = np.arange(len(loss))
    said = [sentence(whole)] if whole else []
    return page([heading(title), *said, (HEIGHT, phase), *_over_time(steps, loss, groups, sharpness, threshold)])


def _over_time(
    times: np.ndarray, loss: np.ndarray, groups: Mapping[str, np.ndarray], sharpness: np.ndarray, threshold: float
) -> list[Block]:
    """The losses of the groups and of the whole; the sharpness against its threshold."""

    def losses(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.95)
        for (name, values), colour in zip(groups.items(), (*SIDES, FAINT), strict=False):
            axes.plot(times, values, color=colour, linewidth=1, label=name)
        axes.plot(times, loss, "--" if groups else "-", color=WHOLE, label="whole loss")
        log_scale(axes, [loss, *groups.values()])
        axes.set(xlabel="time" if not len(groups) else "step", ylabel="loss")
        quiet_axes(axes)
        legend(axes, 5)

    def curvature(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.95)
        axes.plot(times, sharpness, color=SIDES[0], label="sharpness")
        if np.isfinite(threshold):
            axes.axhline(threshold, linestyle="--", color=WHOLE, label="2 / learning rate")
        axes.set(xlabel="time" if not len(groups) else "step", ylabel="sharpness", ylim=(0, None))
        quiet_axes(axes)
        legend(axes, 5)

    return [(HEIGHT, losses), (HEIGHT, curvature)]

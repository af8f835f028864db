"""Pictures of the theory's runs (the paper's Figs. 4 and 38). T points of time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opsig_cli.figures.canvas import FAINT, MARGIN, SIDES, WHOLE, WIDTH, Area, heading, quiet_axes, save_page
from opsig_cli.figures.curves import log_scale

HEIGHT = 3.3


def simulation_page(
    path: Path, times: np.ndarray, loss: np.ndarray, groups: Mapping[str, np.ndarray], sharpness: np.ndarray,
    threshold: float, title: str,
) -> None:  # fmt: skip
    """Save the losses of the groups and the whole loss, and the sharpness against its threshold, (T,) each."""

    def losses(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.95)
        for (name, values), colour in zip(groups.items(), (*SIDES, FAINT), strict=False):
            axes.plot(times, values, color=colour, linewidth=1, label=name)
        axes.plot(times, loss, "--", color=WHOLE, label="whole loss")
        log_scale(axes, [loss, *groups.values()])
        axes.set(xlabel="time" if not len(groups) else "step", ylabel="loss")
        quiet_axes(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, frameon=False, fontsize=8)

    def curvature(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.95)
        axes.plot(times, sharpness, color=SIDES[0], label="sharpness")
        if np.isfinite(threshold):
            axes.axhline(threshold, linestyle="--", color=WHOLE, label="2 / learning rate")
        axes.set(xlabel="time" if not len(groups) else "step", ylabel="sharpness", ylim=(0, None))
        quiet_axes(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, frameon=False, fontsize=8)

    save_page(path, [heading(title, 11), (HEIGHT, losses), (HEIGHT, curvature)])

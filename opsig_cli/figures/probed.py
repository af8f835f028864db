"""Pictures of probes (the paper's Fig. 5) and of projected iterates (Fig. 6b). T steps, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from opsig_cli.figures.canvas import FAINT, MARGIN, WHOLE, WIDTH, Area, Block, heading, quiet_axes, save_page
from opsig_cli.figures.curvature import PALETTE
from opsig_cli.figures.curves import log_scale

HEIGHT = 3.0


def probe_page(
    path: Path, steps: np.ndarray, probes: Mapping[str, tuple[np.ndarray, np.ndarray]], mean_norm: np.ndarray,
    classes: Sequence[str], title: str,
) -> None:  # fmt: skip
    """Save, for each input, its class probabilities (T, C) and its feature norm (T,) against the data's mean (T,)."""

    def block(name: str, probabilities: np.ndarray, norms: np.ndarray) -> Block:
        def draw(area: Area) -> None:
            left = area.axes(MARGIN + 0.5, 0.45, WIDTH * 0.55 - 0.9, HEIGHT - 1)
            order = np.argsort(-probabilities.max(0))[:6]
            for place, number in enumerate(order):
                left.plot(steps, probabilities[:, number], color=PALETTE[place], label=classes[number], linewidth=1.2)
            left.set(xlabel="step", ylabel="probability", ylim=(-0.02, 1.02))
            right = area.axes(WIDTH * 0.55 + 0.4, 0.45, WIDTH * 0.45 - 0.4 - MARGIN, HEIGHT - 1)
            right.plot(steps, norms, color=PALETTE[0], label="this input")
            right.plot(steps, mean_norm, "--", color=WHOLE, label="mean of the data")
            right.set(xlabel="step", ylabel="feature norm", ylim=(0, None))
            for axes in (left, right):
                quiet_axes(axes)
                legend = axes.legend(
                    loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=6, frameon=False, fontsize=8, columnspacing=1
                )
                for text in legend.get_texts():
                    text.set_parse_math(False)
            area.text(MARGIN, 0, name, fontweight="bold")

        return HEIGHT, draw

    save_page(path, [heading(title), *(block(name, *values) for name, values in probes.items())])


def projection_page(
    path: Path, runs: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]], crossing: int, title: str
) -> None:
    """Save projections (T,) of runs over their steps (T,) and, where there are any, effective steps (T,)."""

    def projections(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.9)
        for (name, (steps, values, _)), colour in zip(runs.items(), PALETTE, strict=False):
            axes.plot(steps, values, ".-", color=colour, linewidth=1, markersize=3, label=name)
        axes.axvline(crossing, color=FAINT, linewidth=0.8)
        axes.set(xlabel="step", ylabel="along the eigenvector")
        quiet_axes(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=8)

    def effective(area: Area) -> None:
        axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.9)
        for (name, (steps, _, values)), colour in zip(runs.items(), PALETTE, strict=False):
            if values is not None:
                axes.plot(steps, values, color=colour, label=f"{name}: effective step")
        log_scale(axes, [values for _, _, values in runs.values() if values is not None])
        axes.set(xlabel="step", ylabel="effective step")
        quiet_axes(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=8)

    blocks: list[Block] = [heading(title), (HEIGHT, projections)]
    if any(values is not None for _, _, values in runs.values()):
        blocks.append((HEIGHT, effective))
    save_page(path, blocks)

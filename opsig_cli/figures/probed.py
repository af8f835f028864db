"""Pictures of probes (the paper's Fig. 5) and of projected iterates (Fig. 6b). T steps, C classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opsig_cli.figures.canvas import FAINT, MARGIN, WHOLE, WIDTH, Area, Block, heading, page, quiet_axes
from opsig_cli.figures.curvature import PALETTE
from opsig_cli.figures.curves import legend, log_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 3.2
COLOURS = (*PALETTE, "#000000", "#a6d854")
"""Of classes; the paper's tasks have ten."""


@dataclass(frozen=True)
class Probe:
    """One input through one run: steps, times and norms (T,), logits and probabilities (T, C), and at which steps it
    oscillates (T,)."""

    name: str
    step: np.ndarray
    time: np.ndarray
    feature_norm: np.ndarray
    mean_feature_norm: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray
    swinging: np.ndarray


@dataclass(frozen=True)
class Projection:
    """One run along an eigenvector: steps, projections, and Adam's effective steps by both readings or NaN, (T,)."""

    name: str
    step: np.ndarray
    projection: np.ndarray
    effective_step: np.ndarray
    step_size_along: np.ndarray


def probe_page(panels: Sequence[tuple[str, np.ndarray, Sequence[Probe]]], classes: Sequence[str], title: str) -> Figure:
    """Save, for each input (its name, picture (H, W, C), and runs), the first run's logits, its class probabilities
    while it oscillates most, and all runs' feature norms against the mean over the data.

    One run is drawn over steps, several over time, the step times the learning rate.
    """
    return page([heading(title), *(_probe(*panel, classes) for panel in panels)])


def _probe(name: str, picture: np.ndarray, runs: Sequence[Probe], classes: Sequence[str]) -> Block:
    over_time = len(runs) > 1 and all(np.isfinite(run.time).all() for run in runs)

    def draw(area: Area) -> None:
        first = runs[0]
        shown = np.argsort(-first.probabilities.max(0), kind="stable")[: len(COLOURS)]
        colours = dict(zip(sorted(shown.tolist()), COLOURS, strict=False))
        area.text(MARGIN, 0, name if len(runs) == 1 else f"{name}; logits of {first.name}", fontweight="bold")
        left = area.axes(MARGIN + 0.4, 0.75, 3.6, HEIGHT - 1.25)
        for number, colour in colours.items():
            x = first.time if over_time else first.step
            left.plot(x, first.logits[:, number], color=colour, label=classes[number], linewidth=1)
        left.set(xlabel="time" if over_time else "step", ylabel="logit")
        legend(left, 5, 7)
        quiet_axes(left)
        _bars(area, first, colours)
        right = area.axes(WIDTH - MARGIN - 3.5, 0.75, 3.5, HEIGHT - 1.25)
        for run, colour in zip(runs, PALETTE, strict=False):
            x = run.time if over_time else run.step
            label = "this input" if len(runs) == 1 else run.name
            right.plot(x, run.feature_norm, color=colour, label=label, linewidth=1.2)
            mean = "mean of the data" if run is first else None
            right.plot(x, run.mean_feature_norm, "--", color=WHOLE if run is first else colour, label=mean, linewidth=1)
        right.set(xlabel="time" if over_time else "step", ylabel="feature norm", ylim=(0, None))
        legend(right, 3, 7)
        quiet_axes(right)
        seen = area.axes(WIDTH - MARGIN - 0.65, 0.0, 0.6, 0.6)
        seen.imshow(np.clip(picture, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
        seen.set(xticks=[], yticks=[])

    return HEIGHT, draw


def _bars(area: Area, run: Probe, colours: Mapping[int, str]) -> None:
    """Class probabilities at successive steps around the widest swing; over all steps where nothing swings."""
    left, width = MARGIN + 4.6, WIDTH - 2 * MARGIN - 4.6 - 4.15
    burst = widest_swing(run)
    if burst is None:
        axes = area.axes(left, 0.75, width, HEIGHT - 1.25)
        for number, colour in colours.items():
            axes.plot(run.step, run.probabilities[:, number], color=colour, linewidth=1)
        axes.set(xlabel="step", ylabel="probability", ylim=(-0.02, 1.02))
        axes.set_title("no swing between successive steps", fontsize=8, loc="left", color=FAINT)
        quiet_axes(axes)
        return
    for place, t in enumerate(burst):
        row, column = divmod(place, 2)
        axes = area.axes(left + column * width / 2, 0.6 + row * 1.2, width / 2 - 0.15, 0.9)
        axes.bar(range(len(colours)), run.probabilities[t, list(colours)], color=list(colours.values()))
        axes.set(xticks=[], ylim=(0, 1), yticks=[0, 1] if column == 0 else [])
        axes.set_title(f"step {int(run.step[t])}", fontsize=8)
        quiet_axes(axes)


def widest_swing(run: Probe) -> range | None:
    """The four successive steps of the widest swing of a probability (three at the end), None where nothing swings."""
    if not run.swinging.any():
        return None
    size = np.zeros(len(run.step))
    size[1:] = np.abs(np.diff(run.probabilities, axis=0)).max(1)
    last = int(np.where(run.swinging, size, -1).argmax())
    follows = last + 1 < len(run.step) and run.step[last + 1] == run.step[last] + 1
    return range(last - 2, last + 1 + follows)


def projection_page(runs: Sequence[Projection], crossing: int, title: str) -> Figure:
    """Projections of runs over their steps and, where there are any, effective steps by both readings."""

    def projections(area: Area) -> None:
        axes = _wide(area)
        for run, colour in zip(runs, PALETTE, strict=False):
            axes.plot(run.step, run.projection, ".-", color=colour, linewidth=1, markersize=3, label=run.name)
        axes.axvline(crossing, color=FAINT, linewidth=0.8)
        axes.set(xlabel="step", ylabel="along the eigenvector")
        legend(axes, 3, 7)

    def effective(area: Area) -> None:
        axes = _wide(area)
        drawn = []
        for run, colour in zip(runs, PALETTE, strict=False):
            for values, style, words in (
                (run.effective_step, "-", "|<D m, u>|"), (run.step_size_along, ":", "|<D, u>|")
            ):  # fmt: skip
                if np.isfinite(values).any():
                    axes.plot(run.step, values, style, color=colour, label=f"{run.name.split(':')[0]}: {words}")
                    drawn.append(values)
        log_scale(axes, drawn)
        axes.set(xlabel="step", ylabel="effective step")
        legend(axes, 4, 7)

    blocks: list[Block] = [heading(title), (HEIGHT, projections)]
    if any(np.isfinite(run.effective_step).any() for run in runs):
        blocks.append((HEIGHT, effective))
    return page(blocks)


def _wide(area: Area):
    axes = area.axes(MARGIN + 0.6, 0.45, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 1)
    quiet_axes(axes)
    return axes

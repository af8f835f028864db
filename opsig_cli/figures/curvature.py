"""Pictures of curvature. T steps, K eigenvalues, L layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from opsig_cli.figures.curves import legend, log_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 3.6
DIPS = (
    "curvature is v'H(z)v along the whole loss's top eigenvector v of that step: a dip is a checkpoint at which v "
    "points along other samples"
)
FAINTEST = 1e-2
"""Part of an eigenvalue whose peak is the least that a spectral density shows."""
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")


def sharpness_page(
    steps: np.ndarray, eigenvalues_TK: np.ndarray, threshold_T: np.ndarray,
    fractions: Mapping[str, np.ndarray], title: str, limit: str = "stability threshold",
) -> Figure:  # fmt: skip
    """Eigenvalues against the stability threshold and, below, layers' shares of the top eigenvector, (T,) each.

    `limit`: what the threshold is called.
    """

    def draw(area: Area) -> None:
        axes = _axes(area)
        for rank, values in enumerate(eigenvalues_TK.T):
            axes.plot(steps, values, ".-", color=SIDES[0], alpha=1 / (1 + 0.6 * rank), label=f"eigenvalue {rank + 1}")
        if np.isfinite(threshold_T).any():
            _threshold(axes, steps, threshold_T, limit)
        over_steps(axes)
        axes.set(ylabel="sharpness", ylim=(min(0, float(np.nanmin(eigenvalues_TK))), None))
        legend(axes, 4)

    blocks: list[Block] = [heading(title), (HEIGHT, draw)]
    if fractions:
        blocks += [heading("share of each layer in the top eigenvector", 10), (HEIGHT, _fractions(steps, fractions))]
    return page(blocks)


def _fractions(steps: np.ndarray, fractions: Mapping[str, np.ndarray]):
    def draw(area: Area) -> None:
        axes = _axes(area)
        ordered = sorted(fractions, key=lambda name: -float(np.nanmean(fractions[name])))
        shown = ordered[:7]
        rest = [fractions[name] for name in ordered[7:]]
        stack = [fractions[name] for name in shown] + ([np.sum(rest, axis=0)] if rest else [])
        names = shown + ([f"{len(rest)} others"] if rest else [])
        if len(steps) == 1:  # a band has no width at one step
            for number, (name, values) in enumerate(zip(names, stack, strict=True)):
                below = np.sum(stack[:number], axis=0) if number else 0.0
                axes.bar(steps, values, bottom=below, width=0.6, color=PALETTE[number], label=name)
        else:
            axes.stackplot(steps, np.stack(stack), labels=names, colors=PALETTE[: len(stack)], alpha=0.85)
        over_steps(axes, float(steps[0]), float(steps[-1]))
        axes.set(ylabel="share", ylim=(0, 1))
        legend(axes, 8)

    return draw


def samples_page(panels: Sequence[tuple[str, np.ndarray, Mapping[str, np.ndarray]]], title: str) -> Figure:
    """Metrics of sets of samples over time (the paper's Fig. 2): (metric, steps (T,), values (T, M) by set).

    Lines are medians, bands the quartiles.
    """

    def draw(name: str, steps: np.ndarray, sets: Mapping[str, np.ndarray]):
        def panel(area: Area) -> None:
            axes = _axes(area)
            for (label, values), colour in zip(sets.items(), PALETTE, strict=False):
                low, middle, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=1)
                axes.plot(steps, middle, ".-", color=colour, label=f"{label} ({values.shape[1]} samples), median")
                within = f"{label}, middle half (quartiles)"
                if len(steps) == 1:  # a band has no width at one step
                    axes.vlines(steps, low, high, color=colour, alpha=0.4, linewidth=6, label=within)
                else:
                    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label=within)
            over_steps(axes)
            axes.set(ylabel=name.replace("_", " "))
            if name == "curvature":
                axes.axhline(0, color=FAINT, linewidth=0.8)
            legend(axes, 4)

        return HEIGHT, panel

    said = [sentence(DIPS)] if any(name == "curvature" for name, *_ in panels) else []
    return page([heading(title), *said, *(draw(*panel) for panel in panels)])


def loss_page(panels: Sequence[Block], title: str) -> Figure:
    """Panels of the whole loss's curvature, one under the other."""
    return page([heading(title), *panels])


def trace_panel(steps: np.ndarray, trace_T: np.ndarray, error_T: np.ndarray) -> Block:
    """The Hessian's trace over steps, with a band of its standard error."""

    def draw(area: Area) -> None:
        axes = _axes(area)
        low, high = trace_T - error_T, trace_T + error_T
        axes.plot(steps, trace_T, ".-", color=SIDES[0], label="trace")
        if len(steps) == 1:  # too few for a band
            axes.vlines(steps, low, high, color=SIDES[0], alpha=0.5, label="standard error")
        else:
            axes.fill_between(steps, low, high, color=SIDES[0], alpha=0.25, linewidth=0, label="standard error")
        axes.axhline(0, color=FAINT, linewidth=0.8)
        over_steps(axes)
        axes.set(ylabel="trace of the Hessian")
        legend(axes, 4)

    return HEIGHT, draw


def critical_panel(steps: np.ndarray, critical_T: np.ndarray, threshold_T: np.ndarray) -> Block:
    """Critical sharpness over steps against 2 over the learning rate; infinite where the update climbs."""

    def draw(area: Area) -> None:
        axes = _axes(area)
        finite = np.where(np.isfinite(critical_T) & (critical_T > 0), critical_T, np.nan)
        axes.plot(steps, finite, ".-", color=SIDES[0], label="critical sharpness")
        shown = [finite]
        if np.isfinite(threshold_T).any():
            _threshold(axes, steps, threshold_T, "2 / learning rate")
            shown.append(threshold_T)
        log_scale(axes, shown)
        climbs = np.isposinf(critical_T)
        if climbs.any():
            top = np.full(int(climbs.sum()), 0.98)
            axes.plot(
                steps[climbs], top, "^", color=SIDES[1], clip_on=False, transform=axes.get_xaxis_transform(),
                label="any step along the update raises the loss",
            )  # fmt: skip
        over_steps(axes)
        axes.set(ylabel="critical sharpness")
        legend(axes, 4)

    return HEIGHT, draw


def density_panel(step: int, eigenvalues_X: np.ndarray, density_X: np.ndarray, width: float) -> Block:
    """The Hessian's spectral density at a step: how many eigenvalues a unit, smoothed by Gaussians of this width."""

    def draw(area: Area) -> None:
        axes = _axes(area)
        one = 1 / (width * np.sqrt(2 * np.pi))
        axes.fill_between(eigenvalues_X, density_X, FAINTEST * one, color=SIDES[0], alpha=0.25, linewidth=0)
        label = f"spectral density at step {step}, smoothed over {width:.2g}"
        axes.plot(eigenvalues_X, density_X, color=SIDES[0], label=label)
        axes.axhline(one, linestyle=":", color=WHOLE, label="peak of a single eigenvalue")
        axes.axvline(0, color=FAINT, linewidth=0.8)
        axes.set_yscale("log")
        axes.set(xlabel="eigenvalue", ylabel="eigenvalues per unit", ylim=(FAINTEST * one, 3 * density_X.max()))
        legend(axes, 4)

    return HEIGHT, draw


def slice_page(positions: np.ndarray, curves: Mapping[str, np.ndarray], title: str, axis: str = "mean loss") -> Figure:
    """Mean losses of groups and of all samples along the top eigenvector (the paper's Fig. 4). `axis`: what the losses
    are, with their unit."""

    def draw(area: Area) -> None:
        axes = _axes(area)
        colours = iter(PALETTE)
        for name, losses in curves.items():
            whole = name == "all samples"
            colour = WHOLE if whole else next(colours, FAINT)
            axes.plot(positions, losses, "--" if whole else "-", color=colour, label=name)
        axes.axvline(0, color=FAINT, linewidth=0.8, label="where the run stands")
        axes.set(xlabel="position along the top eigenvector", ylabel=axis)
        legend(axes, 6)

    return page([heading(title), (HEIGHT, draw)])


def _axes(area: Area):
    axes = area.axes(MARGIN + 0.6, 0.35, WIDTH - 2 * MARGIN - 0.8, HEIGHT - 0.95)
    quiet_axes(axes)
    return axes


def _threshold(axes, steps: np.ndarray, threshold_T: np.ndarray, name: str) -> None:
    """A dashed line; across all of the axes where one step would make a point of it."""
    if len(steps) == 1:
        axes.axhline(threshold_T[0], linestyle="--", color=WHOLE, label=name)
    else:
        axes.plot(steps, threshold_T, "--", color=WHOLE, label=name)

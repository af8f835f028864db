"""The losses of single samples as small lines, for the rows of a table. N samples, T steps, B buckets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opsig_cli.trajectory.file import Trajectory

WIDTH, HEIGHT = 240, 34
BUCKETS = 110
"""Stretches of steps whose lowest and highest loss are drawn."""
ROWS = 2048
"""Steps that are read at once."""
LEAST, LOWEST = 1e-3, 0.1
"""A loss smaller than this, or than this part of all losses drawn, is drawn at the bottom of the logarithmic axis."""


def loss_lines(run: Trajectory, positions: Sequence[int]) -> tuple[dict[int, str], tuple[float, float]]:
    """An SVG path for every one of these columns of the file, all on one logarithmic axis, and its two ends.

    A bucket of steps goes up or down, from its lowest to its highest loss or back, as its losses do.
    """
    if not positions:
        return {}, (LEAST, 1.0)
    count = len(run.steps("losses"))
    edges = np.unique(np.linspace(0, count, min(BUCKETS, count) + 1).astype(int))
    low_BN, high_BN = (np.full((len(edges) - 1, len(positions)), fill) for fill in (np.inf, -np.inf))
    order = np.argsort(positions)
    columns = np.asarray(positions)[order]
    for first in range(0, count, ROWS):
        rows = run.series("losses/loss", columns, first, min(first + ROWS, count)).astype(np.float64)
        rows[~np.isfinite(rows)] = np.nan
        bucket = np.searchsorted(edges, np.arange(first, first + len(rows)), side="right") - 1
        np.fmin.at(low_BN, bucket, np.where(np.isnan(rows), np.inf, rows))
        np.fmax.at(high_BN, bucket, np.where(np.isnan(rows), -np.inf, rows))
    known = np.isfinite(low_BN) & np.isfinite(high_BN)
    drawn = np.stack([low_BN, high_BN])[:, known]
    bottom = max(LEAST, float(np.quantile(drawn[0], LOWEST))) if drawn.size else LEAST
    top = max(bottom * 1.01, float(drawn.max())) if drawn.size else 1.0
    scale = (HEIGHT - 2) / np.log10(top / bottom)

    def down(loss_BN: np.ndarray) -> np.ndarray:
        return np.rint(HEIGHT - 1 - scale * np.log10(np.maximum(np.where(known, loss_BN, bottom), bottom) / bottom))

    low, high = (down(ends).astype(int).T.tolist() for ends in (low_BN, high_BN))
    across = np.rint((edges[:-1] + edges[1:] - 1) / 2 * WIDTH / max(1, count - 1)).astype(int).tolist()
    even, there = (low_BN == high_BN).T.tolist(), known.T.tolist()
    paths = {}
    for place, position in enumerate(columns.tolist()):
        parts, pen = [], "M"
        for x, y, end, alone, seen in zip(across, low[place], high[place], even[place], there[place], strict=True):
            if seen:
                parts.append(f"{pen}{x} {y}" if alone else f"{pen}{x} {y}L{x} {end}")
            pen = "L" if seen else "M"
        paths[position] = "".join(parts)
    return paths, (bottom, top)

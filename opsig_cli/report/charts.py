"""Line charts as numbers that the template draws as SVG. T steps.

Lines live in a square of WIDTH x HEIGHT that stretches with the page; everything written on it is placed in per cent
of the width, so that letters keep their size on a phone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 1000, 220
MOST_POINTS = 1200
"""Steps that are drawn one by one; of more, each bucket's lowest and highest."""
MOST_DOTS = 60
"""Steps up to which each is marked by a dot."""
NARROW = 30
"""Ratio of highest to lowest up to which a logarithmic axis has more than the powers of ten."""


@dataclass(frozen=True)
class Line:
    """Values over steps, (T,), under a name; `style` is the class that colours it."""

    name: str
    values: np.ndarray
    style: str


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, in per cent or pixels, and what is written there."""

    place: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Drawn:
    """A line as drawn: the SVG path, and dots as (per cent, pixels)."""

    name: str
    style: str
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """What the template draws; `data` is what hovering reads, as JSON."""

    alt: str
    axis: str
    lines: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    band: tuple[float, float] | None
    band_name: str
    mark: Tick | None
    data: str
    height: int = HEIGHT


def line_chart(
    steps: np.ndarray, lines: Sequence[Line], axis: str, alt: str, *, log: bool = True,
    band: tuple[int, int] | None = None, band_name: str = "", mark: int | None = None, mark_name: str = "",
) -> Chart:  # fmt: skip
    """A chart of lines over the same steps (T,), with a band of steps shaded and one step marked.

    Logarithmic where anything is positive, unless `log` is off; what is not finite, or cannot be shown, leaves a gap.
    """
    first, last = float(steps[0]), float(steps[-1])
    span = max(last - first, 1.0)
    shown = [np.where(np.isfinite(line.values), line.values, np.nan).astype(float) for line in lines]
    every = np.concatenate(shown)
    positive = every[every > 0]
    log = log and bool(positive.size)
    if log:
        low, high = float(np.log10(positive.min())), float(np.log10(positive.max()))
        pad = max(0.03, 0.05 * (high - low))
        shown = [np.log10(np.where(values > 0, values, np.nan)) for values in shown]
    else:
        finite = every[np.isfinite(every)]
        low, high = (min(0.0, float(finite.min())), float(finite.max())) if finite.size else (0.0, 1.0)
        pad = 0.06 * (high - low) or 0.5
    bottom, top = (low if not log and low == 0 else low - pad), high + pad

    def across(step: float) -> float:
        return round(100 * (step - first) / span, 3)

    def down(value: float) -> float:
        return round(HEIGHT * (1 - (value - bottom) / (top - bottom)), 1)

    kept = _kept(shown)
    drawn = []
    for line, values in zip(lines, shown, strict=True):
        places = [
            (across(step), down(value)) if math.isfinite(value) else None
            for step, value in zip(steps[kept].tolist(), values[kept].tolist(), strict=True)
        ]
        alone = [place for i, place in enumerate(places) if place and not any(places[max(0, i - 1) : i + 2 : 2])]
        dots = [place for place in places if place] if len(kept) <= MOST_DOTS else alone
        drawn.append(Drawn(line.name, line.style, _path(places), dots))
    raw = [np.where(np.isfinite(line.values), line.values, np.nan)[kept].tolist() for line in lines]
    data = {
        "steps": steps[kept].tolist(),
        "lines": [[None if math.isnan(value) else float(f"{value:.4g}") for value in values] for values in raw],
    }
    marked = None
    if mark is not None:
        place = across(mark)
        marked = Tick(place, mark_name, "start" if place < 60 else "end")
    return Chart(
        alt, axis + (", log scale" if log else ""), drawn,
        [Tick(across(value), f"{value:,.0f}", _anchor(across(value))) for value in linear_ticks(first, last, 6)],
        [Tick(down(math.log10(value) if log else value), written(value))
         for value in (log_ticks(10**bottom, 10**top) if log else linear_ticks(bottom, top, 5))],
        None if band is None else (max(0.0, across(band[0])), min(100.0, across(band[1]))), band_name,
        marked, json.dumps(data, separators=(",", ":"), allow_nan=False),
    )  # fmt: skip


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between two, at most so many.

    >>> linear_ticks(0, 400, 6)
    [0.0, 100.0, 200.0, 300.0, 400.0]
    """
    if not high > low:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        unit = factor * 10.0**exponent
        first, last = math.ceil(low / unit - 1e-9), math.floor(high / unit + 1e-9)
        if last - first < most:
            return [float(f"{number * unit:.12g}") for number in range(first, last + 1)]
    raise AssertionError("a unit of twenty times the span leaves few enough")


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive values; also 2 and 5 times them where they are near; every n-th of many.

    >>> log_ticks(0.3, 3), log_ticks(1, 1e12)
    ([0.5, 1.0, 2.0], [1.0, 1000.0, 1000000.0, 1000000000.0, 1000000000000.0])
    """
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high / low < NARROW else (1,)
    found = [value for p in powers for f in factors if low <= (value := float(f"{f}e{p}")) <= high * (1 + 1e-9)]
    if len(found) < 2:
        return linear_ticks(low, high, 4)
    return found[:: -(-len(found) // 6)]


def written(value: float) -> str:
    """A tick's number, short.

    >>> written(0.05), written(20.0), written(1e13), written(25000.0)
    ('0.05', '20', '1e13', '25,000')
    """
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _kept(values: Sequence[np.ndarray]) -> np.ndarray:
    """Rows to draw: all, or of many each bucket's ends and every line's lowest and highest there, so that no spike is
    lost."""
    count = len(values[0])
    if count <= MOST_POINTS:
        return np.arange(count)
    buckets = MOST_POINTS // (2 + 2 * len(values))
    edges = np.linspace(0, count, buckets + 1).astype(int)
    kept = {0, count - 1}
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        kept |= {start, stop - 1}
        for line in values:
            part = line[start:stop]
            if np.isfinite(part).any():
                kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    return np.array(sorted(kept))


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    parts, pen = [], "M"
    for place in places:
        if place is None:
            pen = "M"
            continue
        parts.append(f"{pen}{place[0] * WIDTH / 100:.1f} {place[1]}")
        pen = "L"
    return "".join(parts)


def _anchor(place: float) -> str:
    return "start" if place < 3 else "end" if place > 97 else "middle"

"""What a person sees of a run's samples, from its file: the tile of each."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsig_cli.figures.contact_sheet import Tile
from opsig_cli.figures.vectors import BARS, vector_picture
from opsig_cli.studies import mining as finding
from opsig_cli.studies.describing import PICTURES
from opsig_cli.trajectory.file import Trajectory

UNLIKE = 5
"""How many times the range that a quarter of an input's numbers stay below the largest may be, for all to be drawn over
one: else those of small units would not be seen."""


class Pictures:
    """What a person sees of each sample: its picture or text, its label, and names for its predictions.

    `words`: what a picture is of where it is a plot of numbers, else "".
    """

    def __init__(self, run: Trajectory):
        kept = next((name for name in PICTURES if run.has(name)), None)
        self._pictures = None if kept is None else run.read(kept)
        self._labels = run.read("samples/label") if run.has("samples/label") else None
        self._names = run.read("class_name") if run.has("class_name") else None
        self._own = run.read("samples/name") if run.has("samples/name") else None
        self._ids = run.samples
        self._range: tuple[np.ndarray, np.ndarray] | None = None
        self.words = ""
        if kept == "samples/vector" and self._pictures is not None:
            self._range, own = ranges(self._pictures)
            count = self._pictures.shape[1]
            self.words = f"Bars: the input's {count} numbers" if count <= BARS else "Line: the input's numbers in order"
            self.words += ", each over its own range" if own else ""

    def tile(self, position: int, before: Any, after: Any, caption: str = "") -> Tile:
        """The tile of the sample in this column."""
        picture = None if self._pictures is None else self._pictures[position]
        if picture is not None and self._range is not None:
            picture = vector_picture(picture, *self._range)
        label = None if self._labels is None else str(self._labels[position])
        was, now = (None if name is None else str(name) for name in (before, after))
        shown = str(picture) if isinstance(picture, str) else picture
        own = None if self._own is None else str(self._own[position])
        return Tile(shown, label, was, now, caption, int(self._ids[position]), own)

    def name(self, predictions: np.ndarray | None, position: int) -> Any:
        """The predicted class of the sample in this column."""
        return None if predictions is None else finding.class_name(self._names, predictions[position])


def ranges(values_SN: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
    """The least and the largest of each number of inputs (S, N), (N,) each, and whether they are its own: one range for
    all where theirs are of one size, with 0 in it for bars; always for lines.

    >>> (low, high), own = ranges(np.array([[0.0, 1.0], [1.0, 3.0]]))
    >>> low.tolist(), high.tolist(), own
    ([0.0, 0.0], [3.0, 3.0], False)
    """
    known = np.where(np.isfinite(values_SN), values_SN, np.nan)
    empty = np.isnan(known).all(0)
    known[0, empty] = 0
    low, high = np.nanmin(known, axis=0).astype(np.float64), np.nanmax(known, axis=0).astype(np.float64)
    spread = (high - low)[high > low]
    own = bool(len(low) <= BARS and len(spread) and spread.max() > UNLIKE * np.percentile(spread, 25))
    if own:
        return (low, high), True
    least, most = low.min(), high.max()
    if len(low) <= BARS:
        least, most = min(least, 0.0), max(most, 0.0)
    return (np.full(len(low), least), np.full(len(low), most)), False

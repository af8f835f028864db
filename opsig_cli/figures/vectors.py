"""An input of some numbers as a small picture: bars of a few, a line of many. N numbers."""

from __future__ import annotations

import numpy as np

SIDE = 108
"""Pixels of the picture's side."""
FINER = 3
"""Times as fine it is drawn, to be smoothed."""
BARS = 40
"""Numbers up to which each has a bar."""
EDGE = 0.06
"""Part of the side that stays free around the plot."""
INK, ZERO, PAPER = 60, 190, 255


def vector_picture(values_N: np.ndarray, low_N: np.ndarray, high_N: np.ndarray) -> np.ndarray:
    """The numbers as pixels (SIDE, SIDE, 1) uint8, each between its own least and largest, which may be the same for
    all; a faint line at 0 where it lies between. What is not finite is left out.

    >>> one = vector_picture(np.array([0.0, 1.0]), np.zeros(2), np.ones(2))[:, :, 0]
    >>> bool(one[:, : SIDE // 2].mean() > 250), bool(one[:, SIDE // 2 :].mean() < 150)
    (True, True)
    """
    from PIL import Image, ImageDraw

    side = SIDE * FINER
    image = Image.new("L", (side, side), PAPER)
    draw = ImageDraw.Draw(image)

    def height(values: np.ndarray) -> np.ndarray:
        part = (values - low_N) / np.where(high_N > low_N, high_N - low_N, 1)
        return side * (1 - EDGE - (1 - 2 * EDGE) * np.clip(part, 0, 1))

    count = len(values_N)
    y_N, base_N = height(values_N.astype(np.float64)), height(np.zeros(count))
    x_N = side * (EDGE + (1 - 2 * EDGE) * (np.arange(count) + 0.5) / count)
    if (low_N[0], high_N[0]) == (low_N.min(), high_N.max()) and low_N[0] < 0 < high_N[0]:
        draw.line([(0, base_N[0]), (side, base_N[0])], fill=ZERO, width=FINER)
    finite = np.isfinite(values_N)
    if count <= BARS:
        half = side * (1 - 2 * EDGE) / count * 0.36
        for x, y, base in zip(x_N[finite], y_N[finite], base_N[finite], strict=True):
            draw.rectangle([x - half, min(y, base), x + half, max(y, base) + FINER], fill=INK)
    else:
        draw.line(list(zip(x_N[finite].tolist(), y_N[finite].tolist(), strict=True)), fill=INK, width=FINER + 1)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))[:, :, None]

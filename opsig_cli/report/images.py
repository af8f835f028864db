"""Pictures as PNG data URIs: thumbnails of samples, and the matrix of similarities. M samples."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGEST = 128
"""Pixels of a thumbnail's longer side; larger pictures are reduced."""
SMALL = 40
"""The same of one in a row of a table, which is shown a little smaller."""
EXACT = 34
"""Pixels of the longer side up to which a picture is kept to the bit; larger ones are compressed."""
MATRIX = 480
"""Pixels of the matrix's side, at most."""
LEVELS = 48
"""Shades of each sign in the matrix; few, so that it stays small."""
POSITIVE, NEGATIVE = (0, 114, 178), (213, 94, 0)
"""The colours of the two sides of a pair: alike is blue and opposed vermilion, as deep as the size of the cosine."""


def thumbnail(pixels: np.ndarray, largest: int = LARGEST) -> str:
    """A picture (h, w, channels) uint8 as a data URI; one, three or four channels, of others the first."""
    from PIL import Image

    image = Image.fromarray(pixels if pixels.shape[2] in (3, 4) else pixels[:, :, 0])
    if max(image.size) > largest:
        image.thumbnail((largest, largest))
    return _uri(image) if max(image.size) <= EXACT else _compressed(image.convert("RGB"))


def matrix_image(similarity_MM: Any, order: np.ndarray) -> str:
    """Similarities of the samples in this order as a data URI; nothing is transparent, so that it fits any page.

    `similarity_MM`: an array, or what gives blocks as one does.
    More samples than MATRIX are averaged in blocks.
    """
    from PIL import Image

    side = min(len(order), MATRIX)
    edges = np.linspace(0, len(order), side + 1).astype(int)
    averaged = np.empty((side, side), np.float32)
    for row, (start, stop) in enumerate(itertools.pairwise(edges)):
        values = similarity_MM[np.ix_(order[start:stop], order)].mean(0)
        averaged[row] = np.add.reduceat(values, edges[:-1]) / np.diff(edges)
    level = np.clip(np.round(np.nan_to_num(averaged) * LEVELS), -LEVELS, LEVELS).astype(int) + LEVELS
    image = Image.frombytes("P", (side, side), level.astype(np.uint8).tobytes())
    colours = [NEGATIVE] * LEVELS + [POSITIVE] * (LEVELS + 1)
    image.putpalette([part for colour in colours for part in colour])
    depth = bytes(round(255 * abs(number - LEVELS) / LEVELS) for number in range(2 * LEVELS + 1))
    return _uri(image, transparency=depth)


def spread_names(sizes: Sequence[int], room: float) -> list[int]:
    """Numbers of the groups, of these sizes along one side, whose middles are far enough apart to be named.

    >>> spread_names([50, 2, 2, 46], 0.1)
    [0, 1, 3]
    """
    total, start, last = sum(sizes), 0, -1.0
    named = []
    for number, size in enumerate(sizes):
        middle = (start + size / 2) / total
        start += size
        if middle - last >= room:
            named.append(number)
            last = middle
    return named


def _compressed(image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _uri(image, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

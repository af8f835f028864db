"""Reads a dataset's unfiltered chunks straight from the file: several times cheaper than through HDF5.

T rows, S columns, M chosen columns.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np


class Chunks:
    """Where the chunks of a two-dimensional, unfiltered dataset lie in an open file of this size.

    Reading raises ValueError where a chunk is missing or lies outside of the file.
    """

    def __init__(self, fd: int, file_size: int, dataset: Any):
        self._fd = fd
        self._size = file_size
        self._dtype = dataset.dtype
        self._height, self._width = dataset.chunks
        self._columns = dataset.shape[1]
        self._offsets: dict[tuple[int, int], int] = {}
        dataset.id.chunk_iter(self._note)

    def _note(self, chunk: Any) -> None:
        row, column = chunk.chunk_offset
        self._offsets[row // self._height, column // self._width] = chunk.byte_offset

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`, (T, S)."""
        found = np.empty((max(0, stop - start), self._columns), self._dtype)
        for column in range(0, self._columns, self._width):
            width = min(self._width, self._columns - column)
            for low, high, part in self._parts(column // self._width, start, stop):
                found[low - start : high - start, column : column + width] = part[:, :width]
        return found

    def columns(self, positions: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Chosen columns of rows `start:stop`, (T, M)."""
        found = np.empty((max(0, stop - start), len(positions)), self._dtype)
        owner = positions // self._width
        for column in np.unique(owner):
            here = np.flatnonzero(owner == column)
            for low, high, part in self._parts(int(column), start, stop):
                found[low - start : high - start, here] = part[:, positions[here] - column * self._width]
        return found

    def _parts(self, column: int, start: int, stop: int):
        """Rows `start:stop` of one column of chunks: first row, row after the last, and (rows, width) array.

        The array is reused: copy from it before the next.
        """
        row_bytes = self._width * self._dtype.itemsize
        buffer = np.empty((self._height, self._width), self._dtype)
        for row in range(start // self._height, -(-stop // self._height)):
            low, high = max(start, row * self._height), min(stop, (row + 1) * self._height)
            offset = self._offsets.get((row, column))
            if offset is None:
                raise ValueError(f"rows {low} to {high - 1} were never written")
            offset += (low - row * self._height) * row_bytes
            part = buffer[: high - low]
            if offset + part.nbytes > self._size or os.preadv(self._fd, [part.data], offset) != part.nbytes:
                raise ValueError(f"rows {low} to {high - 1} lie outside of the file")
            yield low, high, part

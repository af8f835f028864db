"""Reads a dataset's unfiltered chunks straight from the file: several times cheaper than through HDF5.

T rows, S columns, M chosen columns.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from opsig_cli.trajectory.disk import read_into


class Chunks:
    """Where the chunks of a two-dimensional, unfiltered dataset lie in an open file.

    Reading raises ValueError where a chunk is missing or lies outside of the file.
    """

    def __init__(self, fd: int, dataset: Any):
        self._fd = fd
        self._dtype = dataset.dtype
        self._height, self._width = dataset.chunks
        self._columns = dataset.shape[1]
        self._offsets: dict[tuple[int, int], int] = {}
        dataset.id.chunk_iter(self._note)

    def _note(self, chunk: Any) -> None:
        row, column = chunk.chunk_offset
        self._offsets[row // self._height, column // self._width] = chunk.byte_offset

    def room(self, count: int) -> np.ndarray:
        """An array for so many rows, (count, S)."""
        return np.empty((count, self._columns), self._dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop`, (T, S)."""
        found = np.empty((max(0, stop - start), self._columns), self._dtype)
        self.read_into(found, start, stop)
        return found

    def read_into(self, found: np.ndarray, start: int, stop: int) -> None:
        """Rows `start:stop` into the first rows of `found`, C-contiguous (at least T, S), without a copy on the way."""
        row_bytes = self._width * self._dtype.itemsize
        whole = self._columns - self._columns % self._width  # the last chunk is wider than what it holds
        flat = found.reshape(-1).view(np.uint8).data
        stride = found.shape[1] * self._dtype.itemsize
        for row in range(start // self._height, -(-stop // self._height)):
            low, high = max(start, row * self._height), min(stop, (row + 1) * self._height)
            first = (low - start) * stride
            if high - low == 1:  # nothing but the system's calls counts here
                self._read_line(flat[first : first + whole * self._dtype.itemsize], row, low)
            else:
                for column in range(whole // self._width):
                    begin = first + column * row_bytes
                    pieces = [flat[at : at + row_bytes] for at in range(begin, begin + (high - low) * stride, stride)]
                    self._read(pieces, row, column, low, high)
            if whole < self._columns:
                part = np.empty((high - low, self._width), self._dtype)
                self._read([part.data], row, whole // self._width, low, high)
                found[low - start : high - start, whole:] = part[:, : self._columns - whole]

    def _read_line(self, line: memoryview, row: int, place: int) -> None:
        """One row's part in whole chunks, those at this row of them."""
        row_bytes = self._width * self._dtype.itemsize
        shift = (place - row * self._height) * row_bytes
        offsets, fd = self._offsets, self._fd
        for column, at in enumerate(range(0, len(line), row_bytes)):
            offset = offsets.get((row, column))
            if offset is None or os.preadv(fd, (line[at : at + row_bytes],), offset + shift) != row_bytes:
                self._read([line[at : at + row_bytes]], row, column, place, place + 1)

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
        buffer = np.empty((self._height, self._width), self._dtype)
        for row in range(start // self._height, -(-stop // self._height)):
            low, high = max(start, row * self._height), min(stop, (row + 1) * self._height)
            part = buffer[: high - low]
            self._read([part.data], row, column, low, high)
            yield low, high, part

    def _read(self, pieces: list, row: int, column: int, low: int, high: int) -> None:
        """Rows `low:high`, which lie in the chunk at (row, column), into buffers that take one after the other."""
        offset = self._offsets.get((row, column))
        if offset is None:
            raise ValueError(f"rows {low} to {high - 1} were never written")
        row_bytes = self._width * self._dtype.itemsize
        offset += (low - row * self._height) * row_bytes
        if os.preadv(self._fd, pieces, offset) == (high - low) * row_bytes:
            return
        for piece in (memoryview(each).cast("B") for each in pieces):  # one call may read less than it was asked to
            if read_into(self._fd, piece, offset) != len(piece):
                raise ValueError(f"rows {low} to {high - 1} lie outside of the file")
            offset += len(piece)

"""Reads a dataset's unfiltered chunks straight from the file: several times cheaper than through HDF5.

T rows, S columns, M chosen columns.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from typing import Any

import numpy as np

from opsig_cli.trajectory.disk import read_into

STRIP_BYTES = 256 << 10
"""What is read at a time of chunks of which only some columns are wanted: little, so that it stays in the processor's
cache."""


class Room:
    """Arrays for blocks of rows, each of which is used again once nobody holds it or a part of it: to have fresh memory
    from the system costs more than to read into it."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array whose content says nothing."""
        for at in range(len(self._arrays)):
            free = sys.getrefcount(self._arrays[at]) <= 2  # the list's, and the one that is being counted
            there = self._arrays[at]
            if free and there.dtype == dtype and there.shape[1:] == shape[1:] and len(there) >= shape[0]:
                return there[: shape[0]]
        self._arrays = [*self._arrays[-1:], np.empty(shape, dtype)]  # one is being made while another is looked at
        return self._arrays[-1][:]


class Chunks:
    """Where the chunks of a two-dimensional, unfiltered dataset lie in an open file.

    `dtype`: of its numbers; `row_shape`: (S,). Reading raises ValueError where a chunk is missing or lies outside of
    the file.
    """

    def __init__(self, fd: int, dataset: Any):
        self._fd = fd
        self.dtype: np.dtype = dataset.dtype
        self._height, self._width = dataset.chunks
        self.row_shape: tuple[int, ...] = dataset.shape[1:]
        self._columns = dataset.shape[1]
        self._offsets: dict[tuple[int, int], int] = {}
        dataset.id.chunk_iter(self._note)

    def _note(self, chunk: Any) -> None:
        row, column = chunk.chunk_offset
        self._offsets[row // self._height, column // self._width] = chunk.byte_offset

    def read_into(self, found: np.ndarray, start: int, stop: int) -> None:
        """Rows `start:stop` into the first rows of `found`, C-contiguous (at least T, S), without a copy on the way."""
        row_bytes = self._width * self.dtype.itemsize
        whole = self._columns - self._columns % self._width  # the last chunk is wider than what it holds
        flat = found.reshape(-1).view(np.uint8).data
        stride = found.shape[1] * self.dtype.itemsize
        for row in range(start // self._height, -(-stop // self._height)):
            low, high = max(start, row * self._height), min(stop, (row + 1) * self._height)
            first = (low - start) * stride
            if high - low == 1:  # nothing but the system's calls counts here
                self._read_line(flat[first : first + whole * self.dtype.itemsize], row, low)
            else:
                for column in range(whole // self._width):
                    begin = first + column * row_bytes
                    end = begin + (high - low) * stride
                    if stride == row_bytes:
                        pieces = [flat[begin:end]]
                    else:
                        pieces = [flat[at : at + row_bytes] for at in range(begin, end, stride)]
                    self._read(pieces, row, column, low, high)
            if whole < self._columns:
                part = np.empty((high - low, self._width), self.dtype)
                self._read([part.data], row, whole // self._width, low, high)
                found[low - start : high - start, whole:] = part[:, : self._columns - whole]

    def _read_line(self, line: memoryview, row: int, place: int) -> None:
        """One row's part in whole chunks, those at this row of them."""
        row_bytes = self._width * self.dtype.itemsize
        shift = (place - row * self._height) * row_bytes
        offsets, fd = self._offsets, self._fd
        for column, at in enumerate(range(0, len(line), row_bytes)):
            offset = offsets.get((row, column))
            if offset is None or os.preadv(fd, (line[at : at + row_bytes],), offset + shift) != row_bytes:
                self._read([line[at : at + row_bytes]], row, column, place, place + 1)

    def columns(self, positions: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Chosen columns of rows `start:stop`, (T, M)."""
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        found = np.empty((max(0, stop - start), len(positions)), self.dtype)
        edges = np.flatnonzero(np.diff(ascending // self._width)) + 1
        for first, last in pairwise([0, *edges.tolist(), len(positions)] if len(positions) else []):
            column = int(ascending[first] // self._width)
            within = ascending[first:last] - column * self._width
            for low, high, part in self._parts(column, start, stop):
                part.take(within, axis=1, out=found[low - start : high - start, first:last], mode="clip")
        if np.array_equal(ascending, positions):
            return found
        back = np.empty_like(found)
        back[:, order] = found
        return back

    def _parts(self, column: int, start: int, stop: int):
        """Rows `start:stop` of one column of chunks: first row, row after the last, and (rows, width) array.

        The array is reused: copy from it before the next.
        """
        strip = max(1, STRIP_BYTES // (self._width * self.dtype.itemsize))
        buffer = np.empty((min(strip, self._height), self._width), self.dtype)
        at = start
        while at < stop:
            row = at // self._height
            high = min(at + len(buffer), (row + 1) * self._height, stop)
            part = buffer[: high - at]
            self._read([part.data], row, column, at, high)
            yield at, high, part
            at = high

    def _read(self, pieces: list, row: int, column: int, low: int, high: int) -> None:
        """Rows `low:high`, which lie in the chunk at (row, column), into buffers that take one after the other."""
        offset = self._offsets.get((row, column))
        if offset is None:
            raise ValueError(f"rows {low} to {high - 1} were never written")
        row_bytes = self._width * self.dtype.itemsize
        offset += (low - row * self._height) * row_bytes
        if os.preadv(self._fd, pieces, offset) == (high - low) * row_bytes:
            return
        for piece in (memoryview(each).cast("B") for each in pieces):  # one call may read less than it was asked to
            if read_into(self._fd, piece, offset) != len(piece):
                raise ValueError(f"rows {low} to {high - 1} lie outside of the file")
            offset += len(piece)

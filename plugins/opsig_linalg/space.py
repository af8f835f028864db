"""The handful of operations on long vectors by which the solvers of this package work, and numpy's of them.

P numbers of a vector, n rows, k combinations, c others. Sums over P are float64: float32 sums of long vectors lose
digits that a residual needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

Vector = Any
"""(P,) numbers of a backend's own kind, wherever it keeps them; a matrix (n, P) yields such rows."""
PIECE = 1 << 14
"""Columns that are turned into float64 at a time: a block of so many fits a processor's cache."""


class Rows(Protocol):
    """Vectors that are taken in one by one, and never copied."""

    def put(self, *rows: Vector) -> Vector:
        """Take in more, one or two at a time; they as they are held, (m, P)."""
        ...

    def products(self, others: Vector, first: int = 0, every: int = 1) -> np.ndarray:
        """Inner products (n, c) float64 with others (c, P), of every so many rows from the first on."""
        ...

    def combine(self, coefficients: np.ndarray, first: int = 0, every: int = 1) -> Vector:
        """Combinations (k, P) of rows by coefficients (n, k), of every so many rows from the first on."""
        ...

    def keep(self, count: int) -> None:
        """Forget all rows but the first so many, which are those it began with."""
        ...


class Space(Protocol):
    """Vectors of one size, precision and place. None of its operations changes a vector.

    `size` is P, `precision` the unit of rounding (2**-23 for float32), `itemsize` the bytes of a number.
    """

    size: int
    precision: float
    itemsize: int

    def rows(self, known: Vector | None = None) -> Rows:
        """Rows that begin with known ones (m, P), which may come from another place."""
        ...

    def noise(self, seed: int) -> Iterator[Vector]:
        """Random vectors of unit length, the same for one seed."""
        ...

    def norm(self, vector: Vector) -> float:
        """Euclidean length."""
        ...

    def divided(self, vector: Vector, number: float) -> Vector:
        """The vector over a number."""
        ...

    def less(self, vector: Vector, other: Vector) -> Vector:
        """The difference of two."""
        ...

    def normalised(self, rows: Vector) -> Vector:
        """Rows (n, P), each over its length."""
        ...

    def combined(self, coefficients: np.ndarray, rows: Vector) -> Vector:
        """The combination (P,) of rows (n, P) by coefficients (n,)."""
        ...


class NumpySpace:
    """Vectors in numpy arrays, of float32 or float64.

    >>> space = NumpySpace(2, np.float64)
    >>> rows = space.rows()
    >>> _ = rows.put(np.array([3.0, 4.0]), np.array([0.0, 2.0]))
    >>> rows.products(np.array([[1.0, 1.0]])).tolist(), space.norm(np.array([3.0, 4.0]))
    ([[7.0], [2.0]], 5.0)
    """

    def __init__(self, size: int, dtype: Any):
        self.size = size
        self.dtype = np.dtype(dtype)
        self.precision = float(np.finfo(self.dtype).eps)
        self.itemsize = self.dtype.itemsize

    def rows(self, known: Vector | None = None) -> NumpyRows:
        """Rows that begin with known ones."""
        return NumpyRows(np.empty((0, self.size), self.dtype) if known is None else known.astype(self.dtype))

    def noise(self, seed: int) -> Iterator[np.ndarray]:
        """Random vectors of unit length."""
        generator = np.random.default_rng(seed)
        while True:
            noise = generator.standard_normal(self.size, dtype=np.float32)
            yield (noise / self.norm(noise)).astype(self.dtype)

    def norm(self, vector: np.ndarray) -> float:
        """Euclidean length."""
        return float(np.sqrt(inner(vector[None], vector[None])[0, 0]))

    def divided(self, vector: np.ndarray, number: float) -> np.ndarray:
        """The vector over a number."""
        return vector / self.dtype.type(number)

    def less(self, vector: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The difference of two."""
        return vector - other

    def normalised(self, rows: np.ndarray) -> np.ndarray:
        """Rows, each over its length."""
        return np.stack([self.divided(row, self.norm(row)) for row in rows])

    def combined(self, coefficients: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The combination of rows by coefficients."""
        return coefficients.astype(self.dtype) @ rows


class NumpyRows:
    """Rows of numpy arrays. What is taken in must not be changed afterwards."""

    def __init__(self, first: np.ndarray):
        self._like = first
        self._rows = list(first)

    def put(self, *rows: np.ndarray) -> np.ndarray:
        """Take in more."""
        self._rows.extend(rows)
        return np.stack(rows)

    def products(self, others: np.ndarray, first: int = 0, every: int = 1) -> np.ndarray:
        """Inner products with others."""
        return inner(self._rows[first::every], others)

    def combine(self, coefficients: np.ndarray, first: int = 0, every: int = 1) -> np.ndarray:
        """Combinations of rows."""
        rows = self._rows[first::every]
        found = np.zeros((coefficients.shape[1], self._like.shape[1]), self._like.dtype)
        mixing = coefficients.T.astype(found.dtype)
        for start in range(0, found.shape[1], PIECE) if rows else ():
            piece = slice(start, start + PIECE)
            found[:, piece] = mixing @ np.stack([row[piece] for row in rows])
        return found

    def keep(self, count: int) -> None:
        """Forget all rows but the first so many."""
        del self._rows[count:]


def inner(rows: Any, others: Any) -> np.ndarray:
    """Inner products (n, c) of rows (n, P) with others (c, P), summed in float64 over float64 copies of PIECE columns.

    >>> inner(np.ones((1, 40_000), np.float32), np.ones((2, 40_000), np.float32)).tolist()
    [[40000.0, 40000.0]]
    """
    total = np.zeros((len(rows), len(others)))
    size = len(others[0]) if len(others) else 0
    for start in range(0, size, PIECE) if len(rows) else ():
        piece = slice(start, start + PIECE)
        left = np.array([row[piece] for row in rows], np.float64)
        right = left if others is rows else np.array([other[piece] for other in others], np.float64)
        total += left @ right.T
    return total

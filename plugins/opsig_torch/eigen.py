"""The shared eigensolver (`opsig_linalg.eigen`) on torch's vectors, wherever they lie. P parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from opsig_linalg import eigen
from opsig_linalg.eigen import LIMIT, Memory, Solution

from opsig_torch.rows import Rows

AT_ONCE = 1 << 22
"""Random numbers that are drawn at a time in float64."""


class TorchSpace:
    """Vectors of the size, precision and device of one, which is not kept; see `opsig_linalg.space.Space`."""

    def __init__(self, like: torch.Tensor):
        self._empty = like.new_empty(0, like.numel())
        self.size = like.numel()
        self.precision = torch.finfo(like.dtype).eps
        self.itemsize = like.element_size()

    def rows(self, known: torch.Tensor | None = None) -> Rows:
        """Rows that begin with known ones, (m, P)."""
        return Rows(self._empty if known is None else known.to(self._empty))

    def noise(self, seed: int) -> Iterator[torch.Tensor]:
        """Random vectors of unit length, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._random(generator)

    def norm(self, vector: torch.Tensor) -> float:
        """Euclidean length."""
        return float(torch.linalg.vector_norm(vector, dtype=torch.float64))

    def divided(self, vector: torch.Tensor, number: float) -> torch.Tensor:
        """The vector over a number."""
        return vector / number

    def less(self, vector: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The difference of two."""
        return vector - other

    def normalised(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (n, P), each over its length."""
        return rows / torch.stack([torch.as_tensor(self.norm(row)) for row in rows]).to(rows)[:, None]

    def combined(self, coefficients: np.ndarray, rows: torch.Tensor) -> torch.Tensor:
        """The combination (P,) of rows (n, P)."""
        return torch.from_numpy(coefficients).to(rows) @ rows

    def _random(self, generator: torch.Generator) -> torch.Tensor:
        if self.size <= AT_ONCE:
            noise = torch.randn(self.size, generator=generator, dtype=torch.float64)
            return (noise / noise.norm()).to(self._empty)
        found, square = self._empty.new_empty(self.size), 0.0
        for piece in found.split(AT_ONCE):
            noise = torch.randn(piece.shape, generator=generator, dtype=torch.float64)
            square += float(noise.square().sum())
            piece.copy_(noise)
        return found.div_(square**0.5)


def top_eigenpairs(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, count: int, tolerance: float,
    limit: int = LIMIT, memory: Memory | None = None,
) -> Solution:  # fmt: skip
    """The `count` most positive eigenpairs of a product, from a nonzero (P,) `start`; see `opsig_linalg.eigen`."""
    return eigen.top_eigenpairs(TorchSpace(start), product, start, count, tolerance, limit, memory)


def random_start(like: torch.Tensor, seed: int) -> torch.Tensor:
    """A random unit vector of this shape, drawn on the CPU."""
    return next(TorchSpace(like).noise(seed)).view(like.shape)

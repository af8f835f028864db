"""The most positive eigenvalue of many symmetric operators at once, each known only by its products.

b operators of P dimensions, a of them not done yet, j basis vectors each. Lanczos's method with thick restarts
(Wu & Simon 2000): all operators go in step, and those that are done drop out. Basis vectors are made orthogonal twice
over, and every entry of the projected matrix is an inner product: a Ritz value is a Rayleigh
quotient then, which no eigenvalue is below, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from opsig_torch.rows import PIECE

ROOM = 24
"""Basis vectors at which each basis is cut back to the better half."""
CONFIRMED = 3
"""Steps in a row at which the residual is met before an operator is done. What overtakes the eigenvalue that was found
shows in them: where two lie close, a start may hold so little of the upper one that the lower one converges first."""
EXHAUSTED = 10
"""A space is exhausted where what is left of an image is shorter than so many units of precision of the operator."""
DONE_SHARE = 0.25
"""Share of the held operators that are done at which these are let go of: it takes a copy of the others' bases."""


@dataclass(frozen=True)
class Largest:
    """`values` (b,); `residuals` (b,), |Hv - av| over the largest size of an eigenvalue that was seen; `products` (b,).

    NaN for an operator that is not finite.
    """

    values: np.ndarray
    residuals: np.ndarray
    products: np.ndarray


def largest_eigenvalues(
    product: Callable[[torch.Tensor, np.ndarray], torch.Tensor], start: torch.Tensor, tolerance: float, limit: int
) -> Largest:
    """The most positive eigenvalues to the `tolerance` of residuals, or as near as `limit` products come.

    `product(vectors, rows)`: images (a, P) of vectors (a, P) under the operators of these numbers, (a,) integers.
    `start`: (b, P), each with some part along every eigenvector. Memory: ROOM + 4 vectors for each operator.

    >>> diagonals = torch.tensor([[3.0, -9.0, 1.0], [-2.0, -1.0, -4.0]], dtype=torch.float64)
    >>> found = largest_eigenvalues(lambda v, rows: diagonals[rows] * v, torch.ones_like(diagonals), 1e-8, 50)
    >>> found.values.round(6).tolist(), found.products.tolist()
    ([3.0, -1.0], [3, 3])
    """
    count, size = start.shape
    found = Largest(np.full(count, np.nan), np.full(count, np.nan), np.zeros(count, np.int64))
    rows = np.arange(count)  # numbers of the operators that are held
    active = np.ones(count, bool)  # which of these are not done
    basis = start.new_empty(ROOM + 1, count, size)
    basis[0] = start / _norms(start)[:, None].to(start)
    matrices = np.zeros((count, ROOM, ROOM))
    largest = np.zeros(count)  # size of an eigenvalue of each
    met = np.zeros(count, np.int64)  # steps in a row
    precision = torch.finfo(start.dtype).eps
    held = 0
    for step in range(1, limit + 1):
        image = product(basis[held], rows)
        matrices[:, : held + 1, held], rest = _project(basis[: held + 1], image)
        held += 1
        active &= np.isfinite(matrices[:, :held, held - 1]).all(1) & np.isfinite(rest)
        values, ritz = np.linalg.eigh(np.where(active[:, None, None], matrices[:, :held, :held], 0), "U")
        largest = np.maximum(largest, np.abs(values).max(1))
        residuals = rest * np.abs(ritz[:, -1, -1]) / np.maximum(largest, np.finfo(float).tiny)
        residuals = np.maximum(residuals, np.where(largest > 0, precision, 0))
        met = np.where(residuals <= tolerance, met + 1, 0)
        ended = active & ((met >= CONFIRMED) | (rest <= EXHAUSTED * precision * largest) | (step in (limit, size)))
        for target, new in ((found.values, values[:, -1]), (found.residuals, residuals)):
            target[rows[ended]] = new[ended]
        found.products[rows[ended]] = step
        active = active & ~ended
        if not active.any():
            break
        basis[held] = image * torch.from_numpy(np.where(active, 1 / np.where(active, rest, 1), 0)).to(image)[:, None]
        if active.mean() <= 1 - DONE_SHARE:
            kept = np.flatnonzero(active)
            basis = basis[:, torch.from_numpy(kept).to(basis.device)]
            matrices, values, ritz = matrices[kept], values[kept], ritz[kept]
            rows, largest, met = rows[kept], largest[kept], met[kept]
            active = np.ones(len(rows), bool)
        if held == ROOM:
            held = _cut_back(basis, matrices, values, ritz)
    return found


def _project(basis: torch.Tensor, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Inner products (a, j) of images (a, P) with bases (j, a, P), and the length of what is left of the images, (a,).

    What lies along the bases is taken out of the images, in place.
    """
    total = torch.zeros(basis.shape[1], len(basis), dtype=torch.float64, device=basis.device)
    for _ in range(2):
        along = _inner_products(basis, image)
        image -= torch.bmm(along[:, None].to(image), basis.transpose(0, 1))[:, 0]
        total += along
    return total.cpu().numpy(), _norms(image).cpu().numpy()


def _cut_back(basis: torch.Tensor, matrices: np.ndarray, values: np.ndarray, ritz: np.ndarray) -> int:
    """Put the better half of the Ritz vectors in the place of the bases, the next vector after them; their number."""
    kept = ROOM // 2
    best = torch.from_numpy(np.ascontiguousarray(ritz[:, :, -kept:])).to(basis)
    basis[:kept] = torch.bmm(best.transpose(1, 2), basis[:ROOM].transpose(0, 1)).transpose(0, 1)
    basis[kept] = basis[ROOM]
    matrices[:] = 0
    matrices[:, np.arange(kept), np.arange(kept)] = values[:, -kept:]
    return kept


def _inner_products(basis: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Inner products of bases (j, a, P) with vectors (a, P), (a, j) float64."""
    total = torch.zeros(len(vectors), len(basis), dtype=torch.float64, device=vectors.device)
    for first in range(0, vectors.shape[1], PIECE):
        piece = slice(first, first + PIECE)
        total += torch.bmm(basis[:, :, piece].transpose(0, 1), vectors[:, piece, None])[..., 0].double()
    return total


def _norms(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)

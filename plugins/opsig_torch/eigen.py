"""The most positive eigenpairs of a symmetric operator that is known only by its products.

P parameters, K eigenpairs, m steps taken. Single-vector Lanczos with full, double reorthogonalisation. Order is
algebraic: an eigenvalue that is largest in size but negative is never taken for the sharpness. Sums over parameters are
float64, because float32 sums of long vectors lose digits that the residual needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

LIMIT = 200
"""Products after which a solve gives up and says so."""
PIECE = 1 << 20
SMALLEST_TOLERANCE = 1e-5
"""A float32 product is good to about 5e-7; residuals below this would be noise."""
LOOK_ABOUT = 3
"""Products beyond the number of eigenpairs before a solve may end."""


@dataclass(frozen=True)
class Solution:
    """The K most positive eigenpairs: `values` (K,) decreasing, `vectors` (K, P) of unit length, `residuals` (K,).

    A residual is |Hv - av| / |a|. `products` is what the solve cost; `converged` whether all residuals reached the
    tolerance.
    """

    values: np.ndarray
    vectors: torch.Tensor
    residuals: np.ndarray
    products: int
    converged: bool


def top_eigenpairs(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, count: int, tolerance: float,
    limit: int = LIMIT,
) -> Solution:  # fmt: skip
    """Solve for the `count` most positive eigenpairs to the relative `tolerance`, from a nonzero (P,) `start`.

    Raises ValueError for a tolerance that the start's precision cannot reach.

    >>> diagonal = torch.tensor([3.0, -9.0, 1.0, 2.0], dtype=torch.float64)
    >>> found = top_eigenpairs(lambda v: diagonal * v, torch.ones(4, dtype=torch.float64), 2, 1e-8)
    >>> found.values.round(6).tolist()
    [3.0, 2.0]
    """
    if start.dtype == torch.float32 and tolerance < SMALLEST_TOLERANCE:
        raise ValueError(f"a tolerance of {tolerance:g} cannot be met in float32. Use {SMALLEST_TOLERANCE:g} or more")
    size = start.numel()
    count = min(count, size)
    room = min(limit, size, max(16, 4 * count))
    basis = start.new_empty(room, size)
    basis[0] = start / _norm(start)
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        step = len(diagonal)
        image = product(basis[step])
        scale = _norm(image)
        diagonal.append(float(_products(basis[step : step + 1], image)[0]))
        for _ in range(2):  # once leaves what float32 rounds off
            _remove(basis[: step + 1], image)
        remainder = _norm(image)
        exhausted = step + 1 == size or remainder <= 10 * torch.finfo(start.dtype).eps * scale
        values, ritz = _ritz(diagonal, beside, count + 1)
        errors = np.zeros(len(values)) if exhausted else remainder * np.abs(ritz[-1])
        # the next eigenvalue must not be on its way past these: a warm start hardly sees what overtook the last one
        overtaken = len(values) > count and values[count] + errors[count] > values[count - 1]
        values, ritz, errors = values[:count], ritz[:, :count], errors[:count]
        residuals = errors / np.maximum(np.abs(values), 1e-300)
        converged = len(values) == count and bool((residuals <= tolerance).all()) and not overtaken
        if (converged and step >= count + LOOK_ABOUT) or step + 1 == limit or exhausted:
            break
        beside.append(remainder)
        if step + 1 == len(basis):
            basis = torch.cat([basis, basis.new_empty(min(len(basis), limit - len(basis), size - len(basis)), size)])
        basis[step + 1] = image / remainder
    weights = torch.from_numpy(ritz.T.copy()).to(basis)
    vectors = weights @ basis[: len(diagonal)]
    vectors /= torch.stack([torch.as_tensor(_norm(v)) for v in vectors]).to(vectors)[:, None]
    return Solution(values, vectors, residuals, len(diagonal), converged)


def lanczos_matrix(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, steps: int
) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of the (m, m) tridiagonal matrix after `steps` steps, fewer where the space ends."""
    basis = start.new_empty(steps, start.numel())
    basis[0] = start / _norm(start)
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        image = product(basis[step])
        scale = _norm(image)
        diagonal.append(float(_products(basis[step : step + 1], image)[0]))
        for _ in range(2):
            _remove(basis[: step + 1], image)
        remainder = _norm(image)
        if step + 1 == steps or remainder <= 10 * torch.finfo(start.dtype).eps * scale:
            break
        beside.append(remainder)
        basis[step + 1] = image / remainder
    return diagonal, beside


def random_start(like: torch.Tensor, seed: int) -> torch.Tensor:
    """A random unit vector of this shape, drawn on the CPU."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise / noise.norm()).to(like)


def _ritz(diagonal: list[float], beside: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues of the tridiagonal matrix, decreasing, and its eigenvectors (m, K)."""
    from scipy.linalg import eigh_tridiagonal

    size = len(diagonal)
    first = max(0, size - count)
    values, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside), select="i", select_range=(first, size - 1))
    return values[::-1].copy(), vectors[:, ::-1].copy()


def _remove(basis: torch.Tensor, vector: torch.Tensor) -> None:
    """Take out of the vector, in place, what lies along the basis."""
    vector -= _products(basis, vector).to(vector) @ basis


def _products(basis: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Inner products with the rows of the basis, (m,) float64."""
    total = torch.zeros(len(basis), dtype=torch.float64, device=basis.device)
    for first in range(0, vector.numel(), PIECE):
        piece = slice(first, first + PIECE)
        total += basis[:, piece].double() @ vector[piece].double()
    return total


def _norm(vector: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))

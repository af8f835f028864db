"""The most positive eigenpairs of a symmetric operator without a memory, with no more vectors than there is room for.

P parameters, K eigenpairs, N basis vectors. Lanczos's method with thick restarts (Wu & Simon 2000): a full basis is cut
back to its best Ritz vectors, in place. Where `opsig_linalg.eigen` keeps two vectors for each product, this keeps one.
A vector is made orthogonal twice over where once would leave more than rounding of what others lack in that, which
grows from step to step where the eigenvalues lie to one side of zero. Every entry of the projected matrix is an inner
product, summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from opsig_linalg.eigen import CONFIRMED, LIMIT, LOOK_ABOUT, SEED, Memory, Solution, require_reachable

from opsig_torch.arithmetic import narrow
from opsig_torch.eigen import TorchSpace
from opsig_torch.rows import inner

PIECE = 1 << 16
"""Columns that are rotated at a time."""
ASKEW = 32
"""Units of precision up to which inner products of two basis vectors pass for 0."""
EXHAUSTED = 10
"""A space is exhausted where what is left of an image is shorter than so many units of precision of the operator."""


def least_room(count: int) -> int:
    """The fewest basis vectors with which `count` eigenpairs are found: those kept, and as many to look about."""
    return 2 * count + 3


def top_eigenpairs(
    product: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, count: int, tolerance: float, room: int,
    limit: int = LIMIT, remembered: int = 0,
) -> Solution:  # fmt: skip
    """Solve for the `count` most positive eigenpairs to the relative `tolerance`, from a nonzero (P,) `start`.

    Memory: `room` vectors and the one that the product makes. `room` is at least `least_room(count)`. Raises
    ValueError for a tolerance that the start's
    precision cannot reach, and for products that are not finite. `start` is used up. The solution's memory has
    `remembered` Ritz vectors, or one more than there are eigenpairs.

    >>> diagonal = torch.arange(-50.0, 50.0, dtype=torch.float64)
    >>> found = top_eigenpairs(lambda v: diagonal * v, torch.ones(100, dtype=torch.float64), 2, 1e-8, 8)
    >>> found.values.round(6).tolist(), bool(found.products > 8)
    ([49.0, 48.0], True)
    """
    require_reachable(TorchSpace(start), tolerance)
    size = start.numel()
    count = min(count, size)
    room = min(room, size)
    basis = start.new_empty(room, size)
    matrix = np.zeros((room, room))
    askew = np.zeros((room, room))  # bounds on the inner products of every two basis vectors
    noise = TorchSpace(start).noise(SEED)
    precision = torch.finfo(start.dtype).eps
    image = start
    del start  # as of the image below: a product is made while no other vector than the basis is held
    rest, held, products, largest, unit = _norm(image), 0, 0, 0.0, 1.0
    found = 0  # products since all are
    while True:
        torch.div(image, rest, out=basis[held])
        del image
        image = product(basis[held])
        if products == 0:
            unit = _norm(image) or 1.0  # of all that has the operator's: squares must not leave float32's range
        image.div_(unit)
        products += 1
        held += 1
        column, rest, beside = _make_orthogonal(image, basis[:held], askew[:held, :held])
        if not np.isfinite(column).all():
            raise ValueError(
                "the Hessian is not finite at this checkpoint: the run has diverged. Choose others with --steps"
            )
        matrix[:held, held - 1] = matrix[held - 1, :held] = column
        values, ritz = np.linalg.eigh(matrix[:held, :held])
        values, ritz = values[::-1], ritz[:, ::-1]
        largest = max(largest, float(np.abs(values).max()))
        errors = rest * np.abs(ritz[-1])
        residuals = errors[:count] / np.maximum(np.abs(values[:count]), 1e-300)
        exhausted = held >= size
        overtaken = held > count and values[count] + errors[count] > values[count - 1]
        met = held >= count and bool((residuals <= tolerance).all()) and not overtaken
        found = found + 1 if met else 0
        confirmed = found > CONFIRMED
        if (confirmed and products > count + LOOK_ABOUT) or products == limit or exhausted:
            break
        if held == room:
            kept = max(count + 1, room // 2)
            _rotate(basis, ritz[:, :kept])
            matrix[:] = 0
            matrix[range(kept), range(kept)] = values[:kept]
            askew[:kept, :kept] = np.abs(inner(basis[:kept], basis[:kept]) - np.eye(kept))
            beside = np.full(kept, np.linalg.norm(beside))
            held = kept
        if rest <= EXHAUSTED * precision * largest:  # equal eigenvalues' other vectors are in another space than this
            rest = 0.0
            while rest <= EXHAUSTED * precision:
                image = next(noise)
                _, rest, beside = _make_orthogonal(image, basis[:held], askew[:held, :held])
        if held < room:
            askew[:held, held] = askew[held, :held] = beside
    kept = min(max(count + 1, remembered), held)
    _rotate(basis[:held], ritz[:, :kept])
    for vector in basis[:kept]:
        vector /= _norm(vector)
    memory = Memory(basis[:kept].clone(), unit * values[:kept])  # without what the rest of the basis takes
    return Solution(memory.values[:count], memory.vectors[:count], residuals, products, met or exhausted, memory)


def _rotate(basis: torch.Tensor, coefficients: np.ndarray) -> None:
    """Put combinations of the rows, by coefficients (N, k), in the place of the first k, a few columns at a time."""
    mixing = torch.from_numpy(coefficients.T.copy()).to(basis)
    for first in range(0, basis.shape[1], PIECE):
        piece = basis[: len(coefficients), first : first + PIECE]
        piece[: len(mixing)] = mixing @ piece


def _make_orthogonal(
    vector: torch.Tensor, basis: torch.Tensor, askew: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:  # fmt: skip
    """Take from the vector, in place, what lies along the basis, whose inner products are at most `askew` (N, N); that,
    (N,), the length of what is left, and bounds (N,) on its inner products, at unit length, with the basis."""
    column = np.zeros(len(basis))
    precision = torch.finfo(vector.dtype).eps
    while True:
        along = inner(basis, vector[None])[:, 0]
        with narrow():
            vector.addmv_(basis.T, torch.from_numpy(along).to(vector), alpha=-1)
        column += along
        rest, taken = _norm(vector), float(np.linalg.norm(along))
        # what is taken along one vector has a part along the others, and is rounded
        beside = (askew @ np.abs(along) + precision * (taken + rest)) / max(rest, 1e-300)
        if not (beside > ASKEW * precision).any():
            return column, rest, beside


def _norm(vector: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))

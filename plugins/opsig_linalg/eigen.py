"""The most positive eigenpairs of a symmetric operator that is known only by its products.

P parameters, K eigenpairs, N basis vectors, R remembered vectors. A Davidson method whose next direction is an
eigenvector of a model of the operator: of what its products have shown, and, away from those, of what was remembered
from a checkpoint near by. Without a memory the model sees nothing but the products, and the method is Lanczos's, fully
reorthogonalised. Order is algebraic: an eigenvalue that is largest in size but negative is never taken
for the sharpness. Sums over parameters are float64, because float32 sums of long vectors lose digits that the residual
needs. What is done with long vectors is a space's (`opsig_linalg.space`): numpy's, or a backend's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opsig_linalg.space import Space, Vector

LIMIT = 200
"""Products after which a solve gives up and says so."""
ROOM = 40
"""Basis vectors, beyond four for each eigenpair, at which the basis is cut back to the best ones."""
SINGLE = 1e-7
"""Unit of rounding from which on numbers are taken for float32."""
SMALLEST_TOLERANCE = 1e-5
"""A float32 product is good to about 5e-7; residuals below this would be noise."""
SEED = 2311
"""Of random directions; not one that a start is drawn from."""
WHOLE = 64
"""Parameters up to which several eigenpairs are looked for in the whole space: equal eigenvalues, as those of a linear
model for several outputs, lie in no one vector's Krylov space."""
LOOK_ABOUT = 2
"""Products beyond the number of eigenpairs before a solve may end."""
CONFIRMED = 2
"""Further products through which eigenpairs must stay found, of a solve without a memory or for several: where the
start hardly contains one, the next below takes its place with a small residual for a product or two."""
REMEMBERED = 8
"""R: vectors of the model that are kept for the next checkpoint, or one more than there are eigenpairs. Twice as many
save no product of a single one's, and cost as much as two of a small model's."""
REMEMBERED_BYTES = 1 << 30
"""Bound on what they take."""
NOVELTY, KNOWN_NOVELTY = 0.3, 0.1
"""Random part of a start, against a length of 1 for the rest, without and with a memory: what neither memory nor
gradient shows must be seen. The eigenvector of a checkpoint near by is nearer than the gradient is."""
DEPENDENT = 1e-7
"""Directions whose share in the Gram matrix is below this are rounding."""
CANCELLED = 3e-3
"""Relative residuals below which inner products in float32 leave it fewer than three digits."""
ROUNDING = 1e3
"""A unit vector's rest outside of the basis is rounding where it is shorter than so many units of precision."""


@dataclass(frozen=True)
class Memory:
    """A low-rank model of the operator: orthonormal `vectors` (R, P) and `values` (R,)."""

    vectors: Vector
    values: np.ndarray

    def start(self, space: Space, count: int) -> Vector:
        """Where to look for `count` eigenpairs: the model's, by their values, with the one that may overtake them; of a
        single one itself, as a solve for one has the others in its model."""
        best = np.argsort(-self.values)[: count + (count > 1)]
        weights = np.maximum(self.values[best], 0) / max(self.values[best[0]], 1e-300)
        return space.combined(weights, self.vectors[best])


@dataclass(frozen=True)
class Solution:
    """The K most positive eigenpairs: `values` (K,) decreasing, `vectors` (K, P) of unit length, `residuals` (K,).

    A residual is |Hv - av| / |a|. `products` is what the solve cost; `converged` whether all residuals reached the
    tolerance. `memory` is for a solve near by.
    """

    values: np.ndarray
    vectors: Vector
    residuals: np.ndarray
    products: int
    converged: bool
    memory: Memory


def top_eigenpairs(
    space: Space, product: Callable[[Vector], Vector], start: Vector, count: int, tolerance: float,
    limit: int = LIMIT, memory: Memory | None = None,
) -> Solution:  # fmt: skip
    """Solve for the `count` most positive eigenpairs to the relative `tolerance`, from a nonzero (P,) `start`.

    Memory: two vectors for each of ROOM + 4 K basis vectors at the most, and R. Raises ValueError for a tolerance that
    the space's precision cannot reach, and for products that are not finite.

    >>> from opsig_linalg.space import NumpySpace
    >>> diagonal = np.array([3.0, -9.0, 1.0, 2.0])
    >>> found = top_eigenpairs(NumpySpace(4, np.float64), lambda v: diagonal * v, np.ones(4), 2, 1e-8)
    >>> found.values.round(6).tolist()
    [3.0, 2.0]
    """
    require_reachable(space, tolerance)
    size = space.size
    count = min(count, size)
    whole = count > 1 and size <= WHOLE
    search = _Search(space, memory, size if whole else min(size, ROOM + 4 * count))
    direction = space.divided(start, space.norm(start))
    further = CONFIRMED if memory is None or count > 1 else 0
    found = 0  # products since all are
    while True:
        search.add(direction, product)
        values, residuals, errors = search.pairs(count + 1)
        exhausted = search.size == size
        # the next eigenvalue must not be on its way past these: a warm start hardly sees what overtook the last one
        overtaken = len(values) > count and values[count] + errors[count] > values[count - 1]
        values, residuals = values[:count], residuals[:count]
        converged = len(values) == count and bool((residuals <= tolerance).all()) and not overtaken
        found = found + 1 if converged else 0
        enough = found > further and search.products > count + LOOK_ABOUT
        if (enough and not whole) or search.products == limit or exhausted:
            break
        wanted = np.flatnonzero(residuals > tolerance)
        if len(wanted) and residuals.max() < DEPENDENT**0.5:  # the model has no digits left
            direction = search.residual(int(residuals.argmax()))
        else:
            direction = search.next_direction(wanted if len(wanted) else np.arange(count + 1))
    vectors = search.vectors(count)
    return Solution(values, vectors, residuals, search.products, converged or exhausted, search.remember(count))


def novelty(memory: Memory | None) -> float:
    """The random part of a start."""
    return NOVELTY if memory is None else KNOWN_NOVELTY


def require_reachable(space: Space, tolerance: float) -> None:
    """Raise ValueError for a tolerance that the space's precision cannot reach."""
    if space.precision > SINGLE and tolerance < SMALLEST_TOLERANCE:
        raise ValueError(f"a tolerance of {tolerance:g} cannot be met in float32. Use {SMALLEST_TOLERANCE:g} or more")


class _Search:
    """A remembered model (Q, q), the basis V and its images W = H V, and the Gram matrix of them all in float64.

    Rows lie in the order Q, v_1, w_1, v_2, w_2, ... All that the search decides, it decides by the Gram matrix: long
    vectors are only multiplied once, as they come, and combined into the next direction.
    """

    def __init__(self, space: Space, memory: Memory | None, room: int):
        self._space = space
        self._known = 0 if memory is None else len(memory.vectors)
        self._values = np.empty(0) if memory is None else memory.values
        self._unit = 0.0  # in which images are held, that of the first: their squares must not leave float32's range
        self._room = room
        self._rows = space.rows(None if memory is None else memory.vectors)
        self._gram = np.eye(self._known)
        self._noise = space.noise(SEED)
        self.products = 0

    @property
    def size(self) -> int:
        """N, the number of basis vectors."""
        return (len(self._gram) - self._known) // 2

    def add(self, direction: Vector, product: Callable[[Vector], Vector]) -> None:
        """Take what of the direction (P,), of about unit length, is orthogonal to the basis into it, as it is or, where
        that is rounding, a random one."""
        if self.size == self._room:
            self._cut_back()
        vector = self._apart(direction)
        while vector is None:
            vector = self._apart(next(self._noise))
        image = product(vector)
        length = self._space.norm(image)
        if not np.isfinite(length):
            raise ValueError(
                "the Hessian is not finite at this checkpoint: the run has diverged. Choose others with --steps"
            )
        if not self._unit:
            self._unit = length or 1.0
            self._values = self._values / self._unit
        self._put(vector, self._space.divided(image, self._unit))
        self.products += 1
        self._ritz_values, self._ritz = np.linalg.eigh((self._vw + self._vw.T) / 2)

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The largest Ritz values, decreasing, with their residuals, relative and absolute.

        Lengths of combinations come from the Gram matrix, and where that has no digits left from the combinations.
        """
        values = self._ritz_values[::-1][:count].copy()
        coefficients = self._residuals(len(values))
        gram = self._gram[self._known :, self._known :]
        errors = np.sqrt(np.maximum(np.einsum("nk,nm,mk->k", coefficients, gram, coefficients), 0))
        for rank in np.flatnonzero(errors < CANCELLED * np.abs(values)):
            errors[rank] = self._space.norm(self._rows.combine(coefficients[:, [rank]], self._known)[0])
        errors = np.maximum(errors, self._space.precision * np.abs(values))  # what combining the rows in it would leave
        return self._unit * values, errors / np.maximum(np.abs(values), 1e-300), self._unit * errors

    def residual(self, rank: int) -> Vector:
        """Hv - av of one of the largest Ritz pairs, over its length, (P,)."""
        found = self._rows.combine(self._residuals(rank + 1)[:, [rank]], self._known)[0]
        return self._space.divided(found, self._space.norm(found))

    def next_direction(self, ranks: np.ndarray) -> Vector:
        """Of the model's eigenvectors of these ranks the one that is least in the basis: what it has outside, (P,)."""
        coordinates, _, vectors = self._model()
        ranks = ranks[ranks < vectors.shape[1]]
        found = coordinates @ vectors[:, vectors.shape[1] - 1 - ranks]
        found[self._known :: 2] -= self._gram[self._known :: 2] @ found
        outside = np.einsum("nk,nm,mk->k", found, self._gram, found)
        return self._rows.combine(found[:, [outside.argmax()]])[0]

    def vectors(self, count: int) -> Vector:
        """The largest Ritz vectors, (K, P), of unit length."""
        return self._space.normalised(self._rows.combine(self._ritz[:, ::-1][:, :count], self._known, 2))

    def remember(self, count: int) -> Memory:
        """The model's eigenpairs of largest size, for a solve for `count` of them."""
        coordinates, values, vectors = self._model()
        fits = REMEMBERED_BYTES // (self._space.itemsize * self._space.size)
        rank = max(1, min(max(REMEMBERED, count + 1), fits))
        kept = np.argsort(-np.abs(values))[:rank]
        return Memory(self._rows.combine(coordinates @ vectors[:, kept]), self._unit * values[kept])

    def _residuals(self, count: int) -> np.ndarray:
        """Coefficients (2 N, count) of the largest Ritz pairs' residuals in v_1, w_1, v_2, ..."""
        ritz = self._ritz[:, ::-1][:, :count]
        found = np.empty((2 * self.size, count))
        found[::2] = -self._ritz_values[::-1][:count] * ritz
        found[1::2] = ritz
        return found

    @property
    def _vw(self) -> np.ndarray:
        return self._gram[self._known :: 2, self._known + 1 :: 2]

    def _model(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Coordinates (n, u) of an orthonormal basis of all rows, and the model's eigenpairs in it.

        The model is W V' + V W' - V V'W V' + (I - V V') Q q Q' (I - V V'): the operator itself on V.
        """
        gram, first = self._gram, self._known
        scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
        shares, directions = np.linalg.eigh(gram / np.outer(scale, scale))
        kept = shares > DEPENDENT
        coordinates = directions[:, kept] / np.sqrt(shares[kept]) / scale[:, None]
        along = gram @ coordinates
        v, w = along[first::2], along[first + 1 :: 2]
        rest = along[:first] - gram[:first, first::2] @ v
        model = rest.T @ (self._values[:, None] * rest) + w.T @ v + v.T @ w - v.T @ self._vw @ v
        values, vectors = np.linalg.eigh((model + model.T) / 2)
        return coordinates, values, vectors

    def _apart(self, vector: Vector) -> Vector | None:
        """What of the vector is orthogonal to the basis, of unit length, or None where that is rounding."""
        if self.size:
            along = self._rows.products(vector[None], self._known, 2)
            vector = self._space.less(vector, self._rows.combine(along, self._known, 2)[0])
        length = self._space.norm(vector)
        return self._space.divided(vector, length) if length > ROUNDING * self._space.precision else None

    def _cut_back(self) -> None:
        """Keep the best half of the basis."""
        kept = self._ritz[:, ::-1][:, : self._room // 2]
        vectors, images = (self._rows.combine(kept, self._known + i, 2) for i in (0, 1))
        self._gram = self._gram[: self._known, : self._known]
        self._rows.keep(self._known)
        for vector, image in zip(vectors, images, strict=True):
            self._put(vector, image)

    def _put(self, vector: Vector, image: Vector) -> None:
        products = self._rows.products(self._rows.put(vector, image))
        self._gram = np.block([[self._gram, products[:-2]], [products.T]])


def lanczos_matrix(
    space: Space, product: Callable[[Vector], Vector], start: Vector, steps: int
) -> tuple[list[float], list[float]]:
    """Diagonal and off-diagonal of the (m, m) tridiagonal matrix after `steps` steps, fewer where the space ends."""
    basis = space.rows()
    vector = space.divided(start, space.norm(start))
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        held = basis.put(vector)
        image = product(held[0])
        scale = space.norm(image)
        diagonal.append(float(basis.products(image[None], step)[0, 0]))
        for _ in range(2):
            image = space.less(image, basis.combine(basis.products(image[None]))[0])
        remainder = space.norm(image)
        if step + 1 == steps or remainder <= 10 * space.precision * scale:
            break
        beside.append(remainder)
        vector = space.divided(image, remainder)
    return diagonal, beside

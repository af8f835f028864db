"""Products with the Hessian of the mean loss, its most positive eigenpairs, and curvature of every sample.

S samples, P parameters, K eigenpairs. A product is a forward derivative of the gradient, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from opsig_linalg.eigen import Memory, Solution, lanczos_matrix, novelty, top_eigenpairs

from opsig_cli.errors import OpsigError
from opsig_jax.opened import Opened

PROBES, STEPS = 4, 30


class Hessian:
    """The Hessian of the mean loss at parameters (P,) on the device, as an operator on host vectors (P,).

    `scale` (P,): the operator is diag(scale) H diag(scale). Raises OpsigError where losses are not finite.
    """

    def __init__(self, opened: Opened, vector: jax.Array, scale: np.ndarray | None = None):
        self._opened, self._vector = opened, vector
        self._scale = None if scale is None else scale.astype(opened.dtype)
        self._product = opened.compiled("product", lambda: _product(opened))
        _require_finite(opened, vector)

    def __call__(self, direction: np.ndarray) -> np.ndarray:
        """H v, (P,)."""
        opened = self._opened
        along = opened.put(direction if self._scale is None else direction * self._scale)
        total = None
        for _, batch in opened.batches:
            part = self._product(self._vector, along, batch)
            with opened.computing():
                total = part if total is None else total + part
        found = np.asarray(total) / opened.dtype.type(opened.samples)
        return found if self._scale is None else found * self._scale

    def gradient(self) -> np.ndarray:
        """Gradient of the mean loss, (P,), times the scale."""
        found = gradient(self._opened, self._vector)
        return found if self._scale is None else found * self._scale


def gradient(opened: Opened, vector: jax.Array, weights: np.ndarray | None = None) -> np.ndarray:
    """Gradient of the mean loss, (P,), each sample's times its own of `weights` (S,) where they are given."""

    def make() -> Callable[..., Any]:
        def total(parts: Any, batch: Any, weights: Any) -> Any:
            return (opened.losses_at(parts, batch) * weights).sum()

        return lambda vector, *given: opened.tree.joined(jax.grad(total)(opened.tree.split(vector), *given))

    if weights is None:
        weights = np.ones(opened.samples)
    of_batch, found = opened.compiled("gradient", make), None
    for samples, batch in opened.batches:
        part = of_batch(vector, batch, opened.put(weights[samples]))
        with opened.computing():
            found = part if found is None else found + part
    return np.asarray(found) / opened.dtype.type(opened.samples)


def solve(
    opened: Opened, vector: jax.Array, count: int, tolerance: float, seed: int, memory: Memory | None = None,
    scale: np.ndarray | None = None,
) -> Solution:  # fmt: skip
    """The `count` most positive eigenpairs of the Hessian, from the gradient or what `memory` names, and a random part.

    For a single one the memory is the method's model too. Raises OpsigError for a tolerance that cannot be met, or
    where the Hessian is not finite.
    """
    hessian, space = Hessian(opened, vector, scale), opened.space
    start = hessian.gradient() if memory is None else memory.start(space, count)
    start = space.divided(start, max(space.norm(start), 1e-30))
    start = start + space.dtype.type(novelty(memory)) * next(space.noise(seed))
    try:
        return top_eigenpairs(
            space, hessian, start, count, tolerance, memory=memory if count == 1 else None
        )  # fmt: skip
    except ValueError as error:
        raise OpsigError(str(error)) from error


def spectral_density(opened: Opened, vector: jax.Array) -> tuple[np.ndarray, np.ndarray, float]:
    """Nodes and weights (R, m) whose weighted sums estimate traces of functions of H, and the trace's standard error.

    The weights of all probes sum to P. (Ghorbani et al. 2019, arXiv 1901.10159.)
    """
    hessian, space = Hessian(opened, vector), opened.space
    nodes, weights = np.zeros((2, PROBES, min(STEPS, space.size)))
    for probe in range(PROBES):
        diagonal, beside = lanczos_matrix(space, hessian, next(space.noise(probe)), min(STEPS, space.size))
        matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(matrix)
        nodes[probe, : len(values)] = values
        weights[probe, : len(values)] = vectors[0] ** 2 * space.size / PROBES
    traces = PROBES * (nodes * weights).sum(1)
    return nodes, weights, float(traces.std(ddof=1) / np.sqrt(PROBES))


def curvature_along(opened: Opened, vector: jax.Array, direction: np.ndarray) -> np.ndarray:
    """Loss, slope v'g and curvature v'Hv of every sample along a direction v (P,), (3, S) float64: jvp of jvp."""

    def make() -> Callable[..., Any]:
        def of_batch(vector: Any, direction: Any, batch: Any) -> Any:
            at, along = opened.tree.split(vector), opened.tree.split(direction)

            def losses(parts: Any) -> Any:
                return opened.losses_at(parts, batch)

            def slopes(parts: Any) -> Any:
                return jax.jvp(losses, (parts,), (along,))

            (loss, slope), (_, curvature) = jax.jvp(slopes, (at,), (along,))
            return loss, slope, curvature

        return of_batch

    of_batch, along = opened.compiled("curvature", make), opened.put(direction)
    found = np.full((3, opened.samples), np.nan)
    for samples, batch in opened.batches:
        found[:, samples] = of_batch(vector, along, batch)
    return found


def _product(opened: Opened) -> Callable[..., Any]:
    def product(vector: Any, direction: Any, batch: Any) -> Any:
        def total(parts: Any) -> Any:
            return opened.losses_at(parts, batch).sum()

        at, along = opened.tree.split(vector), opened.tree.split(direction)
        return opened.tree.joined(jax.jvp(jax.grad(total), (at,), (along,))[1])

    return product


def _require_finite(opened: Opened, vector: jax.Array) -> None:
    losses = opened.compiled("losses alone", lambda: lambda v, batch: opened.losses_at(opened.tree.split(v), batch))
    samples, batch = next(iter(opened.batches))
    broken = np.flatnonzero(~np.isfinite(np.asarray(losses(vector, batch))))
    if 0 < len(broken) <= (samples.stop - samples.start) / 2:
        raise OpsigError(
            f"the loss of sample {samples.start + broken[0]} is not finite at this checkpoint, so that the whole loss "
            "has no curvature. Look at this part of the data"
        )
    if len(broken):
        raise OpsigError("losses are not finite at this checkpoint: the run has diverged. Choose others with --steps")

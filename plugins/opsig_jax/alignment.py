"""Norms and inner products of single samples' gradients, in tiles of bounded size. M samples, G sets, P parameters.

A block of gradients is the vmapped gradient of one sample's loss. Where the M x P gradients do not fit TILE_BYTES,
each tile of rows is met by all later ones, whose gradients are made anew: memory for time, and exact either way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from opsig_linalg.space import inner

from opsig_jax.opened import BLOCK_BYTES, Opened

TILE_BYTES = 1 << 29
"""Bound on the gradients that are held at a time, beside a block's."""
VANISHES = 1e-15
"""Norm up to which a gradient has no direction: products of such gradients leave the normal numbers of float32."""


def blocks(opened: Opened, vector: jax.Array, samples: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Gradients (b, P) of chosen samples' losses on the host, a block at a time, with their places among the samples.

    A block is within BLOCK_BYTES; the last is filled up, so that each is of one shape.
    """

    def make() -> Callable[..., Any]:
        def rows(vector: Any, batch: Any) -> Any:
            parts = opened.tree.split(vector)
            one = jax.vmap(jax.grad(opened.sample_loss), in_axes=(None, 0))
            return opened.tree.joined(one(parts, batch))

        return rows

    of_block = opened.compiled("sample gradients", make)
    fits = BLOCK_BYTES // (opened.dtype.itemsize * opened.tree.size)
    size = max(1, min(_block(len(samples)), opened.batches.batch_size, fits))
    for first in range(0, len(samples), size):
        chosen = samples[first : first + size]
        filled = np.concatenate([chosen, np.repeat(chosen[-1:], size - len(chosen))])
        rows = np.asarray(of_block(vector, opened.batches.take(filled)))
        yield slice(first, first + len(chosen)), rows[: len(chosen)]


def _block(count: int) -> int:
    """A power of two, so that few shapes are compiled: all of a few samples, else with at most a fifth filling."""
    return 1 << (count - 1).bit_length() if count <= 32 else 1 << ((count // 4).bit_length() - 1)


def gradient_norms(opened: Opened, vector: jax.Array, samples: np.ndarray) -> np.ndarray:
    """Norm of every chosen sample's gradient, (M,) float64."""
    norms = np.zeros(len(samples))
    for places, rows in blocks(opened, vector, samples):
        norms[places] = _lengths(rows)
    return norms


def gradient_gram(opened: Opened, vector: jax.Array, samples: np.ndarray) -> np.ndarray:
    """Inner products of chosen samples' gradients, (M, M) float64.

    Memory: M x M in float64, TILE_BYTES, and three blocks. Costs a pass over the samples where their gradients fit a
    tile, and half a pass for every tile elsewhere.
    """
    held = max(1, TILE_BYTES // (opened.dtype.itemsize * opened.tree.size))
    gram = np.zeros((len(samples), len(samples)))
    for first in range(0, len(samples), held):
        rows: list[np.ndarray] = []
        for places, block in blocks(opened, vector, samples[first:]):
            if len(rows) < held:
                rows.extend(block[: held - len(rows)])
            here = slice(first + places.start, first + places.stop)
            gram[first : first + len(rows), here] = inner(rows, block)
    return np.triu(gram) + np.triu(gram, 1).T


def mean_cosines(opened: Opened, vector: jax.Array, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
    """Mean cosine of chosen samples' gradients with those of each set of samples, (M, G) float64.

    A gradient that vanishes has no direction: as a member it counts as 0, as a sample it is NaN. Memory: the mean unit
    gradients of as many sets at a time as fit TILE_BYTES, and three blocks.
    """
    at_once = max(1, TILE_BYTES // (8 * opened.tree.size))
    found = np.zeros((len(samples), len(sets)))
    for first in range(0, len(sets), at_once):
        some = sets[first : first + at_once]
        means = np.zeros((len(some), opened.tree.size))
        members = np.unique(np.concatenate(some))
        shares = np.stack([np.isin(members, chosen) / max(1, len(chosen)) for chosen in some])
        for places, rows in blocks(opened, vector, members):
            lengths = directed(_lengths(rows))
            inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=np.isfinite(lengths))
            usable = np.flatnonzero(inverse)
            means += (shares[:, places] * inverse)[:, usable] @ rows[usable]
        for places, rows in blocks(opened, vector, samples):
            with np.errstate(invalid="ignore"):
                found[places, first : first + len(some)] = inner(rows, means) / directed(_lengths(rows))[:, None]
    return found


def directed(norms: np.ndarray) -> np.ndarray:
    """The norms of gradients, NaN where one vanishes or is not finite: it has no direction."""
    return np.where((norms > VANISHES) & np.isfinite(norms), norms, np.nan)


def _lengths(rows: np.ndarray) -> np.ndarray:
    """Length of every row, (b,), summed in float64."""
    return np.array([np.sqrt(inner(row[None], row[None])[0, 0]) for row in rows])

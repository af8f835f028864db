"""Gradients of single samples whose loss depends on their whole chunk, as with batch norm by a chunk's statistics.

M chosen samples, P parameters, G sets. Exact: the gradient of one loss through everything in its chunk, by one backward
pass a sample over the chunk's graph. No array of M x P is made beyond MEMORY_BYTES.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from opsig_torch import plain, ways
from opsig_torch.alignment import directed, inverse
from opsig_torch.flat import replaced
from opsig_torch.layer_gradients import inner
from opsig_torch.opened import Opened
from opsig_torch.primitives import Primitives

MEMORY_BYTES = 1 << 30
"""Bound on the gradients that are held at a time."""
DIRECTIONS_BYTES = 256 << 20
"""Bound on the mean gradients of sets that are held at a time."""
SHARE = 0.25
"""Part of the memory to spare that either may take."""
STRIP = 16
"""Gradients that are multiplied at a time with those that are held."""


def gradient_gram(opened: Opened, samples: np.ndarray) -> np.ndarray:
    """Inner products of the loss gradients of chosen samples at the loaded parameters, (M, M) float64.

    Memory: M x M in float64, MEMORY_BYTES of gradients, and the graph of one chunk. Where the gradients do not fit,
    those that follow a block of held ones are made anew for the next block.
    """
    with ways.refusing(opened, "gradients of single samples", 1):
        return _gram(opened, samples)


def _gram(opened: Opened, samples: np.ndarray) -> np.ndarray:
    order = np.argsort(samples, kind="stable")  # a pass meets every chunk once
    size = opened.flat.vector.numel()
    height = max(STRIP, opened.share(SHARE, MEMORY_BYTES) // (opened.flat.vector.element_size() * size) - STRIP)
    gram = np.zeros((len(samples), len(samples)))
    for first in range(0, len(samples), height):
        held = order[first : first + height]
        rows = opened.flat.vector.new_empty(min(height, len(held)), size)
        filled = 0
        for place, strip in _strips(opened, samples, order[first:]):
            room = rows[filled : filled + len(strip)]
            room.copy_(strip[: len(room)])
            filled += len(room)
            products = inner(strip, rows[:filled]).double().cpu().numpy()
            gram[np.ix_(place, held[:filled])] = products
            gram[np.ix_(held[:filled], place)] = products.T
    return gram


def mean_cosines(opened: Opened, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
    """Mean cosine of each sample's gradient with those of each set of samples, (M, G) float64; NaN where one is 0.

    One backward pass over a chunk for every sample's norm; then, for each set, a backward pass for the mean of its unit
    gradients and a forward derivative along it, which is every sample's inner product with it.
    """
    norms = np.full(opened.samples, np.nan)
    needed = np.unique(np.concatenate([samples, *sets]))
    norms[needed] = directed(gradient_norms(opened, needed))
    products = np.empty((len(samples), len(sets)))
    size = opened.flat.vector.element_size() * opened.flat.vector.numel()
    together = max(1, opened.share(SHARE, DIRECTIONS_BYTES) // size)
    for first in range(0, len(sets), together):
        some = slice(first, first + together)
        directions = _mean_unit_gradients(opened, sets[some], norms)
        for indices, batch in opened.batches:
            place = _inside(samples, indices)
            if len(place):
                slopes = [_slopes(opened, direction, batch) for direction in directions]
                products[place, some] = np.stack(slopes, 1)[samples[place] - indices.start]
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / norms[samples][:, None]


def gradient_norms(opened: Opened, samples: np.ndarray) -> np.ndarray:
    """Norms of the chosen samples' gradients, (M,) float64, each through its whole chunk."""
    norms = np.empty(len(samples))
    with ways.refusing(opened, "gradients of single samples", 1):
        for place, _, gradient in _gradients(opened, samples):
            norms[place] = torch.linalg.vector_norm(gradient, dtype=torch.float64).item()
    return norms


def _inside(samples: np.ndarray, indices: slice) -> np.ndarray:
    """Places of the samples that lie in a chunk."""
    return np.flatnonzero((samples >= indices.start) & (samples < indices.stop))


def _gradients(opened: Opened, samples: np.ndarray) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The place in `samples`, the sample and its gradient (P,), chunk after chunk."""
    for indices, batch in opened.batches:
        places = _inside(samples, indices)
        if not len(places):
            continue
        losses = opened.batch_losses(batch)
        for place in places.tolist():
            sample = int(samples[place])
            yield place, sample, _gradient(opened, losses[sample - indices.start])


def _gradient(opened: Opened, loss: torch.Tensor) -> torch.Tensor:
    """Gradient of a loss whose graph is kept, (P,)."""
    return plain.flattened(plain.gradients(opened, loss, keep=True))


def _strips(opened: Opened, samples: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """STRIP gradients at a time: their places in `samples` and the gradients."""
    places, rows = [], []
    for place, _, gradient in _gradients(opened, samples[order]):
        places.append(order[place])
        rows.append(gradient)
        if len(rows) == STRIP:
            yield np.array(places), torch.stack(rows)
            places, rows = [], []
    if rows:
        yield np.array(places), torch.stack(rows)


def _mean_unit_gradients(opened: Opened, sets: list[np.ndarray], norms: np.ndarray) -> list[torch.Tensor]:
    """For each set, the mean over its samples of their gradients of length one, (P,)."""
    totals = [torch.zeros_like(opened.flat.vector.detach()) for _ in sets]
    for indices, batch in opened.batches:
        losses: Any = None
        for members, total in zip(sets, totals, strict=True):
            inside = members[_inside(members, indices)]
            if not len(inside):
                continue
            losses = opened.batch_losses(batch) if losses is None else losses
            weights = torch.from_numpy(inverse(norms[inside]) / len(members)).to(losses)
            total += _gradient(opened, (losses[torch.from_numpy(inside - indices.start)] * weights).sum())
    return totals


def _slopes(opened: Opened, direction: torch.Tensor, batch: Any) -> np.ndarray:
    """Derivative of every loss of a chunk along a direction (P,), (B,) float64: the gradients' products with it."""
    found = [
        ways.Way("forward derivatives", lambda: _checked_slopes(opened, direction, batch)),
        ways.Way("gradients of single samples", lambda: _slopes_one_by_one(opened, direction, batch)),
    ]
    return ways.first_that_holds(opened, "slopes of samples", found, opened.batch_size, 1)


def _checked_slopes(opened: Opened, direction: torch.Tensor, batch: Any) -> np.ndarray:
    """By one forward derivative; at the first call one sample's is held against its gradient, which costs the chunk."""
    pieces = plain.pieces(opened, direction)
    with torch.no_grad(), Primitives(), forward_ad.dual_level():
        moving = {p: forward_ad.make_dual(p, d) for p, d in zip(opened.flat.parameters, pieces, strict=True)}
        with replaced(opened.flat.model, moving):
            losses = opened.batch_losses(batch)
        tangent = forward_ad.unpack_dual(losses).tangent
        slopes = torch.zeros_like(losses) if tangent is None else tangent
    found = slopes.double().cpu().numpy()
    if "slopes" not in opened.kept:
        gradient = _gradient(opened, opened.batch_losses(batch)[0]).double()
        exact, size = gradient @ direction.double(), gradient.norm() * direction.double().norm()
        if torch.isfinite(exact) and not ways.agree(found[0], float(exact), float(size)):
            raise ways.Disagrees
        opened.kept["slopes"] = True
    return found


def _slopes_one_by_one(opened: Opened, direction: torch.Tensor, batch: Any) -> np.ndarray:
    losses = opened.batch_losses(batch)
    along = direction.double()
    return np.array([float(_gradient(opened, loss).double() @ along) for loss in losses])

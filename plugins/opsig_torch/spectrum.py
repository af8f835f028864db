"""The Hessian's spectral density by stochastic Lanczos quadrature, and per-sample top eigenvalues.

P parameters, R probes, m Lanczos steps, b samples of a block.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from opsig_cli.errors import OpsigError
from opsig_torch.batched_lanczos import ROOM, Largest, largest_eigenvalues
from opsig_torch.eigen import SMALLEST_TOLERANCE, lanczos_matrix, random_start
from opsig_torch.flat import replaced
from opsig_torch.hessian import Hessian
from opsig_torch.opened import Opened
from opsig_torch.sample_curvature import Primitives

PROBES, STEPS = 4, 30
SAMPLE_LIMIT = 200
"""Products after which a sample is given up, and its residual says so."""
BLOCK_BYTES = 64 << 20
"""Bound on the bases of a block of samples."""


def spectral_density(opened: Opened) -> tuple[np.ndarray, np.ndarray, float]:
    """Nodes and weights (R, m) whose weighted sums estimate traces of functions of H, and the trace's standard error.

    The weights of all probes sum to P. (Ghorbani et al. 2019, arXiv 1901.10159.)
    """
    like = opened.flat.vector.detach()
    hessian = Hessian(opened)
    size = like.numel()
    nodes, weights = np.zeros((2, PROBES, min(STEPS, size)))
    for probe in range(PROBES):
        diagonal, beside = lanczos_matrix(hessian, random_start(like, probe), min(STEPS, size))
        matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(matrix)
        nodes[probe, : len(values)] = values
        weights[probe, : len(values)] = vectors[0] ** 2 * size / PROBES
    traces = PROBES * (nodes * weights).sum(1)
    return nodes, weights, float(traces.std(ddof=1) / np.sqrt(PROBES))


def sample_sharpness(opened: Opened, samples: np.ndarray, tolerance: float) -> Largest:
    """The most positive eigenvalue of every chosen sample's Hessian at the loaded parameters, with its residual.

    See `opsig_torch.batched_lanczos`; SAMPLE_LIMIT products are the most that a sample gets. Raises OpsigError for a
    tolerance that the precision cannot reach.
    """
    model, parameters = opened.flat.model, opened.flat.parameters
    at_state = [parameter.detach() for parameter in parameters]
    layout = [tensor for tensor in opened.layout if tensor.kind == "parameter"]
    like = opened.flat.vector.detach()
    if like.dtype == torch.float32 and tolerance < SMALLEST_TOLERANCE:
        raise OpsigError(f"a tolerance of {tolerance:g} cannot be met in float32. Use {SMALLEST_TOLERANCE:g} or more")
    block = max(1, BLOCK_BYTES // (like.element_size() * like.numel() * (ROOM + 4)))
    start = random_start(like, 0)  # the same for all: a sample's value is its own, whatever the company

    def loss(at: list[torch.Tensor], item: Any) -> torch.Tensor:
        batch = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, dict(zip(parameters, at, strict=True))):
            return opened.task.losses(model, batch)[0]

    def product(vector: torch.Tensor, item: Any) -> torch.Tensor:
        pieces = [vector[t.offset : t.offset + t.size].view(t.shape) for t in layout]
        image = jvp(lambda at: grad(loss)(at, item), (at_state,), (pieces,))[1]
        return torch.cat([g.reshape(-1) for g in image])

    found = []
    with Primitives():
        for first in range(0, len(samples), block):
            chosen = samples[first : first + block]
            products = partial(_block_product, vmap(product), opened.batches.take(chosen))
            found.append(largest_eigenvalues(products, start.expand(len(chosen), -1), tolerance, SAMPLE_LIMIT))
    return Largest(*(np.concatenate(parts) for parts in zip(*map(astuple, found), strict=True)))


def _block_product(product: Any, batch: Any, vectors: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Images of vectors (a, P) under the Hessians of these samples of a batch."""
    chosen = torch.from_numpy(rows)
    return product(vectors, tree_map(lambda leaf: leaf[chosen.to(leaf.device)], batch))

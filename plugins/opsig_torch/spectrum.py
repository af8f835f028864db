"""The Hessian's spectral density by stochastic Lanczos quadrature, and per-sample top eigenvalues.

P parameters, R probes, m Lanczos steps, b samples of a block.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import torch
from opsig_linalg.eigen import SMALLEST_TOLERANCE, lanczos_matrix

from opsig_cli.errors import OpsigError
from opsig_torch.batched_lanczos import ROOM, Largest, largest_eigenvalues
from opsig_torch.eigen import TorchSpace, random_start
from opsig_torch.hessian import Hessian
from opsig_torch.opened import Opened
from opsig_torch.sample_products import sample_hessians

PROBES, STEPS = 4, 30
SAMPLE_LIMIT = 200
"""Products after which a sample is given up, and its residual says so."""
BLOCK_BYTES = 64 << 20
"""Bound on the bases of a block of samples."""
BLOCK_SHARE = 0.25
"""Part of the memory to spare that they may take."""


def spectral_density(opened: Opened) -> tuple[np.ndarray, np.ndarray, float]:
    """Nodes and weights (R, m) whose weighted sums estimate traces of functions of H, and the trace's standard error.

    The weights of all probes sum to P. (Ghorbani et al. 2019, arXiv 1901.10159.)
    """
    like = opened.flat.vector.detach()
    hessian = Hessian(opened)
    size = like.numel()
    nodes, weights = np.zeros((2, PROBES, min(STEPS, size)))
    for probe in range(PROBES):
        diagonal, beside = lanczos_matrix(TorchSpace(like), hessian, random_start(like, probe), min(STEPS, size))
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
    like = opened.flat.vector.detach()
    if like.dtype == torch.float32 and tolerance < SMALLEST_TOLERANCE:
        raise OpsigError(f"a tolerance of {tolerance:g} cannot be met in float32. Use {SMALLEST_TOLERANCE:g} or more")
    floats = opened.share(BLOCK_SHARE, BLOCK_BYTES) // (like.element_size() * (ROOM + 4))
    found, first = [], 0
    while first < len(samples):
        hessians = sample_hessians(opened, samples[first:], floats)
        block = largest_eigenvalues(hessians.products, hessians.start, tolerance, SAMPLE_LIMIT)
        found.append(block if hessians.is_all else _or_zero(block, tolerance))
        first += len(hessians.start)
    return Largest(*(np.concatenate(parts) for parts in zip(*map(astuple, found), strict=True)))


def _or_zero(found: Largest, tolerance: float) -> Largest:
    """What was found, or 0, with no residual, where that is larger: an operator that is 0 somewhere else."""
    negative = (found.values < 0) & (found.residuals <= tolerance)
    return replace(
        found, values=np.where(negative, 0.0, found.values), residuals=np.where(negative, 0.0, found.residuals)
    )

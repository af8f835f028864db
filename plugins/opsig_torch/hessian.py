"""Hessian-vector products of the training loss and its most positive eigenpairs. P parameters, K eigenpairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from opsig_torch.session import TorchSession


def hessian_vector_product(session: TorchSession, vector: torch.Tensor) -> torch.Tensor:
    """Hv of the mean training loss at the loaded parameters, (P,), by double backward, batch by batch."""
    parameters = session.flat.parameters
    product = torch.zeros_like(vector)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        for _, batch in session.batches:
            loss = session.task.losses(session.flat.model, batch).sum() / session.samples
            gradient = _flatten(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))
            if not gradient.requires_grad:
                continue  # a loss that is linear in the parameters
            parts = torch.autograd.grad(gradient @ vector, parameters, materialize_grads=True)
            product += _flatten(parts)
    return product


def top_eigenpairs(
    session: TorchSession, count: int, tolerance: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `count` most positive eigenpairs: values (K,), decreasing, vectors (K, P), and residuals |Hv - av|/|a| (K,).

    ARPACK's Lanczos through scipy, to the relative `tolerance`, begun from the (P,) vector `start` where given.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    flat = session.flat.vector

    def product(array: np.ndarray) -> np.ndarray:
        vector = torch.from_numpy(np.ascontiguousarray(array.reshape(-1))).to(flat.device, flat.dtype)
        return hessian_vector_product(session, vector).cpu().numpy().astype(np.float64)

    size = flat.numel()
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    if start is None:
        start = np.random.default_rng(0).standard_normal(size)
    basis = min(size, max(2 * count + 1, 12))
    values, vectors = eigsh(operator, k=count, which="LA", tol=tolerance, v0=start, ncv=basis)  # pyright: ignore
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order].T
    residuals = np.array([np.linalg.norm(product(v) - a * v) / abs(a) for a, v in zip(values, vectors, strict=True)])
    return values, vectors, residuals


def _flatten(tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])

"""Products of single samples' Hessians with vectors, a block of samples at a time.

b samples of a block, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from opsig_torch import plain, ways
from opsig_torch.eigen import random_start
from opsig_torch.flat import replaced
from opsig_torch.naming import curves_forward, is_vmapped
from opsig_torch.opened import Opened
from opsig_torch.positions import one_of
from opsig_torch.primitives import Primitives
from opsig_torch.second import tell_of_second_derivative

Products = Callable[[torch.Tensor, np.ndarray], torch.Tensor]
"""Images (a, P) of vectors (a, P) under the Hessians of the samples at these places (a,) of a block."""


def sample_hessians(opened: Opened, samples: np.ndarray) -> Products:
    """Products with the Hessians of these samples' losses at the loaded parameters.

    One sample's product is held against plain autograd. Raises OpsigError where a layer has no second derivative.
    """

    def holds(module: Any, call: Any) -> None:
        is_vmapped(module, call)
        curves_forward(module, call)

    tell_of_second_derivative(opened)
    found = [
        ways.Way("vmap", lambda: _checked(opened, samples), holds),
        ways.Way("a loop over samples", lambda: _one_by_one(opened, samples)),
    ]
    return ways.first_that_holds(opened, "products with samples' Hessians", found, len(samples))


def _checked(opened: Opened, samples: np.ndarray) -> Products:
    """By vmap; one sample's product with a vector, in the company of a few, is that of plain autograd."""
    products = _vmapped(opened, samples)
    place = len(samples) // 2
    company = np.unique([0, place, len(samples) - 1])
    vectors = random_start(opened.flat.vector.detach(), 0).expand(len(company), -1)
    found = products(vectors, company)[list(company).index(place)]
    exact = _one_by_one(opened, samples[place : place + 1])(vectors[:1], np.zeros(1, int))[0]
    scale = float(torch.maximum(found.norm(), exact.norm()))
    if torch.isfinite(exact).all() and not float((found - exact).norm()) <= ways.AGREES * scale + 1e-9:
        raise ways.Disagrees("not the product of plain autograd")
    return products


def _vmapped(opened: Opened, samples: np.ndarray) -> Products:
    model, parameters = opened.flat.model, opened.flat.parameters
    values = [parameter.detach() for parameter in parameters]
    items, places_of = opened.placed(samples)
    batch = opened.batches.take(items)
    number_M, position_M = (torch.from_numpy(part) for part in divmod(places_of, opened.positions))

    def loss(at: list[torch.Tensor], item: Any, position: torch.Tensor) -> torch.Tensor:
        one = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, dict(zip(parameters, at, strict=True))):
            losses = opened.batch_losses(one, 2)
        return losses[0] if opened.positions == 1 else one_of(losses, position)

    def product(vector: torch.Tensor, item: Any, position: torch.Tensor) -> torch.Tensor:
        pieces = plain.pieces(opened, vector)
        return plain.flattened(jvp(lambda at: grad(loss)(at, item, position), (values,), (pieces,))[1])

    def products(vectors: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        chosen = number_M[places]
        entering = tree_map(lambda leaf: leaf[chosen.to(leaf.device)], batch)
        with Primitives():
            return vmap(product)(vectors, entering, position_M[places].to(vectors.device))

    return products


def _one_by_one(opened: Opened, samples: np.ndarray) -> Products:
    """By gradients whose graphs are kept from product to product."""
    with torch.enable_grad():
        slopes = [
            plain.gradients(opened, plain.sample_loss(opened, sample, 2), twice=True) for sample in samples.tolist()
        ]

    def products(vectors: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        with ways.refusing(opened, "products with samples' Hessians", 2):
            rows = [
                plain.product(opened, slopes[place], plain.pieces(opened, vector), keep=True)
                for place, vector in zip(places.tolist(), vectors, strict=True)
            ]
        return torch.stack(rows)

    products(torch.zeros(1, opened.flat.vector.numel()).to(opened.flat.vector.detach()), np.zeros(1, int))
    return products

"""What measurements take of memory and how many passes over the data, known before they begin."""

from __future__ import annotations

from opsig_cli.backends import PRODUCTS, Need
from opsig_torch import layer_gradients, small_basis
from opsig_torch.hessian import PRODUCT_VECTORS, basis_room
from opsig_torch.memory import held
from opsig_torch.opened import Opened

MORE = 8
"""Hessian-vector products of a solve for each eigenpair after the first, about."""
PRODUCT_PASSES = 2.0
"""Forward and backward passes that a product takes, where graphs are kept or not."""


def needs(opened: Opened, what: str, count: int) -> Need:
    """Bytes and passes of "losses", "eigenpairs" or "gradients" at the loaded parameters."""
    vector = opened.flat.vector.element_size() * opened.flat.vector.numel()
    order = 2 if what == "eigenpairs" else 1
    batch = min(opened.fitting_batch(order), opened.batch_size, opened.items)
    base = held(opened.device) + opened.kept.get(("item bytes", order), 0) * batch
    if what == "losses":
        return Need(base, base, opened.bound(), 1 / 3)
    if what == "eigenpairs":
        least = base + (PRODUCT_VECTORS + small_basis.least_room(count)) * vector
        most = base + (PRODUCT_VECTORS + 2 * basis_room(count, opened.flat.vector.numel())) * vector
        return Need(least, max(least, most), opened.bound(), PRODUCT_PASSES * (PRODUCTS + MORE * (count - 1)))
    room = layer_gradients.MEMORY_BYTES + layer_gradients.BLOCK_BYTES + 8 * count**2
    return Need(base + 3 * vector, base + 3 * vector + room, opened.bound(), 2 + 2 * count / opened.items)

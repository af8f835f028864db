"""What measurements take of memory and how many passes over the data, known before they begin."""

from __future__ import annotations

from opsig_cli.backends import PRODUCTS, Need
from opsig_torch import layer_gradients, set_cosines, small_basis, spectrum
from opsig_torch.hessian import GRAPH_BYTES, PRODUCT_VECTORS, basis_room
from opsig_torch.memory import bound_of, held
from opsig_torch.opened import GRAPH_FACTOR, Opened

LATER = 72 << 20
"""Bytes of libraries that are loaded while it works, such as scipy's, and of the command's own records."""
TRACING = 96 << 20
"""Bytes that torch loads to trace a model."""
MORE = 8
"""Hessian-vector products of a solve for each eigenpair after the first, about."""
PRODUCT_PASSES = 2.0
"""Forward and backward passes that a product takes, where graphs are kept or not."""
SECOND = ("eigenpairs", "curvature", "sample_sharpness", "trace")
"""What is differentiated twice."""


GRADIENT_VECTORS = 7
"""Vectors that gradients of single samples take: those of a few by plain autograd, in float64, to hold others against;
and noise that parameters are shaken with."""


ALIGNMENT_VECTORS = 9
"""The same beside the mean gradients of a few sets, and of one set over all parameters, in float64, too."""


def needs(opened: Opened, what: str, count: int) -> Need:
    """Bytes and passes of a measurement (see `Plans.needs`) at the loaded parameters."""
    vector = opened.flat.vector.element_size() * opened.flat.vector.numel()
    order = 2 if what in SECOND else 1
    batch = min(opened.fitting_batch(order), opened.batch_size, opened.items)
    item = opened.kept.get(("item bytes", order), 0)
    base = held(opened.device) + (LATER if opened.device == "cpu" else 0)
    least, most = _vectors(opened, what, count)
    room = _room(what, count, item, batch, vector, opened.items)
    host, host_bound = 0, 0
    if opened.device != "cpu":
        host, host_bound = held("cpu") + 2 * vector, bound_of("cpu")
    return Need(
        base + item + least * vector + room[0], base + item * batch + max(least, most) * vector + room[1],
        opened.bound(), _passes(opened, what, count), host, host_bound,
    )  # fmt: skip


def _vectors(opened: Opened, what: str, count: int) -> tuple[int, int]:
    """Vectors of parameters that it takes beside the model, at the least and at the most."""
    match what:
        case "losses" | "outputs":
            return 0, 0
        case "eigenpairs":
            most = 2 * basis_room(count, opened.flat.vector.numel())
            return PRODUCT_VECTORS + small_basis.least_room(count), PRODUCT_VECTORS + most
        case "trace":
            return PRODUCT_VECTORS + 3, PRODUCT_VECTORS + 3
        case "curvature" | "sample_sharpness":
            return PRODUCT_VECTORS, PRODUCT_VECTORS
        case "training":
            return 3, 4
        case "alignment":
            return ALIGNMENT_VECTORS, ALIGNMENT_VECTORS
        case _:
            return GRADIENT_VECTORS, GRADIENT_VECTORS


def _room(what: str, count: int, item: int, batch: int, vector: int, items: int) -> tuple[int, int]:
    """Bytes that do not go with the parameters, at the least and at the most, where the graph of an item takes `item`
    and a vector of parameters `vector`, of so many `items`."""
    block = layer_gradients.PIECE_BYTES + min(layer_gradients.BLOCK_BYTES, count * vector)
    layers = min(layer_gradients.MEMORY_BYTES, count * item) + block
    match what:
        case "norms":
            return 0, min(layer_gradients.MEMORY_BYTES, batch * item) + layer_gradients.PIECE_BYTES
        case "gradients":
            return 16 * count**2, 16 * count**2 + layers
        case "alignment":
            return 0, layers + min(set_cosines.DIRECTIONS_BYTES, count * vector)
        case "eigenpairs" | "trace":
            return 0, min(GRAPH_BYTES, items * item // GRAPH_FACTOR)
        case "curvature":
            return 0, TRACING
        case "sample_sharpness":
            return 0, TRACING + min(spectrum.BLOCK_BYTES, count * spectrum.STEPS * vector)
        case _:
            return 0, 0


def _passes(opened: Opened, what: str, count: int) -> float:
    """Forward and backward passes over the data; a forward pass alone is a third of one."""
    share = min(1.0, count / opened.samples)
    of_each = (1 + 2 * opened.positions) / 3  # where an item has several samples, a backward pass for each
    match what:
        case "losses" | "outputs":
            return 1 / 3
        case "eigenpairs":
            return PRODUCT_PASSES * (PRODUCTS + MORE * (count - 1))
        case "trace":
            return PRODUCT_PASSES * spectrum.PROBES * spectrum.STEPS
        case "sample_sharpness":
            return PRODUCT_PASSES * PRODUCTS * share
        case "curvature":
            return PRODUCT_PASSES * of_each
        case "gradients" | "alignment":
            return 2 * of_each * share
        case "norms":
            return of_each if opened.positions == 1 else of_each * share
        case _:
            return 1.0

"""What measurements take of memory and how many passes over the data, known before they begin."""

from __future__ import annotations

import sys

from opsig_cli.backends import PRODUCTS, Need
from opsig_cli.errors import OpsigError
from opsig_torch import captured, coupled, layer_gradients, set_cosines, small_basis, spectrum
from opsig_torch.batched_lanczos import ROOM
from opsig_torch.hessian import GRAPH_BYTES, MARGIN, PRODUCT_VECTORS, basis_room
from opsig_torch.memory import bound_of, held
from opsig_torch.opened import GRAPH_FACTOR, Opened
from opsig_torch.ways import ran_out_of_memory

TRACING = 112 << 20
"""Bytes that torch loads to trace a model, its compiler, where it is not loaded yet."""
MORE = 8
"""Hessian-vector products of a solve for each eigenpair after the first, about."""
PRODUCT_PASSES = 2.0
"""Forward and backward passes that a product takes, where graphs are kept or not."""
SECOND = ("eigenpairs", "curvature", "sample_sharpness", "trace")
"""What is differentiated twice."""
GROUPS = 8
"""Groups whose mean gradients are held together, where memory does not matter; there are seldom more."""
GRADIENT_VECTORS = 7
"""Vectors that gradients of single samples take: those of a few by plain autograd, in float64, to hold others against;
and noise that parameters are shaken with."""
ALIGNMENT_VECTORS = 9
"""The same beside the mean gradients of a few sets, and of one set over all parameters, in float64, too."""
TRAINING_VECTORS = 6
"""Vectors that training takes: the optimizer's, an update, and what replays of one step have in common."""


def needs(opened: Opened, what: str, count: int) -> Need:
    """Bytes and passes of a measurement (see `Plans.needs`) at the loaded parameters."""
    vector = opened.flat.vector.element_size() * opened.flat.vector.numel()
    order = 2 if what in SECOND else 1
    least, most = vectors(opened, what, count)
    with opened.beside(least):
        item, batch = _item_bytes(opened, order), min(opened.fitting_batch(order), opened.batch_size, opened.items)
        room = _room(opened, what, count, item, batch, vector)
    base = opened.base()
    first = batch if opened.couples_samples else min(opened.batch_size, opened.items) if what == "training" else 1
    host, host_bound = 0, 0
    if opened.device != "cpu":
        host, host_bound = held("cpu") + 2 * vector, bound_of("cpu")
    smallest = base + item * first + least * vector + room[0]
    largest = base + item * max(first, batch) + max(least, most) * vector + room[1]
    return Need(
        int(smallest / (1 - MARGIN)), int(largest / (1 - MARGIN)), opened.bound(), _passes(opened, what, count),
        host, host_bound,
    )  # fmt: skip


def _item_bytes(opened: Opened, order: int) -> int:
    """Bytes of an item's graph, to be differentiated `order` times; where items are coupled, its part of a chunk's."""
    batch = min(opened.batch_size, opened.items)
    if opened.couples_samples and ("item bytes", order) not in opened.kept:
        opened.kept["item bytes", order] = GRAPH_FACTOR * opened.graph_bytes(list(range(batch)), order) // batch
    opened.fitting_batch(order)
    return opened.kept.get(("item bytes", order), 0)


def vectors(opened: Opened, what: str, count: int) -> tuple[int, int]:
    """Vectors of parameters that it takes beside the model, at the least and at the most."""
    match what:
        case "losses" | "outputs":
            return 2, 2
        case "eigenpairs":
            most = 2 * basis_room(count, opened.flat.vector.numel())
            return PRODUCT_VECTORS + small_basis.least_room(count) + count + 1, PRODUCT_VECTORS + most
        case "trace":
            return PRODUCT_VECTORS + 3, PRODUCT_VECTORS + 3
        case "curvature":
            return PRODUCT_VECTORS, PRODUCT_VECTORS
        case "sample_sharpness":
            return PRODUCT_VECTORS + ROOM + 4, PRODUCT_VECTORS + ROOM + 4
        case "training":
            return TRAINING_VECTORS, TRAINING_VECTORS
        case _ if opened.couples_samples:
            return GRADIENT_VECTORS + 3 * coupled.STRIP, GRADIENT_VECTORS + 3 * coupled.STRIP
        case "alignment":
            return ALIGNMENT_VECTORS, ALIGNMENT_VECTORS
        case _:
            return GRADIENT_VECTORS, GRADIENT_VECTORS


def _room(opened: Opened, what: str, count: int, item: int, batch: int, vector: int) -> tuple[int, int]:
    """Bytes that do not go with the parameters, at the least and at the most, where the graph of an item takes `item`
    and a vector of parameters `vector`."""
    match what:
        case "norms" | "gradients" | "alignment" if not opened.couples_samples:
            return _of_samples(opened, what, count, vector)
        case "norms" | "gradients":
            return 16 * count**2, 16 * count**2 + min(opened.share(coupled.SHARE, coupled.MEMORY_BYTES), count * vector)
        case "eigenpairs" | "trace":
            return 0, min(GRAPH_BYTES, opened.items * item // GRAPH_FACTOR)
        case "curvature":
            tracing = 0 if "torch._dynamo" in sys.modules else TRACING
            return tracing, tracing
        case "sample_sharpness":
            tracing = 0 if "torch._dynamo" in sys.modules else TRACING
            return tracing, tracing + min(spectrum.BLOCK_BYTES, count * spectrum.STEPS * vector)
        case _:
            return 0, 0


def _of_samples(opened: Opened, what: str, count: int, vector: int) -> tuple[int, int]:
    """Bytes that gradients of `count` single samples take: what is held of layers and blocks of gradients, those of
    loose parameters, products of every two, and mean gradients of groups."""
    plan, room = _gradient_plan(opened), captured.room_of(opened)
    loose = sum(opened.flat.parameter(name).numel() for name in plan.loose)
    widest = max((4 * parameter.numel() // parameter.shape[0] for parameter in plan.covered), default=0)
    fewest = count if what == "gradients" else min(count, opened.positions)
    together = count if what == "gradients" else min(count, opened.fitting_batch() * opened.positions)
    of_one, of_all = plan.held(fewest)[0], plan.held(together)[1]
    pairs = 16 * count**2 if what == "gradients" else 0
    least = pairs + of_one + layer_gradients.PIECE_BYTES + 64 * loose + fewest * widest
    most = pairs + max(of_one, min(room.samples, of_all)) + 64 * loose + layer_gradients.PIECE_BYTES
    most += max(together * widest, min(room.block, count * vector)) + min(room.samples, 24 * loose * together)
    if what == "alignment":
        most += min(opened.share(set_cosines.DIRECTIONS_SHARE, set_cosines.DIRECTIONS_BYTES), GROUPS * vector)
    return least, most


def _gradient_plan(opened: Opened) -> captured.Plan:
    """How gradients are had; one by one, where a model refuses to be looked at: the measurement says why."""
    try:
        return captured.gradient_plan(opened)
    except (OpsigError, MemoryError):
        raise
    except Exception as error:  # a model's own code
        if ran_out_of_memory(error):
            raise MemoryError from error
        return captured.Plan({}, {}, [name for name, p in opened.flat.model.named_parameters() if p.requires_grad])


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

"""Curvature of every sample along one direction, v'H(z)v, with its slope v'g(z).

B samples of a batch, P parameters. The fastest way is by two nested forward derivatives: the computation is traced once
a batch shape and the trace is replayed; parameters, buffers, direction and data are its inputs, so that one trace
serves all checkpoints. torch's nested forward mode is silently wrong through layer norm and train-mode batch norm, and
lacks much: some is written out in primitives (`opsig_torch.primitives`), for the rest reverse derivatives take over,
and every result is held against plain autograd for one sample (`opsig_torch.ways`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_unflatten

from opsig_cli.errors import OpsigError
from opsig_torch import plain, ways
from opsig_torch.flat import held_buffers, replaced
from opsig_torch.naming import curves_forward
from opsig_torch.opened import GRAPH_FACTOR, Opened
from opsig_torch.primitives import Primitives
from opsig_torch.second import tell_of_second_derivative
from opsig_torch.tracing import traced

FEW = 200
"""Passes over a batch that a small net's reverse derivatives take no longer for than a trace takes to be made, with the
compiler that torch loads for it; each is two to three times as long as by the trace."""
SMALL = 1 << 16, 1 << 20
"""Bytes that the graph of a small net's sample takes, and its parameters."""


def curvature_along(opened: Opened, direction: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, slope v'g and curvature v'Hv of every sample at the loaded parameters, (S,) float64 each.

    Memory is bounded by one batch. Raises OpsigError where a layer has no second derivative.
    """
    tell_of_second_derivative(opened)
    found = [
        ways.Way("forward derivatives", lambda: _checked(opened, direction, _traced), curves_forward),
        ways.Way("reverse derivatives of batches", lambda: _checked(opened, direction, _reversed)),
        ways.Way("reverse derivatives of single samples", lambda: _one_by_one(opened, direction)),
    ]
    losses, slopes, curvatures = ways.first_that_holds(opened, "curvature of samples", found, opened.samples)
    slopes, curvatures = (np.where(np.isnan(losses), np.nan, values) for values in (slopes, curvatures))
    return losses, slopes, curvatures


def slopes_along(opened: Opened, directions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and curvatures of every sample along K directions (K, P), (S, K) float64 each; see `curvature_along`."""
    along = _along_few if _are_few(opened, len(directions)) else curvature_along
    found = [along(opened, direction)[1:] for direction in directions]
    slopes, curvatures = (np.stack(rows, 1) for rows in zip(*found, strict=True))
    return slopes, curvatures


def _are_few(opened: Opened, count: int) -> bool:
    """Whether so many directions, with those before them, are too few for a trace of a small net."""
    passes = opened.kept["reversed"] = opened.kept.get("reversed", 0) + count * -(-opened.items // opened.batch_size)
    if passes > FEW or opened.couples_samples or opened.fitting_batch(2) < opened.batch_size:
        return False
    graph, parameters = SMALL
    return opened.kept["item bytes", 2] <= GRAPH_FACTOR * graph and opened.flat.vector.numel() <= parameters


def _along_few(opened: Opened, direction: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `curvature_along`, by reverse derivatives where these hold."""
    tell_of_second_derivative(opened)
    try:
        losses, slopes, curvatures = _checked(opened, direction, _reversed)
    except (OpsigError, MemoryError):
        raise
    except Exception:  # a model's own code, of which forward derivatives may know more
        opened.kept["reversed"] = FEW
        return curvature_along(opened, direction)
    slopes, curvatures = (np.where(np.isnan(losses), np.nan, values) for values in (slopes, curvatures))
    return losses, slopes, curvatures


def _checked(opened: Opened, direction: torch.Tensor, of_batch: Callable[..., Any]) -> np.ndarray:
    """Loss, slope and curvature (3, S), of which the sample of the largest curvature is that of plain autograd.

    The first batch is held against it before the others where the way is new, and where samples are coupled, and a
    sample costs its chunk, that is all.
    """
    found = np.full((3, opened.samples), np.nan)
    pieces = plain.pieces(opened, direction)
    new = ("curved", of_batch) not in opened.kept
    for indices, batch in opened.batches.in_pieces(min(opened.inference_batch(), opened.fitting_batch(2))):
        for row, numbers in zip(found, of_batch(opened, batch, pieces), strict=True):
            row[indices] = numbers.double().cpu().numpy()
        if new:
            _require_agreement(opened, direction, found[:, indices], indices.start)
            opened.kept["curved", of_batch] = True
            new = False
    if not opened.couples_samples:
        _require_agreement(opened, direction, found, 0)
    return found


def _require_agreement(opened: Opened, direction: torch.Tensor, found: np.ndarray, first: int) -> None:
    """Raise Disagrees where the sample of the largest curvature has not the slope and curvature of plain autograd."""
    place = int(np.nan_to_num(np.abs(found[2]), nan=-1, posinf=-1).argmax())
    _, slope, curvature = plain.curvature(opened, first + place, direction)
    if not np.isfinite([slope, curvature]).all():
        return
    # what the curvature is made of is of the size of the slope where it cancels, as in a piecewise linear network
    scale = float(np.abs(found[1][np.isfinite(found[1])]).max(initial=0.0))
    if not (ways.agree(found[1, place], slope, scale) and ways.agree(found[2, place], curvature, 1e-3 * scale)):
        raise ways.Disagrees(f"{found[2, place]:.6g} is {curvature:.6g} by plain autograd")


def _one_by_one(opened: Opened, direction: torch.Tensor) -> np.ndarray:
    return np.array([plain.curvature(opened, sample, direction) for sample in range(opened.samples)]).T


def _reversed(opened: Opened, batch: Any, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """Losses, slopes and curvatures (B,) each of a batch, by reverse derivatives alone.

    With weights w, the gradient of sum w_i l_i(theta + t v) over t is linear in w, and its gradient over w is the
    slopes; once more, the curvatures.
    """
    parameters = opened.flat.parameters
    with torch.enable_grad():
        losses = opened.batch_losses(batch, 2)
        weights = torch.ones_like(losses, requires_grad=True)
        rows = [losses.detach()]
        number = (losses * weights).sum()
        for _ in range(2):
            number = _along(number, parameters, pieces)
            rows.append(
                torch.autograd.grad(number, weights, retain_graph=True, materialize_grads=True)[0]
                if number.requires_grad
                else torch.zeros_like(losses)
            )
    return rows


def _along(number: torch.Tensor, parameters: list[Any], pieces: list[torch.Tensor]) -> torch.Tensor:
    """Derivative of a number along a direction, with its graph."""
    if not number.requires_grad:
        return torch.zeros_like(number)
    slopes = torch.autograd.grad(number, parameters, create_graph=True, materialize_grads=True)
    return torch.stack([(slope * piece).sum() for slope, piece in zip(slopes, pieces, strict=True)]).sum()


def _traced(opened: Opened, batch: Any, pieces: list[torch.Tensor]) -> Any:
    """Losses, slopes and curvatures (B,) each of a batch, by the trace for its shape."""
    values = [parameter.detach() for parameter in opened.flat.parameters]
    buffers = [buffer for _, buffer in opened.flat.buffers]
    leaves, shape = tree_flatten(batch)
    inputs = [*values, *pieces, *buffers, *leaves]
    key = tuple(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    with torch.no_grad():
        if key not in opened.kept:
            opened.kept[key] = _trace(opened, shape, len(leaves), inputs)
        return opened.kept[key](*inputs)


def _trace(opened: Opened, shape: Any, leaves: int, inputs: list[Any]) -> Callable[..., Any]:
    model, parameters = opened.flat.model, opened.flat.parameters
    count = len(parameters)
    buffers = len(opened.flat.buffers)

    def second_order(*flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, direction = flat[:count], flat[count : 2 * count]
        held, data = flat[2 * count : 2 * count + buffers], flat[2 * count + buffers :]
        batch = tree_unflatten(list(data), shape)

        def losses(*at: torch.Tensor) -> torch.Tensor:
            with replaced(model, dict(zip(parameters, at, strict=True))), held_buffers(opened.flat, held):
                return opened.batch_losses(batch, 2)

        def slope(*at: torch.Tensor) -> Any:
            return jvp(losses, at, direction)

        (loss, first), (_, second) = jvp(slope, values, direction)  # pyright: ignore[reportAssignmentType]
        return loss, first, second

    with Primitives(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, about attributes that are set back below
        return traced(second_order, inputs)

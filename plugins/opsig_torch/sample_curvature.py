"""Curvature of every sample along one direction, v'H(z)v, with its slope v'g(z), by two nested forward derivatives.

B samples of a batch. torch's nested forward mode is silently wrong through layer norm and train-mode batch norm, and
fails in attention: while differentiating, those are written out in primitives (`Primitives`). The computation is
traced once a batch shape and the trace is replayed; parameters, buffers, direction and data are its inputs, so that one
trace serves all checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.func import jvp
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from opsig_torch.flat import replaced
from opsig_torch.opened import Opened
from opsig_torch.tracing import traced


def curvature_along(opened: Opened, direction: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, slope v'g and curvature v'Hv of every sample at the loaded parameters, (S,) float64 each.

    Memory is bounded by one batch. Raises nothing of its own.
    """
    found = _along(opened, direction[None])[:, :, 0]
    return found[0], found[1], found[2]


def slopes_along(opened: Opened, directions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and curvatures of every sample along K directions (K, P), (S, K) float64 each; each batch is made once."""
    found = _along(opened, directions)
    return found[1], found[2]


def _along(opened: Opened, directions: torch.Tensor) -> np.ndarray:
    """Losses, slopes and curvatures of every sample along each direction, (3, S, K)."""
    found = np.empty((3, opened.samples, len(directions)))
    places = [(t.offset, t.size, t.shape) for t in opened.layout if t.kind == "parameter"]
    values = [parameter.detach() for parameter in opened.flat.parameters]
    buffers = [buffer for _, buffer in opened.flat.buffers]
    traces = opened.kept
    with torch.no_grad():
        for indices, batch in opened.batches.in_pieces(opened.inference_batch()):
            leaves, shape = tree_flatten(batch)
            key = tuple(leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
            for number, direction in enumerate(directions):
                pieces = [direction[offset : offset + size].view(sizes) for offset, size, sizes in places]
                inputs = [*values, *pieces, *buffers, *leaves]
                if key not in traces:
                    traces[key] = _trace(opened, shape, len(leaves), inputs)
                for row, numbers in zip(found, traces[key](*inputs), strict=True):
                    row[indices, number] = numbers.cpu().numpy()
    return found


def _trace(opened: Opened, shape: Any, leaves: int, inputs: list[Any]) -> Callable[..., Any]:
    model, parameters = opened.flat.model, opened.flat.parameters
    count = len(parameters)
    buffers = len(opened.flat.buffers)

    def second_order(*flat: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, direction = flat[:count], flat[count : 2 * count]
        held, data = flat[2 * count : 2 * count + buffers], flat[2 * count + buffers :]
        batch = tree_unflatten(list(data), shape)

        def losses(*at: torch.Tensor) -> torch.Tensor:
            with replaced(model, dict(zip(parameters, at, strict=True))), _buffers(opened, held):
                return opened.task.losses(model, batch)

        def slope(*at: torch.Tensor) -> Any:
            return jvp(losses, at, direction)

        (loss, first), (_, second) = jvp(slope, values, direction)  # pyright: ignore[reportAssignmentType]
        return loss, first, second

    with Primitives(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, about attributes that are set back below
        return traced(second_order, inputs)


@contextmanager
def _buffers(opened: Opened, held: tuple[torch.Tensor, ...]):
    """The model with these tensors for its buffers: a trace must not hold a checkpoint's."""
    names = {id(buffer): number for number, (_, buffer) in enumerate(opened.flat.buffers)}
    places = [
        (module, name, buffer)
        for module in opened.flat.model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and id(buffer) in names
    ]
    for module, name, buffer in places:
        # batch norm counts its batches in place, which may not happen while differentiating
        module._buffers[name] = None if name == "num_batches_tracked" else held[names[id(buffer)]]
    try:
        yield
    finally:
        for module, name, buffer in places:
            module._buffers[name] = buffer


class Primitives(TorchFunctionMode):
    """Writes out the functions whose nested forward derivative torch gets wrong or lacks."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():  # torch's own forward rules use what torch has deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            import torch._decomp.decompositions_for_jvp  # noqa: F401

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written_out = _WRITTEN_OUT.get(function, function)
        return written_out(*args, **(kwargs or {}))


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(x, axes, eps), weight, bias)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    grouped = x.reshape(x.shape[0], num_groups, -1)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    weight, bias = (None if p is None else p.view(shape) for p in (weight, bias))
    return _affine(_normalised(grouped, (-1,), eps).reshape(x.shape), weight, bias)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    if training:
        y = _normalised(x, (0, *range(2, x.dim())), eps)
    else:
        y = (x - running_mean.view(shape)) * torch.rsqrt(running_var + eps).view(shape)
    weight, bias = (None if p is None else p.view(shape) for p in (weight, bias))
    return _affine(y, weight, bias)


def _normalised(x, axes, eps):
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _affine(y, weight, bias):
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


_WRITTEN_OUT = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
}

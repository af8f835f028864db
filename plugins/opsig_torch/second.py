"""Whether torch's second derivative of a model is that of its gradient: held once a session, for a sample, in float64.

Differences of gradients know nothing of how a second derivative is made. They find functions whose backward pass is not
differentiable, or not a derivative of what they compute, and the ones whose second derivative torch gets wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map

from opsig_torch.flat import held_buffers, replaced
from opsig_torch.naming import Call, as_function, culprit
from opsig_torch.opened import Opened
from opsig_torch.plain import require_differentiable
from opsig_torch.running import FullPrecision

STEP = 1e-7
"""Length of a difference relative to the values it moves: short, so that hardly any ReLU has its kink within it."""
SIZES = 9
"""Vectors of the parameters' size that the check takes at a time, in float64."""
GRAPHS = 4
"""Graphs of an item, to be differentiated twice, that it takes: of one, in float64, twice over."""
LARGEST_LAYER = 10_000_000
"""Parameters up to which a layer is checked by itself where the model is too large."""
AGREES = 1e-3
"""Relative difference of the two, of which rounding is about 1e-7."""


def tell_of_second_derivative(opened: Opened) -> None:
    """Say, naming the layer, where torch's second derivative is not the derivative of the gradient.

    Three samples must disagree, as a kink may lie within one's difference. What cannot be run in float64 is let pass.
    """
    if "second" in opened.kept:
        return
    item = opened.kept.get(("item bytes", 2), 0)
    room = opened.room() - GRAPHS * item
    if SIZES * 8 * opened.flat.vector.numel() > room:
        _tell_of_layers(opened, room // (SIZES * 8))
        return
    opened.flat.model.eval()
    try:
        samples = sorted({0, opened.samples // 2, opened.samples - 1})
        outcomes = []
        for sample in samples:
            if (outcome := _outcome(opened, sample)) is not None:
                outcomes.append(outcome)
                if outcome:
                    break
    finally:
        opened.measuring_mode()
    if not outcomes:
        return
    opened.kept["second"] = True
    if not any(outcomes):
        opened.tell(_words(culprit(opened, _is_consistent)))


def _tell_of_layers(opened: Opened, most: int) -> None:
    """The same of one layer of each kind after the other, of those with at `most` so many parameters, for a model of
    which several copies in float64 do not fit."""
    opened.flat.model.eval()
    try:
        layer = culprit(opened, _each_kind_once(min(most, LARGEST_LAYER)))
    finally:
        opened.measuring_mode()
    opened.kept["second"] = True
    if layer != "the model":
        opened.tell(_words(layer))


def _each_kind_once(most: int) -> Callable[[nn.Module, Call], None]:
    seen: set[type] = set()

    def test(module: nn.Module, call: Call) -> None:
        small = sum(parameter.numel() for parameter in module.parameters()) <= most
        if small and type(module) not in seen:
            seen.add(type(module))
            _is_consistent(module, call)

    return test


def _words(layer: str) -> str:
    return (
        f"note: torch's second derivative of {layer} is not the derivative of its gradient, as where something is "
        "detached or has a backward pass of its own: curvature takes it for constant there"
    )


def _outcome(opened: Opened, sample: int) -> bool | None:
    """Whether both agree for one sample; None where they cannot be had, or vanish."""
    parameters = opened.flat.parameters
    frozen = {parameter: _double(parameter.detach()) for parameter in opened.flat.frozen}
    buffers = [b.double() if b.is_floating_point() else b for _, b in opened.flat.buffers]
    items, (place,) = opened.placed([sample])
    batch = tree_map(_double, opened.batches.take(items))

    def loss(*at: torch.Tensor) -> torch.Tensor:
        new: dict = frozen | dict(zip(parameters, at, strict=True))
        with FullPrecision(torch.float64), replaced(opened.flat.model, new), held_buffers(opened.flat, buffers):
            return opened.batch_losses(batch, 2)[place]

    try:
        return _agree(loss, [parameter.detach().double() for parameter in parameters])
    except Exception:  # plain derivatives in the model's own precision will say what is amiss
        return None


def _double(leaf: object) -> object:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _agree(number: Callable[..., torch.Tensor], values: Sequence[torch.Tensor]) -> bool | None:
    """Whether the second derivative along the gradient is a difference of gradients; None where the gradient is 0."""

    def gradient(at: Sequence[torch.Tensor], twice: bool = False) -> tuple[torch.Tensor, ...]:
        at = [value.detach().requires_grad_() for value in at] if not twice else at
        return torch.autograd.grad(number(*at), at, create_graph=twice, materialize_grads=True)

    with torch.enable_grad():
        at = [value.clone().requires_grad_() for value in values]
        first = gradient(at, twice=True)
        require_differentiable(first)
        size = torch.stack([part.detach().square().sum() for part in first]).sum().sqrt()
        if not torch.isfinite(size) or size == 0:
            return None
        along = [part.detach() / size for part in first]
        slope = torch.stack([(part * unit).sum() for part, unit in zip(first, along, strict=True)]).sum()
        second = (
            torch.autograd.grad(slope, at, materialize_grads=True)
            if slope.requires_grad
            else [torch.zeros_like(value) for value in values]
        )
        moved = [torch.where(unit == 0, 0, value) for value, unit in zip(values, along, strict=True)]
        # of what moves alone: a mask of attention holds the most negative number there is
        step = STEP * float(torch.stack([value.square().sum() for value in moved]).sum().sqrt().clamp_min(1.0))
        ahead, behind = (
            gradient([v + sign * step * unit for v, unit in zip(values, along, strict=True)]) for sign in (1, -1)
        )
    differences = [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    off = torch.stack([(a - b).square().sum() for a, b in zip(second, differences, strict=True)]).sum().sqrt()
    largest = torch.stack([part.square().sum() for part in differences]).sum().sqrt()
    return bool(off <= AGREES * largest + 1e-6 * size)


def _is_consistent(module: nn.Module, call: Call) -> None:
    number, values = as_function(module, tree_map(_double, call))
    with FullPrecision(torch.float64):
        if values and _agree(number, [value.double() for value in values]) is False:
            raise ValueError

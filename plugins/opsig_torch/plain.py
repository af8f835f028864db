"""Derivatives of one sample's loss by plain autograd: what every faster way is held against, and what always holds.

P parameters. Where samples are coupled by batch norm in chunks, the loss is that within the sample's chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from opsig_cli.backends import require_each
from opsig_cli.errors import OpsigError
from opsig_torch.opened import Opened


def sample_loss(opened: Opened, sample: int, order: int = 1) -> torch.Tensor:
    """The loss of one sample, with its graph, to be differentiated `order` times."""
    if not opened.couples_samples:
        return require_losses(opened.losses_of([sample], order), 1)[0]
    start = sample // opened.positions // opened.batch_size * opened.batch_size
    chunk = range(start, min(start + opened.batch_size, opened.items))
    return opened.batch_losses(opened.batches.take(chunk), order)[sample - start * opened.positions]


def require_losses(losses: torch.Tensor, samples: int) -> torch.Tensor:
    """The losses. Raises OpsigError where there is not one a sample."""
    if not isinstance(losses, torch.Tensor):
        raise OpsigError(f"the task's losses() returned {type(losses).__name__}. It must return a tensor, one a sample")
    require_each(tuple(losses.shape), samples)
    return losses


def require_graph(losses: torch.Tensor) -> torch.Tensor:
    """The losses. Raises OpsigError where there is nothing to train by."""
    if not losses.requires_grad:
        raise OpsigError(
            "the task's losses() do not depend on what is trained: they are detached, made under no_grad, or counted. "
            "Return a loss that has a gradient"
        )
    return losses


def gradients(
    opened: Opened, loss: torch.Tensor, twice: bool = False, keep: bool = False,
    over: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradient of a loss over each parameter, or those given by `over`; 0 of a loss that depends on none."""
    parameters = opened.flat.parameters if over is None else over
    if not loss.requires_grad:
        return tuple(torch.zeros_like(parameter) for parameter in parameters)
    found = torch.autograd.grad(
        loss, parameters, create_graph=twice, retain_graph=keep or twice, materialize_grads=True
    )
    if twice and "twice" not in opened.kept:
        require_differentiable(found)
        opened.kept["twice"] = True
    return found


def require_differentiable(gradients: Sequence[torch.Tensor]) -> None:
    """Raise RuntimeError where gradients were made by a function that has no second derivative.

    torch raises this itself only where a graph is followed to its end; otherwise it takes the gradient for a constant.
    """
    seen: set[object] = set()
    nodes = [gradient.grad_fn for gradient in gradients]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in ("DelayedError", "torch::autograd::Error", "Error", "NotImplemented"):
            raise RuntimeError("a custom function is marked @once_differentiable")
        nodes += [following for following, _ in node.next_functions]


def flattened(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One vector (P,) of what there is for each parameter."""
    return torch.cat([part.reshape(-1) for part in parts])


def pieces(opened: Opened, vector: torch.Tensor) -> list[torch.Tensor]:
    """A vector (P,) cut into what there is for each parameter."""
    return [vector[t.offset : t.offset + t.size].view(t.shape) for t in opened.layout if t.kind == "parameter"]


def product(
    opened: Opened, slopes: Sequence[torch.Tensor], direction: Sequence[torch.Tensor], keep: bool = False
) -> torch.Tensor:
    """Product of the Hessian with a direction, (P,), from gradients with their graph."""
    known = [(slope, piece) for slope, piece in zip(slopes, direction, strict=True) if slope.requires_grad]
    if not known:  # a loss that is linear in the parameters
        return torch.zeros_like(opened.flat.vector.detach())
    along = cast(torch.Tensor, _Along.apply([piece for _, piece in known], *(slope for slope, _ in known)))
    parts = torch.autograd.grad(along, opened.flat.parameters, retain_graph=keep, materialize_grads=True)
    return flattened(parts)


class _Along(torch.autograd.Function):
    """A number whose gradient over tensors is given. `grad_outputs` does the same, and loads sympy: a third of a
    second of every command."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, *ctx.gradients)


def curvature(opened: Opened, sample: int, direction: torch.Tensor) -> tuple[float, float, float]:
    """Loss, slope v'g and curvature v'Hv of one sample along a direction v (P,)."""
    with torch.enable_grad():
        loss = sample_loss(opened, sample, 2)
        slopes = gradients(opened, loss, twice=True)
        image = product(opened, slopes, pieces(opened, direction))
    slope = flattened(slopes).detach().double() @ direction.double()
    return loss.item(), slope.item(), (image.double() @ direction.double()).item()

"""Which layer of a model a derivative fails in, so that a person is told its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from opsig_torch.flat import replaced
from opsig_torch.opened import Opened
from opsig_torch.plain import require_differentiable
from opsig_torch.primitives import Primitives
from opsig_torch.tracing import traced

Call = tuple[tuple[Any, ...], dict[str, Any]]
Test = Callable[[nn.Module, Call], None]
"""Raises where a layer, called as it was, has not the derivative."""
AGREES = 1e-2


def culprit(opened: Opened, test: Test | None = None, order: int = 1) -> str:
    """The innermost layer of the model that fails a test, as "layer 'NAME' (KIND)"; "the model" where none does alone.

    Without a test: that plain autograd gives a derivative of this order.
    """
    test = test or (_has_gradient if order == 1 else _has_second_derivative)
    calls = _calls(opened)
    for name, module in _innermost_first(opened.flat.model):
        if module in calls and name:
            try:
                with opened.running.differentiable(2), torch.enable_grad():
                    test(module, calls[module])
            except Exception:  # whatever it is, it is what the whole model failed with
                return f"layer '{name}' ({type(module).__name__})"
    return "the model"


def _innermost_first(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    for own, child in module.named_children():
        yield from _innermost_first(child, f"{name}.{own}" if name else own)
    yield name, module


def _calls(opened: Opened) -> dict[nn.Module, Call]:
    """The first call of every layer on two samples."""
    calls: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(module, tree_map(_copied, (args, kwargs)))

    modules = [m for m in opened.flat.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            opened.batch_losses(opened.batches.take(range(min(2, opened.items))), 2)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def as_function(module: nn.Module, call: Call) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A number made of a layer's outputs, as a function of its parameters and of what enters it, and these."""
    leaves, shape = tree_flatten(call)
    entering = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    parameters = list(module.parameters())

    def number(*values: torch.Tensor) -> torch.Tensor:
        filled = list(leaves)
        for place, value in zip(entering, values[len(parameters) :], strict=True):
            filled[place] = value
        args, kwargs = tree_unflatten(filled, shape)
        with replaced(module, dict(zip(parameters, values, strict=False))):
            outputs = tree_flatten(module(*args, **kwargs))[0]
        found = [o for o in outputs if isinstance(o, torch.Tensor) and o.is_floating_point()]
        return torch.stack([(o + 0.5).square().sum() for o in found]).sum()

    return number, [p.detach() for p in parameters] + [leaves[place] for place in entering]


def _has_gradient(module: nn.Module, call: Call) -> None:
    number, values = as_function(module, call)
    for value in values:
        value.requires_grad_()
    if values and (found := number(*values)).requires_grad:
        torch.autograd.grad(found, values, allow_unused=True)


def _plain_curvature(module: nn.Module, call: Call) -> float:
    number, values = as_function(module, call)
    values = [value.clone().requires_grad_() for value in values]
    found = number(*values) if values else torch.zeros(())
    if not found.requires_grad:
        return 0.0
    first = torch.autograd.grad(found, values, create_graph=True, materialize_grads=True)
    require_differentiable(first)
    slope = torch.stack([part.sum() for part in first]).sum()
    if not slope.requires_grad:
        return 0.0
    second = torch.autograd.grad(slope, values, materialize_grads=True)
    return float(torch.stack([part.sum() for part in second]).sum())


def _has_second_derivative(module: nn.Module, call: Call) -> None:
    _plain_curvature(module, call)


def curves_forward(module: nn.Module, call: Call) -> None:
    """Raises where two nested forward derivatives fail in a layer, or are not what plain autograd gives."""
    number, values = as_function(module, call)
    ones = tuple(torch.ones_like(value) for value in values)
    if not values:
        return

    def second(*at: torch.Tensor) -> Any:
        return jvp(lambda *inner: jvp(number, inner, ones)[1], at, ones)[1]

    with torch.no_grad(), Primitives(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = float(traced(second, values)(*values))
    exact = _plain_curvature(module, call)
    if abs(found - exact) > AGREES * abs(exact):
        raise ValueError(f"{found} is {exact}")


def is_vmapped(module: nn.Module, call: Call) -> None:
    """Raises where per-sample gradients of a layer cannot be had by vmap."""
    leaves, shape = tree_flatten(call)
    parameters = list(module.parameters())
    batched = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim()]

    def number(values: list[torch.Tensor], entering: list[torch.Tensor]) -> torch.Tensor:
        filled = list(leaves)
        for place, value in zip(batched, entering, strict=True):
            filled[place] = value.unsqueeze(0)
        inner, into = as_function(module, tree_unflatten(filled, shape))
        return inner(*values, *into[len(parameters) :])

    if parameters or batched:
        vmap(grad(number), (None, 0))([p.detach() for p in parameters], [leaves[i] for i in batched])

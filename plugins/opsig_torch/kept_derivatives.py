"""Layers whose derivatives are kept, or made by the library's own kernels, for many products with one Hessian.

What torch makes of the derivative of a gradient is right, and slow: that of a convolution is put together of general
convolutions that are no kernel of the library's, those of an activation and of layer norm are made anew at every
product by a dozen passes over memory. Where the graph is kept, what depends on the parameters alone is made once.
g: what comes in from the losses; u: what comes in from the direction, by which the gradient is moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from opsig_torch.channel_scales import scaled
from opsig_torch.primitives import attention

aten = torch.ops.aten


class KeptDerivatives(TorchFunctionMode):
    """Inside, losses have a graph for products with their Hessian: a gradient and its derivative, no third one.

    Models that take derivatives themselves, and transformations of torch.func, raise in it.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = cast(Any, _TABLE.get(function, function))
        return run(*args, **(kwargs or {}))


class _Convolved(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, settings):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biased = settings, bias is not None
        return aten.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        back: Callable[..., Any] = _ConvolvedBack.apply
        dx, dw = back(g, x, weight, ctx.settings, ctx.needs_input_grad[:2])
        return dx, dw, g.sum((0, *range(2, g.dim()))) if ctx.needs_input_grad[2] else None, None


class _ConvolvedBack(Function):
    @staticmethod
    def forward(ctx: Any, g, x, weight, settings, wanted):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(g, x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return aten.convolution_backward(g, x, weight, None, *settings, [*wanted, False])[:2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u, v):  # pyright: ignore[reportIncompatibleMethodOverride]
        g, x, weight = ctx.saved_tensors
        parts = [(u, weight), (x, v)]
        moved = [aten.convolution(a, b, None, *ctx.settings) for a, b in parts if a is not None and b is not None]
        dg = None if not moved else moved[0] if len(moved) == 1 else moved[0].add_(moved[1])
        wanted = [v is not None and ctx.needs_input_grad[1], u is not None and ctx.needs_input_grad[2], False]
        dx = dw = None
        if any(wanted):  # both are bilinear in g: the one takes v in the place of the weight, the other u of the input
            dx, dw, _ = aten.convolution_backward(
                g, x if u is None else u, weight if v is None else v, None, *ctx.settings, wanted
            )
        return dg, dx, dw, None, None


def _convolution(original: Callable[..., Any]) -> Callable[..., Any]:
    def convolve(input, weight, bias=None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups=1):
        axes = weight.dim() - 2
        if input.dim() != axes + 2 or isinstance(padding, str):
            return original(input, weight, bias, stride, padding, dilation, groups)
        stride, padding, dilation = (
            [value] * axes if isinstance(value, int) else [*value] * (axes if len(value) == 1 else 1)
            for value in (stride, padding, dilation)
        )
        return _Convolved.apply(input, weight, bias, (stride, padding, dilation, False, [0] * axes, groups))

    return convolve


class _Activated(Function):
    """An activation f with f' and f'' as they are at x."""

    @staticmethod
    def forward(ctx: Any, x, made):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, first, second = made  # of a tuple torch knows nothing, so that y may be changed in place
        ctx.save_for_backward(first, second, x)
        return y

    @staticmethod
    def backward(ctx: Any, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        first, second, x = ctx.saved_tensors
        return _ActivatedBack.apply(g, x, first, second), None


class _ActivatedBack(Function):
    @staticmethod
    def forward(ctx: Any, g, x, first, second):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(g * second, first)
        return g * first

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u):  # pyright: ignore[reportIncompatibleMethodOverride]
        bent, first = ctx.saved_tensors
        return u * first, u * bent, None, None


def _activation(function: Callable[..., Any]) -> Callable[..., Any]:
    def activate(input, *args: Any, **kwargs: Any):
        tracked = torch.is_grad_enabled() and input.requires_grad and input.is_floating_point()
        if not tracked or kwargs.get("inplace"):
            return function(input, *args, **kwargs)
        with torch.enable_grad():
            alone = input.detach().requires_grad_()
            y = function(alone, *args, **kwargs)
            first = torch.autograd.grad(y.sum(), alone, create_graph=True)[0]
            second = torch.autograd.grad(first.sum(), alone)[0]
        return _Activated.apply(input, (y.detach(), first.detach(), second))

    return activate


class _Normalised(Function):
    """(x - mean) / deviation over the last axes; c, b, s: means of u y, g y and u dx over these.

    dx = P(g) / deviation, where P is a symmetric projection, so that its derivative over x along u is
    -(P(c g + b u) / deviation + s y) / deviation.
    """

    @staticmethod
    def forward(ctx: Any, x, size, eps):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, inverse = aten.native_layer_norm(x, size, None, None, eps)
        ctx.save_for_backward(x, y, mean, inverse)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx: Any, g):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, mean, inverse = ctx.saved_tensors
        return _NormalisedBack.apply(g, x, y.detach(), mean, inverse, ctx.size), None, None


class _NormalisedBack(Function):
    @staticmethod
    def forward(ctx: Any, g, x, y, mean, inverse, size):  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = _centred(g, x, mean, inverse, size)
        axes = tuple(range(-len(size), 0))
        along = (g * y).mean(axes, keepdim=True)
        ctx.save_for_backward(g, x, y, mean, inverse, dx, along)
        ctx.size, ctx.axes = size, axes
        return dx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u):  # pyright: ignore[reportIncompatibleMethodOverride]
        g, x, y, mean, inverse, dx, along = ctx.saved_tensors
        dg = _centred(u, x, mean, inverse, ctx.size)
        beside = (u * y).mean(ctx.axes, keepdim=True)
        both = (u * dx).mean(ctx.axes, keepdim=True)
        bent = torch.addcmul(g * beside, u, along)
        moved = _centred(bent, x, mean, inverse, ctx.size)
        return dg, torch.addcmul(moved, y, both).mul_(-inverse), None, None, None, None


def _centred(g, x, mean, inverse, size):
    """Derivative of the normalised over x, times g: symmetric, so that it serves both ways."""
    return aten.native_layer_norm_backward(g.contiguous(), x, size, mean, inverse, None, None, [True, False, False])[0]


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    y = _Normalised.apply(input.contiguous(), list(normalized_shape), eps)
    if weight is not None and bias is not None:
        return torch.addcmul(bias, y, weight)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


_TABLE: dict[Any, Callable[..., Any]] = {
    F.batch_norm: scaled,
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.conv3d: _convolution(F.conv3d),
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: attention,
} | {
    f: _activation(f)
    for f in (F.gelu, F.silu, F.elu, F.softplus, F.mish, F.selu, torch.tanh, torch.sigmoid, F.tanh, F.sigmoid)
}  # fmt: skip

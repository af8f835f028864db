"""Functions of torch that are written out in simpler ones while differentiating, because torch lacks a derivative of
theirs or gets one wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _WrittenOut(TorchFunctionMode):
    table: dict[Any, Any]

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(function, function)(*args, **(kwargs or {}))


class Primitives(_WrittenOut):
    """Writes out what has no forward derivative of second order, or, as layer norm, a wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _NO_FORWARD_TWICE | _NO_BACKWARD_TWICE
        with warnings.catch_warnings():  # torch's own forward rules use what torch has deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            import torch._decomp.decompositions_for_jvp  # noqa: F401


class TwiceDifferentiable(_WrittenOut):
    """Writes out what has a gradient but no gradient of the gradient, or a wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = _NO_BACKWARD_TWICE


class Precise(_WrittenOut):
    """Batch norm on the CPU whose statistics are right to rounding: torch adds channels-last pictures up in float32, by
    which losses are off by 1e-4 and, as ReLUs turn, gradients by 1e-2."""

    def __init__(self) -> None:
        super().__init__()
        self.table = {F.batch_norm: _batch_norm_in_order}


def _layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    axes = tuple(range(-len(normalized_shape), 0))
    return _affine(_normalised(x, axes, eps), weight, bias)


def _group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):
    grouped = x.reshape(x.shape[0], num_groups, -1)
    return _per_channel(_normalised(grouped, (-1,), eps).reshape(x.shape), weight, bias)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        y = _normalised(x, (0, *range(2, x.dim())), eps)
    else:
        y, scale = x, torch.rsqrt(running_var + eps)
        weight = scale if weight is None else scale * weight
        bias = -running_mean * weight if bias is None else bias - running_mean * weight
    return _per_channel(y, weight, bias)


def _batch_norm_in_order(
    x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):  # fmt: skip
    x = x.contiguous() if training else x
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5
):
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return _per_channel(_normalised(x, tuple(range(2, x.dim())), eps), weight, bias)


def _normalised(x, axes, eps):
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _per_channel(y, weight, bias):
    shape = (1, -1, *(1 for _ in y.shape[2:]))
    weight, bias = (None if p is None else p.view(shape) for p in (weight, bias))
    return _affine(y, weight, bias)


def _affine(y, weight, bias):
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(ones.triu(1), float("-inf"))
    if attn_mask is None:
        return scores.softmax(-1) @ value
    scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # queries that see nothing, of which torch makes 0
    return (scores.masked_fill(blind, 0.0).softmax(-1) @ value).masked_fill(blind, 0.0)


def _elementwise(formula: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def written_out(x: torch.Tensor, inplace: bool = False) -> torch.Tensor:
        return x.copy_(formula(x)) if inplace else formula(x)

    return written_out


def _glu(x, dim=-1):
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _weight_norm(v, g, dim=0):
    axes = [axis for axis in range(v.dim()) if axis != dim] if dim != -1 else list(range(v.dim()))
    return v * (g * torch.rsqrt(v.square().sum(axes, keepdim=True)))


def _cdist(x1, x2, p=2.0, compute_mode=None):
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _embedding_bag(
    input, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
):  # fmt: skip
    if input.dim() != 2 or mode == "max" or max_norm is not None or padding_idx is not None:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    rows = F.embedding(input, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    return rows.sum(1) if mode == "sum" else rows.mean(1)


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):  # fmt: skip
    rows = F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is None:
        return rows
    return torch.where((input == padding_idx % len(weight))[..., None], rows.detach(), rows)


_NO_BACKWARD_TWICE = {
    F.hardsigmoid: _elementwise(lambda x: F.relu6(x + 3) / 6),
    F.embedding_bag: _embedding_bag,
    torch.cdist: _cdist,
    vars(torch)["_weight_norm"]: _weight_norm,  # has a second derivative, and a wrong one
}

_NO_FORWARD_TWICE = {
    F.embedding: _embedding,  # forward, the row of padding has a derivative that it lacks backward
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.scaled_dot_product_attention: attention,
    F.silu: _elementwise(lambda x: x * torch.sigmoid(x)),
    F.mish: _elementwise(lambda x: x * torch.tanh(F.softplus(x))),
    F.glu: _glu,
}

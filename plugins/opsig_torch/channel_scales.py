"""Batch norm by running statistics as what it is, a scale and a shift of every channel, for products with a Hessian.

torch's second derivative of it is made for statistics of the batch: it took a fifth of a residual network's products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class ChannelScales(TorchFunctionMode):
    """Inside, batch norm that does not train is written out."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (scaled if function is F.batch_norm else function)(*args, **(kwargs or {}))


def scaled(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or running_mean is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))

"""Checkpoints of a plain torch model and its optimizer. torch itself is not imported: the tensors bring it along.
Parameters of JAX are `trees`.

P trained parameters, B buffers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from opsig_cli.backends import State, Tensor
from opsig_cli.errors import OpsigError
from opsig_cli.trajectory import trees

SLOTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""What of an optimizer's state has a place in a trajectory."""
WRAPPER = re.compile(r"^(?:(?:_orig_mod|module)\.)+")
"""What torch.compile and data parallelism put before names."""


def layout_of(model: Any) -> list[Tensor]:
    """Names, shapes and places of a model's parameters, trained and frozen, in its own order, tied ones once, and of
    its buffers.

    Raises OpsigError where it is neither a model of torch nor a tree of JAX's arrays.
    """
    if not hasattr(model, "named_parameters"):
        return trees.layout_of(model)
    named = [(name, "parameter" if p.requires_grad else "frozen", p) for name, p in _named(model, "parameters")]
    named += [(name, "buffer", tensor) for name, tensor in _named(model, "buffers")]
    if lazy := [name for name, _, tensor in named if hasattr(tensor, "materialize")]:
        raise OpsigError(f"model has '{lazy[0]}', whose shape is not known before its first batch. Show it one")
    found: list[Tensor] = []
    ends: dict[str, int] = {"parameter": 0, "frozen": 0, "buffer": 0}
    for name, kind, tensor in named:
        found.append(Tensor(WRAPPER.sub("", name), kind, tuple(tensor.shape), ends[kind], tensor.numel()))
        ends[kind] += tensor.numel()
    return found


def state_of(model: Any, optimizer: Any = None, step: int = 0) -> State:
    """What a model and its optimizer hold now, as a checkpoint of `step` in the order of `layout_of`: a copy.

    Of the optimizer SLOTS are kept; a parameter that it has no state of yet counts as 0. Raises OpsigError where these
    are no model and optimizer of torch, nor a tree of JAX's arrays.
    """
    if not hasattr(model, "named_parameters"):
        return trees.state_of(model, optimizer, step)
    named = [tensor for _, tensor in _named(model, "parameters")]
    parameters, frozen = [p for p in named if p.requires_grad], [p for p in named if not p.requires_grad]
    buffers = [tensor for _, tensor in _named(model, "buffers")]
    slots = {}
    if optimizer is not None:
        if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
            raise OpsigError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
        for name in SLOTS:
            held = [optimizer.state.get(parameter, {}).get(name) for parameter in parameters]
            if any(row is not None for row in held):
                slots[name] = _row(
                    [p.new_zeros(p.shape) if row is None else row for p, row in zip(parameters, held, strict=True)],
                    np.float32,
                )
    return State(
        step, _row(parameters, np.float32), _row(buffers, np.float64), slots, _row(frozen, np.float32)
    )  # fmt: skip


def _named(model: Any, kind: str) -> list[tuple[str, Any]]:
    if not hasattr(model, "named_parameters") or not hasattr(model, "named_buffers"):
        raise OpsigError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    return list(getattr(model, f"named_{kind}")())


def _row(tensors: Iterable[Any], dtype: Any) -> np.ndarray:
    tensors = list(tensors)
    if any(tensor.is_complex() for tensor in tensors):
        raise OpsigError(
            "model has complex numbers, of which a file holds none. Keep them as pairs: torch.view_as_real"
        )
    if any(tensor.is_meta for tensor in tensors):
        raise OpsigError("model is on the device meta, where tensors have no numbers")
    parts = [tensor.detach().cpu().double().reshape(-1).numpy().astype(dtype) for tensor in tensors]
    return np.concatenate(parts) if parts else np.empty(0, dtype)

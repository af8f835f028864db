"""A model whose parameters are views of one flat vector, and its buffers as one row.

P parameters, B buffers. One vector makes snapshots, optimizer state and norms a single array operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from opsig_cli import backends
from opsig_cli.backends import State
from opsig_cli.errors import OpsigError


class FlatModel:
    """`model` on `device`, its parameters rebound to slices of `vector`, (P,), and their gradients to `gradient`'s.

    Raises OpsigError where the model has no trainable parameter.
    """

    def __init__(self, model: nn.Module, device: torch.device, double: bool):
        dtype = torch.float64 if double else torch.float32
        self.model = model.to(device, dtype)
        named = list(model.named_parameters())  # tied parameters come once
        if not named:
            raise OpsigError("the task's model has no parameters")
        self.parameters = [parameter for _, parameter in named]
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self.parameters]))
        self.gradient = torch.zeros_like(self.vector)
        self.vector.grad = self.gradient
        self.buffers = list(model.named_buffers())
        self.layout: list[backends.Tensor] = []
        offset = 0
        for name, parameter in named:
            size = parameter.numel()
            parameter.data = self.vector.data[offset : offset + size].view(parameter.shape)
            parameter.grad = self.gradient[offset : offset + size].view(parameter.shape)
            self.layout.append(backends.Tensor(name, "parameter", tuple(parameter.shape), offset, size))
            offset += size
        offset = 0
        for name, buffer in self.buffers:
            self.layout.append(backends.Tensor(name, "buffer", tuple(buffer.shape), offset, buffer.numel()))
            offset += buffer.numel()

    def read_buffers(self) -> np.ndarray:
        """Every buffer, (B,) float64, which holds float32 and integers below 2**53 exactly."""
        rows = [buffer.detach().double().reshape(-1).cpu() for _, buffer in self.buffers]
        return torch.cat(rows).numpy() if rows else np.empty(0)

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set parameters and buffers. Raises OpsigError where their number is not the model's."""
        if state.params.shape != self.vector.shape:
            raise OpsigError(
                f"the checkpoint has {state.params.size:,} parameters and the task's model {self.vector.numel():,}. "
                "Give the --task and --model that the run was trained with"
            )
        self.vector.copy_(torch.from_numpy(np.ascontiguousarray(state.params)))
        if state.buffers.size == 0:
            return
        for (_, buffer), tensor in zip(self.buffers, self.layout[len(self.parameters) :], strict=True):
            row = state.buffers[tensor.offset : tensor.offset + tensor.size]
            buffer.copy_(torch.from_numpy(row.copy()).view(buffer.shape))


@contextmanager
def replaced(model: nn.Module, new: Mapping[nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """The model with tensors in the place of parameters, wherever each of them is used.

    torch.func.functional_call leaves a module that is entered under two names without its parameter.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in new
    ]
    recurrent = [(module, module._flat_weights) for module in model.modules() if isinstance(module, nn.RNNBase)]
    for module, name, parameter in places:
        module._parameters[name] = new[parameter]  # pyright: ignore[reportArgumentType]
    for module, own in recurrent:  # these keep a list of their parameters beside them
        module._flat_weights = [new.get(parameter, parameter) for parameter in own]  # pyright: ignore
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for module, own in recurrent:
            module._flat_weights = own


@contextmanager
def held_buffers(flat: FlatModel, held: Sequence[torch.Tensor]) -> Iterator[None]:
    """The model with tensors in the place of its buffers, in the order of `flat.buffers`."""
    names = {id(buffer): number for number, (_, buffer) in enumerate(flat.buffers)}
    places = [
        (module, name, buffer)
        for module in flat.model.modules()
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

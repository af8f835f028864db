"""A model whose trained parameters are views of one flat vector, and its buffers and frozen parameters as rows.

P trained parameters, F frozen ones, B buffers. One vector makes snapshots, optimizer state and norms a single array
operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from opsig_cli import backends
from opsig_cli.backends import State
from opsig_cli.errors import OpsigError


class FlatModel:
    """`model` on `device`, what it trains rebound to slices of `vector`, (P,), and the gradients to `gradient`'s.

    What is trained is what `requires_grad` says when the model is opened. Names in `order` come first, in that order.
    Raises OpsigError where nothing is trained.
    """

    def __init__(self, model: nn.Module, device: torch.device, double: bool, order: Sequence[str] = ()):
        dtype = torch.float64 if double else torch.float32
        self.model = model.to(device, dtype)
        named = list(model.named_parameters())  # tied parameters come once
        if order:
            named.sort(key=lambda each: order.index(each[0]) if each[0] in order else len(order))
        trained = [parameter for _, parameter in named if parameter.requires_grad]
        if not trained:
            what = "that is trained: requires_grad is False for all of them" if named else "at all"
            raise OpsigError(f"the task's model has no parameter {what}")
        self._named = dict(named)
        self.parameters = trained
        self.frozen = [parameter for _, parameter in named if not parameter.requires_grad]
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in trained]))
        self.gradient = torch.zeros_like(self.vector)
        self.vector.grad = self.gradient
        self.buffers = list(model.named_buffers())
        kinds = [(name, "parameter" if p.requires_grad else "frozen", p) for name, p in named]
        self.layout = _layout([*kinds, *((name, "buffer", buffer) for name, buffer in self.buffers)])
        for parameter, tensor in zip(trained, self._places("parameter"), strict=True):
            part = slice(tensor.offset, tensor.offset + tensor.size)
            parameter.data = self.vector.data[part].view(parameter.shape)
            parameter.grad = self.gradient[part].view(parameter.shape)
        self._frozen_row: np.ndarray | None = None

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of this name; scripted models have no `get_parameter`."""
        return self._named[name]

    def read_buffers(self) -> np.ndarray:
        """Every buffer, (B,) float64, which holds float32 and integers below 2**53 exactly."""
        rows = [buffer.detach().double().reshape(-1).cpu() for _, buffer in self.buffers]
        return torch.cat(rows).numpy() if rows else np.empty(0)

    def read_frozen(self) -> np.ndarray:
        """Every frozen parameter, (F,), the same array until others are loaded. It is read only.

        Raises OpsigError for integers that a float32 does not hold.
        """
        if self._frozen_row is None:
            dtype = self.vector.dtype
            row = torch.empty(sum(p.numel() for p in self.frozen), dtype=dtype)
            for parameter, tensor in zip(self.frozen, self._places("frozen"), strict=True):
                values = parameter.detach().cpu()
                if not torch.equal(values.to(dtype).to(values.dtype), values) and not values.is_floating_point():
                    raise OpsigError(f"{tensor.name} holds integers that a float32 does not hold. Make it a buffer")
                row[tensor.offset : tensor.offset + tensor.size] = values.reshape(-1)
            self._frozen_row = row.numpy()
            self._frozen_row.flags.writeable = False
        return self._frozen_row

    def has_frozen(self, row: np.ndarray) -> bool:
        """Whether the frozen parameters are those of this row, (F,), or it says nothing of them."""
        return row.size == 0 or row is self._frozen_row

    @torch.no_grad()
    def load_frozen(self, row: np.ndarray) -> None:
        """Set the frozen parameters, (F,). Raises OpsigError where their number is not the model's."""
        self._check_count("frozen parameters", row.size, sum(parameter.numel() for parameter in self.frozen))
        _fill(self.frozen, self._places("frozen"), row)
        self._frozen_row = row

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set trained parameters and buffers. Raises OpsigError where their number is not the model's."""
        self._check_count("parameters", state.params.size, self.vector.numel())
        self.vector.copy_(torch.from_numpy(np.ascontiguousarray(state.params)))
        if state.buffers.size:
            _fill([buffer for _, buffer in self.buffers], self._places("buffer"), state.buffers)

    @staticmethod
    def _check_count(what: str, count: int, expected: int) -> None:
        if count != expected:
            raise OpsigError(
                f"the checkpoint has {count:,} {what} and the task's model {expected:,}. "
                "Give the --task and --model that the run was trained with"
            )

    def _places(self, kind: str) -> list[backends.Tensor]:
        return [tensor for tensor in self.layout if tensor.kind == kind]


def _layout(named: Iterable[tuple[str, str, torch.Tensor]]) -> list[backends.Tensor]:
    """Where the tensors of these names and kinds lie, each kind in a row of its own."""
    found, offsets = [], Counter()
    for name, kind, tensor in named:
        found.append(backends.Tensor(name, kind, tuple(tensor.shape), offsets[kind], tensor.numel()))
        offsets[kind] += tensor.numel()
    return found


def _fill(tensors: Iterable[torch.Tensor], places: Iterable[backends.Tensor], row: np.ndarray) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        tensor.copy_(torch.from_numpy(row[place.offset : place.offset + place.size].copy()).view(tensor.shape))


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

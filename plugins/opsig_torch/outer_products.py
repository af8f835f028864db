"""Single samples' Hessians in few coordinates: where a layer sees one position, their vectors are outer products.

b samples of a block, O outputs and F inputs of a linear layer, one of them a 1 where it has a bias, K coordinates.

For a sample whose layer is entered by a and left with the gradient d, the layer's part of every image H v is
x a' + d y': the derivatives x of d and y of a along v. So is that of every eigenvector whose eigenvalue is not 0. With
unit vectors a^ and d^ such a matrix is p a^' + d^ q' with q orthogonal to a^, and (p, q) are O + F numbers in the place
of O F that keep lengths and angles: any solver works on them as on vectors. Other parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from opsig_torch import captured, plain
from opsig_torch.flat import replaced
from opsig_torch.opened import Opened
from opsig_torch.primitives import Primitives


@dataclass(frozen=True)
class Shape:
    """`layers` that see one position, whether the bias of each is trained with it, and all `other` parameters."""

    layers: list[nn.Linear]
    biased: list[bool]
    other: list[nn.Parameter]

    @property
    def widths(self) -> list[int]:
        """Coordinates of each layer's O, of its F, and of each other parameter, in order."""
        of_layers = [
            width
            for layer, biased in zip(self.layers, self.biased, strict=True)
            for width in (layer.out_features, layer.in_features + biased)
        ]
        return of_layers + [parameter.numel() for parameter in self.other]

    @property
    def is_all(self) -> bool:
        """Whether the coordinates hold every vector: there is no other where H v is 0."""
        return all(
            layer.out_features == 1 or layer.in_features + biased == 1
            for layer, biased in zip(self.layers, self.biased, strict=True)
        )


def shape_of(opened: Opened) -> Shape:
    """Which of the model's layers have their vectors in outer products, found at the first call."""
    if "outer" not in opened.kept:
        opened.kept["outer"] = _shape(opened)
    return opened.kept["outer"]


def _shape(opened: Opened) -> Shape:
    plan = captured.gradient_plan(opened)
    layers, biased, inside = [], [], set()
    alone = {places[0]: p for p, places in plan.covered.items() if len(places) == 1}
    for (module, name), weight in alone.items():
        if type(module) is not nn.Linear or name != "weight" or not captured.is_once(opened, plan, weight):
            continue
        bias = module.bias
        if bias is not None and bias.requires_grad and (module, "bias") not in alone:
            continue
        has_bias = bias is not None and bias.requires_grad
        if module.out_features + module.in_features < weight.numel():
            layers.append(module)
            biased.append(has_bias)
            inside |= {weight, bias} if has_bias else {weight}
    return Shape(layers, biased, [p for p in opened.flat.parameters if p not in inside])


class OuterProducts:
    """Hessians of these samples' losses, in the coordinates of `shape`."""

    def __init__(self, opened: Opened, samples: np.ndarray, shape: Shape):
        self._opened, self._shape = opened, shape
        self._batch = opened.batches.take(samples)
        plan = captured.gradient_plan(opened)
        weights: list[Any] = [layer.weight for layer in shape.layers]
        entering, leaving = [], []
        for found, biased in zip(captured.capture(opened, samples, plan, weights), shape.biased, strict=True):
            use = found.uses[0][0]
            entering.append(_with_one(use.inputs, biased))
            leaving.append(use.gradients)
        self._a, self._a_norm = _units(entering)
        self._d, self._d_norm = _units(leaving)

    def gradients(self) -> torch.Tensor:
        """The samples' gradients, (b, K)."""
        parts = []
        for a, a_norm, d, d_norm in zip(self._a, self._a_norm, self._d, self._d_norm, strict=True):
            parts += [a_norm * d_norm * d, torch.zeros_like(a)]
        if self._shape.other:
            with Primitives():
                parts.append(vmap(self._other_gradient)(self._batch))
        return torch.cat(parts, 1)

    def _other_gradient(self, item: Any) -> torch.Tensor:
        parameters = self._opened.flat.parameters
        constants = {parameter: parameter.detach() for parameter in parameters}

        def loss(at: list[torch.Tensor]) -> torch.Tensor:
            with replaced(self._opened.flat.model, constants | dict(zip(self._shape.other, at, strict=True))):
                return self._opened.batch_losses(tree_map(lambda leaf: leaf.unsqueeze(0), item), 2)[0]

        return plain.flattened(grad(loss)([parameter.detach() for parameter in self._shape.other]))

    def possible(self, rows: torch.Tensor, chosen: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """These coordinates (a, K) of chosen samples without what their layers cannot have.

        A solver that has exhausted the space of a sample goes on with rounding, which may be anything.
        """
        parts = rows.split(self._shape.widths, 1)
        found = list(parts)
        for number, (a, d) in enumerate(zip(self._a, self._d, strict=True)):
            p, q = parts[2 * number : 2 * number + 2]
            found[2 * number] = p * (a[chosen].square().sum(1, keepdim=True) > 0)
            found[2 * number + 1] = _apart(q, a[chosen]) * (d[chosen].square().sum(1, keepdim=True) > 0)
        return torch.cat(found, 1)

    def products(self, vectors: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        """Images (a, K) of vectors (a, K) under the Hessians of the samples at these places (a,) of the block."""
        chosen = torch.from_numpy(places).to(vectors.device)
        a, d = ([part[chosen] for part in parts] for parts in (self._a, self._d))
        with Primitives():
            batch = tree_map(lambda leaf: leaf[chosen.to(leaf.device)], self._batch)
            found = vmap(self._product)(self.possible(vectors, chosen), batch, a, d)
        parts = list(found)
        for number in range(len(self._shape.layers)):
            x, y = parts[2 * number : 2 * number + 2]
            a_norm, d_norm = self._a_norm[number][chosen], self._d_norm[number][chosen]
            parts[2 * number] = a_norm * x + d_norm * d[number] * (y * a[number]).sum(1, keepdim=True)
            parts[2 * number + 1] = d_norm * _apart(y, a[number])
        return torch.cat(parts, 1)

    def _product(
        self, vector: torch.Tensor, item: Any, a: Sequence[torch.Tensor], d: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """One sample's derivatives along a vector (K,): of each layer's d and a, and of other parameters' gradients."""
        opened, shape = self._opened, self._shape
        parts = vector.split(shape.widths)
        few = 2 * len(shape.layers)
        one = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        constants = {parameter: parameter.detach() for parameter in opened.flat.parameters}
        values = [parameter.detach() for parameter in shape.other]
        directions = [part.view(p.shape) for part, p in zip(parts[few:], shape.other, strict=True)]
        added = [vector.new_zeros(1, layer.out_features) for layer in shape.layers]

        def loss(inner: tuple[list[torch.Tensor], list[torch.Tensor]], length: torch.Tensor) -> Any:
            more, at = inner
            entered: list[Any] = [None] * len(shape.layers)

            def move(number: int) -> Callable[..., torch.Tensor]:
                p, q = parts[2 * number : 2 * number + 2]

                def hook(_: nn.Module, inputs: tuple, named: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
                    x = entered[number] = _with_one(
                        inputs[0] if inputs else next(iter(named.values())), shape.biased[number]
                    )
                    moved = (x @ a[number])[:, None] * p + (x @ q)[:, None] * d[number]
                    return output + length * moved + more[number]

                return hook

            with (
                replaced(opened.flat.model, constants | dict(zip(shape.other, at, strict=True))),
                _hooked(shape.layers, [move(number) for number in range(len(shape.layers))]),
            ):
                return opened.batch_losses(one, 2)[0], entered

        def slopes(at: list[torch.Tensor], length: torch.Tensor) -> Any:
            return grad(loss, has_aux=True)((added, at), length)

        one_more = vector.new_ones(())
        moved: Any = jvp(slopes, (values, torch.zeros_like(one_more)), (directions, one_more))[1]
        (d_moved, rest), a_moved = moved
        found = [part[0] for pair in zip(d_moved, a_moved, strict=True) for part in pair]
        return found + [part.reshape(-1) for part in rest]

    def lifted(self, coordinates: torch.Tensor, place: int) -> torch.Tensor:
        """The vector (P,) of one sample's coordinates (K,)."""
        parts = coordinates.split(self._shape.widths)
        by_parameter: dict[torch.Tensor, torch.Tensor] = {}
        for number, (layer, biased) in enumerate(zip(self._shape.layers, self._shape.biased, strict=True)):
            p, q = parts[2 * number : 2 * number + 2]
            whole = torch.outer(p, self._a[number][place]) + torch.outer(self._d[number][place], q)
            by_parameter[layer.weight] = whole[:, : layer.in_features]
            if biased:
                by_parameter[layer.bias] = whole[:, -1]
        by_parameter |= dict(zip(self._shape.other, parts[2 * len(self._shape.layers) :], strict=True))
        return torch.cat([by_parameter[parameter].reshape(-1) for parameter in self._opened.flat.parameters])


@contextmanager
def _hooked(layers: Sequence[nn.Module], hooks: Sequence[Callable[..., torch.Tensor]]):
    handles = [
        layer.register_forward_hook(hook, prepend=True, with_kwargs=True)
        for layer, hook in zip(layers, hooks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_one(inputs: torch.Tensor, biased: bool) -> torch.Tensor:
    return torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1) if biased else inputs


def _units(rows: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rows (b, n) of length one, or 0 where there is nothing, and the lengths (b, 1)."""
    norms = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in rows]
    return [part / norm.clamp_min(torch.finfo(part.dtype).tiny) for part, norm in zip(rows, norms, strict=True)], norms


def _apart(rows: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Rows without what lies along the unit vectors."""
    return rows - (rows * units).sum(1, keepdim=True) * units

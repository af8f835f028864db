"""Inner products of per-sample gradients, without an array of M x P. M chosen samples, P parameters, T positions.

A linear layer's gradient for one sample is an outer product, so a whole layer's M x M inner products are
(A A^T) * (D D^T) of its inputs A and output gradients D. Convolutions and layers over tokens sum over T positions:
their per-sample gradients are formed for a block of output rows at a time. All other parameters (normalisation,
embeddings, tied or loose ones) go through vmapped gradients, one block of sample pairs at a time. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from opsig_torch.flat import replaced

if TYPE_CHECKING:
    from opsig_torch.session import TorchSession

MEMORY_BYTES = 256 << 20
"""Bound on the activations held at a time, and on the block of per-sample gradients made from them."""


@dataclass
class _Layer:
    """One layer's input and output gradient for all chosen samples: (M, ...) each."""

    module: nn.Module
    inputs: torch.Tensor
    output_gradients: torch.Tensor


def gradient_gram(session: TorchSession, samples: np.ndarray) -> np.ndarray:
    """Inner products of the loss gradients of chosen samples at the loaded parameters, (M, M) float64.

    Memory: M x M in float64, MEMORY_BYTES for a group of layers and as much again for a block of gradients.
    """
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    covered = _covered_modules(session.flat.model)
    for group in _groups(session, samples, covered):
        for layer in _capture(session, samples, group):
            gram += _layer_gram(layer).cpu()
    names = {id(parameter) for module in covered for parameter in module.parameters(recurse=False)}
    rest = [name for name, p in session.flat.model.named_parameters() if id(p) not in names]
    if rest:
        gram += _loose_gram(session, samples, rest)
    return gram.numpy()


def mean_cosines(session: TorchSession, sets: list[np.ndarray]) -> np.ndarray:
    """Mean cosine of every sample's gradient with those of each set of samples, (S, G) float64; NaN where one is 0.

    It is the product with the mean of the set's unit gradients, so that no two samples' gradients meet: a layer applied
    with that mean for its weight, times the gradient at its output, sums to the product. One forward and backward pass
    over the set's samples and two over all; memory is bounded by one batch.
    """
    model = session.flat.model
    covered, rest = _parts(session)
    norms = _norms(session, covered, rest)
    directions = [_mean_unit_gradient(session, samples, norms) for samples in sets]
    products = torch.zeros(session.samples, len(sets), dtype=torch.float64)
    for samples in _batches(session):
        for layer in _capture(session, samples, covered):
            for column, direction in enumerate(directions):
                products[samples, column] += _layer_products(layer, direction).cpu()
        if rest:
            rows = _loose_gradients(session, samples, rest)
            for column, direction in enumerate(directions):
                flat = torch.cat([direction[model.get_parameter(name)].reshape(-1) for name in rest])
                products[samples, column] += (rows @ flat.double()).cpu()
    with np.errstate(invalid="ignore", divide="ignore"):
        return products.numpy() / norms[:, None]


def gradient_norms(session: TorchSession) -> np.ndarray:
    """Norm of every sample's loss gradient at the loaded parameters, (S,) float64, without an array of S x P."""
    return _norms(session, *_parts(session))


def _parts(session: TorchSession) -> tuple[list[nn.Module], list[str]]:
    """Layers whose gradients have a closed form, entered once, and the names of all other parameters."""
    model = session.flat.model
    covered = _covered_modules(model)
    _groups(session, np.arange(1), covered)  # takes out layers that are entered twice
    names = {id(parameter) for module in covered for parameter in module.parameters(recurse=False)}
    return covered, [name for name, p in model.named_parameters() if id(p) not in names]


def _batches(session: TorchSession) -> list[np.ndarray]:
    return [np.arange(s.start, s.stop) for s in session.batches.slices()]


def _norms(session: TorchSession, covered: list[nn.Module], rest: list[str]) -> np.ndarray:
    """Norm of every sample's gradient, (S,) float64."""
    squares = torch.zeros(session.samples, dtype=torch.float64)
    for samples in _batches(session):
        for layer in _capture(session, samples, covered):
            squares[samples] += _layer_squares(layer).cpu()
        if rest:
            squares[samples] += _loose_gradients(session, samples, rest).square().sum(1).cpu()
    return squares.sqrt().numpy()


def _mean_unit_gradient(
    session: TorchSession, samples: np.ndarray, norms: np.ndarray
) -> dict[nn.Parameter, torch.Tensor]:
    """Mean over the samples of their gradients of length one, by parameter."""
    parameters = session.flat.parameters
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for start in range(0, len(samples), session.batch_size):
        chosen = samples[start : start + session.batch_size]
        losses = session.task.losses(session.flat.model, session.batches.take(chosen))
        weights = torch.from_numpy(1 / (norms[chosen] * len(samples))).to(losses)
        gradients = torch.autograd.grad((losses * weights).sum(), parameters, materialize_grads=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient
    return dict(zip(parameters, total, strict=True))


def _layer_products(layer: _Layer, direction: dict[nn.Parameter, torch.Tensor]) -> torch.Tensor:
    """Product of every sample's gradient of this layer with the direction, (M,) float64."""
    module = layer.module
    weight = direction[module.weight]  # pyright: ignore[reportArgumentType]
    bias = None if module.bias is None else direction[module.bias]  # pyright: ignore[reportArgumentType]
    if isinstance(module, nn.Conv2d):
        outputs = nn.functional.conv2d(
            layer.inputs, weight, bias, module.stride, module.padding, module.dilation  # pyright: ignore
        )  # fmt: skip
    else:
        outputs = nn.functional.linear(layer.inputs, weight, bias)
    return (outputs.double() * layer.output_gradients.double()).flatten(1).sum(1)


def _layer_squares(layer: _Layer) -> torch.Tensor:
    """Squared norm of every sample's gradient of this layer, (M,) float64."""
    module, inputs, gradients = layer.module, layer.inputs, layer.output_gradients
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear) and inputs.ndim == 2:
        return (inputs.double().square().sum(1) + float(bias)) * gradients.double().square().sum(1)
    rows = _rows(module, gradients)
    squares = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    if bias:
        squares += rows.sum(2).double().square().sum(1)
    for block in _weight_gradients(module, inputs, rows):
        squares += block.double().square().sum(1)
    return squares


def _rows(module: nn.Module, gradients: torch.Tensor) -> torch.Tensor:
    """Output gradients as (M, outputs, T positions)."""
    return gradients.flatten(2) if isinstance(module, nn.Conv2d) else gradients.flatten(1, -2).transpose(1, 2)


def _covered_modules(model: nn.Module) -> list[nn.Module]:
    """Linear and convolution layers whose parameters no other module holds, in order of definition."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1

    def plain(module: nn.Module) -> bool:
        if isinstance(module, nn.Conv2d):
            supported = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        else:
            supported = type(module) is nn.Linear
        return supported and all(holders[id(p)] == 1 for p in module.parameters(recurse=False))

    return [module for module in model.modules() if plain(module)]


def _groups(session: TorchSession, samples: np.ndarray, modules: list[nn.Module]) -> list[list[nn.Module]]:
    """Layers in consecutive groups whose activations for all M samples fit the budget; layers that one forward pass
    enters more than once, or never, are taken out of `modules` for good."""
    sizes: dict[nn.Module, list[int]] = {module: [] for module in modules}

    def count(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        sizes[module].append(inputs[0].numel() + output.numel())

    handles = [module.register_forward_hook(count) for module in modules]
    with torch.no_grad():
        session.task.losses(session.flat.model, session.batches.take(samples[:1]))
    for handle in handles:
        handle.remove()
    modules[:] = [module for module in modules if len(sizes[module]) == 1]
    groups: list[list[nn.Module]] = []
    room = 0
    for module in modules:
        need = sizes[module][0] * len(samples) * 4
        if not groups or need > room:
            groups.append([])
            room = MEMORY_BYTES
        groups[-1].append(module)
        room -= need
    return groups


def _capture(session: TorchSession, samples: np.ndarray, modules: list[nn.Module]) -> list[_Layer]:
    """Inputs and output gradients of these layers for all chosen samples, batch by batch."""
    seen: dict[nn.Module, tuple[torch.Tensor, GradientEdge]] = {}

    def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        # The edge is taken now: an in-place ReLU that follows would shift the gradient past itself.
        seen[module] = (inputs[0].detach().clone(), get_gradient_edge(output))

    handles = [module.register_forward_hook(keep) for module in modules]
    parts: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {module: [] for module in modules}
    try:
        for start in range(0, len(samples), session.batch_size):
            batch = session.batches.take(samples[start : start + session.batch_size])
            losses = session.task.losses(session.flat.model, batch)
            gradients = torch.autograd.grad(losses.sum(), [seen[module][1] for module in modules])
            for module, gradient in zip(modules, gradients, strict=True):
                parts[module].append((seen[module][0], gradient))
    finally:
        for handle in handles:
            handle.remove()
    return [_Layer(m, torch.cat([a for a, _ in parts[m]]), torch.cat([d for _, d in parts[m]])) for m in modules]


def _layer_gram(layer: _Layer) -> torch.Tensor:
    module, inputs, gradients = layer.module, layer.inputs, layer.output_gradients
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear) and inputs.ndim == 2:
        return (_gram(inputs) + float(bias)) * _gram(gradients)
    gram = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs.device)
    rows = _rows(module, gradients)
    if bias:
        gram += _gram(rows.sum(2))
    for block in _weight_gradients(module, inputs, rows):
        gram += _gram(block)
    return gram


def _weight_gradients(module: nn.Module, inputs: torch.Tensor, rows_MOT: torch.Tensor) -> Iterator[torch.Tensor]:
    """Per-sample weight gradients as blocks of output rows, (M, rows x fan-in) each, within the memory budget."""
    count, outputs = rows_MOT.shape[:2]
    fan_in = next(iter(module.parameters(recurse=False))).numel() // outputs
    height = max(1, MEMORY_BYTES // (8 * count * fan_in))
    width = max(1, MEMORY_BYTES // (8 * fan_in * rows_MOT.shape[2]))  # samples whose patches are unfolded at a time
    for first in range(0, outputs, height):
        block = inputs.new_empty(count, min(height, outputs - first) * fan_in)
        for start in range(0, count, width):
            chosen = slice(start, start + width)
            patches_mTF = _patches(module, inputs[chosen])
            block[chosen] = torch.bmm(rows_MOT[chosen, first : first + height], patches_mTF).flatten(1)
        yield block


def _patches(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What each output position of the layer sees, (m, T, fan-in)."""
    if isinstance(module, nn.Conv2d):
        unfolded = nn.functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)  # pyright: ignore
        return unfolded.transpose(1, 2)
    return inputs.flatten(1, -2)


def _gram(rows: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows of a (M, D) array, (M, M), in float64: float32 sums of long rows lose digits."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    width = max(1, MEMORY_BYTES // (16 * len(rows)))
    for start in range(0, rows.shape[1], width):
        piece = rows[:, start : start + width].double()
        gram.addmm_(piece, piece.T)
    return gram


def _loose_gradients(session: TorchSession, samples: np.ndarray, names: list[str]) -> torch.Tensor:
    """Per-sample gradients over the parameters of these names, by vmap, (M, their number) float64."""
    model = session.flat.model
    loose = {name: model.get_parameter(name) for name in names}
    constants = {parameter: parameter.detach() for parameter in session.flat.parameters}

    def loss(parameters: dict[str, torch.Tensor], item: Any) -> torch.Tensor:
        batch = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, constants | {loose[name]: tensor for name, tensor in parameters.items()}):
            return session.task.losses(model, batch)[0]

    values = {name: parameter.detach() for name, parameter in loose.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be vmapped
        per_sample = vmap(grad(loss), (None, 0))(values, session.batches.take(samples))
    return torch.cat([per_sample[name].flatten(1) for name in names], 1).double()


def _loose_gram(session: TorchSession, samples: np.ndarray, names: list[str]) -> torch.Tensor:
    """Inner products over the parameters of these names, one block of sample pairs at a time."""
    size = sum(session.flat.model.get_parameter(name).numel() for name in names)
    height = max(1, min(len(samples), MEMORY_BYTES // (16 * size)))

    def gradients(start: int) -> torch.Tensor:
        return _loose_gradients(session, samples[start : start + height], names)

    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64)
    starts = range(0, len(samples), height)
    for i in starts:
        left = gradients(i)
        for j in starts[i // height :]:
            right = left if i == j else gradients(j)
            product = (left @ right.T).cpu()
            gram[i : i + len(left), j : j + len(right)] = product
            gram[j : j + len(right), i : i + len(left)] = product.T
    return gram

"""Seeded count sketches of per-sample gradients: M x K numbers from which all cosines can be estimated.

M samples, K numbers of a sketch, O output rows and F inputs of a row of a parameter. Every entry of a gradient is
multiplied by a random sign and added to a place of the sketch; the entries of a row go to consecutive places, modulo
K, from a random one on, so that a layer's inputs are added as a whole. Products of two sketches are unbiased estimates
of the gradients' inner products. As two entries meet with probability 1 / K, and those of one row never, their variance
for gradients of length one is at most 2 / K (Charikar, Chen & Farach-Colton 2002).
"""

from __future__ import annotations

import numpy as np
import torch

from opsig_torch import captured
from opsig_torch.alignment import directed, in_some_way, inverse_order, loose_blocks, require_norm, sample_batches
from opsig_torch.item_passes import grouped
from opsig_torch.layer_gradients import Captured
from opsig_torch.opened import Opened


def gradient_sketch(opened: Opened, samples: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sketches of the chosen samples' gradients at the loaded parameters, each gradient scaled to length one first.

    (M, size) float32, NaN where a gradient is 0. Memory: the sketches, a batch's activations, and a block of its
    gradients; never M x P.
    """
    order = grouped(opened, samples)
    found = in_some_way(opened, len(samples), lambda plan: _sketch(opened, samples[order], size, seed, plan))
    return found[inverse_order(order)]


def _sketch(opened: Opened, samples: np.ndarray, size: int, seed: int, plan: captured.Plan) -> np.ndarray:
    model = opened.flat.model
    number_of = {parameter: number for number, parameter in enumerate(opened.flat.parameters)}
    loose = {name: model.get_parameter(name) for name in plan.loose}
    places = {
        name: _Places(1, parameter.numel(), size, [seed, number_of[parameter]]) for name, parameter in loose.items()
    }
    parts, norms = [], []
    for part in sample_batches(opened, samples, plan):
        sketch = torch.zeros(len(part), size, device=opened.flat.vector.device)
        squares = torch.zeros(len(part), dtype=torch.float64, device=sketch.device)
        for parameter in captured.capture(opened, part, plan, list(plan.covered)):
            squares += parameter.squares()
            _add(sketch, parameter, [seed, number_of[parameter.parameter]])
        for chosen, rows in loose_blocks(opened, part, plan):
            squares[chosen] += rows.square().sum(1)
            split = rows.split([parameter.numel() for parameter in loose.values()], 1)
            for name, gradients in zip(loose, split, strict=True):
                places[name].scatter(sketch[chosen], slice(0, 1), gradients[:, None].float())
        norms.append(squares.sqrt().cpu().numpy())
        lengths = torch.from_numpy(directed(norms[-1])).to(sketch)
        parts.append((sketch / lengths[:, None]).float().cpu())
    require_norm(opened, samples, np.concatenate(norms))
    return torch.cat(parts).numpy()


def _add(sketch: torch.Tensor, parameter: Captured, seed: list[int]) -> None:
    """Add a parameter's per-sample gradients to the sketches, (M, K)."""
    size = sketch.shape[1]
    if not parameter.is_weight:
        rows = parameter.all_rows()
        _Places(1, rows.shape[1], size, seed).scatter(sketch, slice(0, 1), rows[:, None])
        return
    places = _Places(parameter.height, parameter.fan_in, size, seed)
    use = parameter.uses[0][0]
    if len(parameter.uses) == 1 and isinstance(use.module, torch.nn.Linear) and use.outputs_MTO.shape[1] == 1:
        places.add_outer(sketch, use.outputs_MTO[:, 0], use.inputs.flatten(1))
        return
    for chosen, rows, block in parameter.blocks():
        places.scatter(sketch[chosen], rows, block)


class _Places:
    """Where the entries of one parameter, (O, F), go in a sketch, and with which sign."""

    def __init__(self, height: int, fan_in: int, size: int, seed: list[int]):
        generator = np.random.default_rng(seed)
        self._size = size
        self._pieces = [slice(first, min(first + size, fan_in)) for first in range(0, fan_in, size)]
        self._first = torch.from_numpy(generator.integers(0, size, (height, len(self._pieces))))
        self._signs = torch.from_numpy(generator.integers(0, 2, (height, fan_in), dtype=np.int8) * 2 - 1)

    def add_outer(self, sketch: torch.Tensor, outputs_MO: torch.Tensor, inputs_MF: torch.Tensor) -> None:
        """Add outer products of outputs and inputs to sketches (M, K), a row of the parameter at a time."""
        for row in range(len(self._first)):
            signed = inputs_MF * self._signs[row].to(inputs_MF)
            for piece, first in zip(self._pieces, self._first[row].tolist(), strict=True):
                part = signed[:, piece]
                fits = min(part.shape[1], self._size - first)
                factor = outputs_MO[:, row, None]
                sketch[:, first : first + fits].addcmul_(part[:, :fits], factor)
                sketch[:, : part.shape[1] - fits].addcmul_(part[:, fits:], factor)

    def scatter(self, sketch: torch.Tensor, rows: slice, block: torch.Tensor) -> None:
        """Add (m, o, F), the gradients of these rows of the parameter, to contiguous sketches (m, K)."""
        signed = block * self._signs[rows].to(block)
        samples = self._size * torch.arange(len(block), device=block.device)[:, None, None]
        for number, piece in enumerate(self._pieces):
            along = torch.arange(piece.stop - piece.start)
            places = (self._first[rows, number, None] + along) % self._size
            places = (places.to(block.device) + samples).flatten()
            sketch.view(-1).index_add_(0, places, signed[:, :, piece].flatten())

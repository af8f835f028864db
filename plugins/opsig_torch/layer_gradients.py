"""Per-sample gradients of single parameters, from what enters and leaves the layers that use them.

M samples, T positions, O output rows, F inputs of a row (fan-in), G directions. No array of M x P is made. A weight's
gradient for one sample is a sum over positions of outer products d_t a_t^T; a parameter that several layers share, or
one layer uses several times, has the sum over its uses. `opsig_torch.captured` finds the parameters for which this
holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

MEMORY_BYTES = 6 << 28
"""Bound on what is held of all samples at a time: activations, or gradients where these are smaller."""
BLOCK_BYTES = 64 << 20
"""Bound on the gradients that are made from held activations at a time."""
PIECE_BYTES = 2 << 20
"""Bound on what is worked on at a time where all samples are not needed together: what a processor's cache holds."""
COLUMNS = 4096
"""Longest sums that are left to float32; longer ones are added up in float64."""
TILE = 128
"""Rows of a Gram matrix that are made at a time; fewer waste less above the diagonal, more multiply faster."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is the linear one of transformers, whose weight is (F, O)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


@dataclass(frozen=True)
class Room:
    """Bytes that may be held of all `samples` at a time, and of a `block` of gradients."""

    samples: int = MEMORY_BYTES
    block: int = BLOCK_BYTES


@dataclass
class Use:
    """One entry of a layer: what went in and the gradient at what came out, (M, ...) each."""

    module: nn.Module
    inputs: torch.Tensor
    gradients: torch.Tensor

    @cached_property
    def outputs_MTO(self) -> torch.Tensor:
        """Gradients at the output by position."""
        if isinstance(self.module, nn.Conv2d):
            return self.gradients.flatten(2).transpose(1, 2)
        return self.gradients.flatten(1, -2) if self.gradients.ndim > 2 else self.gradients[:, None]

    def inputs_mTF(self, chosen: slice) -> torch.Tensor:
        """What each position of the layer sees, for some of the samples; not for an embedding."""
        inputs, module = self.inputs[chosen], self.module
        if isinstance(module, nn.Conv2d):
            unfolded = _unfolded(inputs, module)
            return unfolded.transpose(1, 2)
        return inputs.flatten(1, -2) if inputs.ndim > 2 else inputs[:, None]

    def empty(self, samples: int) -> Use:
        """An empty one for so many samples."""
        inputs, gradients = (part.new_empty(samples, *part.shape[1:]) for part in (self.inputs, self.gradients))
        return Use(self.module, inputs, gradients)

    def put(self, samples: slice, part: Use) -> None:
        """Take over a batch."""
        self.inputs[samples] = part.inputs
        self.gradients[samples] = part.gradients

    def weight_blocks(
        self, chosen: slice, heights: list[slice], out: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:  # fmt: skip
        """Weight gradients of some samples, (m, o, F), for each of these slices of output rows; `out` may take them."""
        outputs = self.outputs_MTO[chosen]
        if isinstance(self.module, nn.Embedding):
            ids = self.inputs[chosen].flatten(1)
            for rows in heights:
                height = rows.stop - rows.start
                inside = (ids >= rows.start) & (ids < rows.stop) & self._counts(ids)
                place = (ids - rows.start + height * torch.arange(len(ids), device=ids.device)[:, None])[inside]
                block = outputs.new_zeros(len(ids), height, outputs.shape[2]) if out is None else out.zero_()
                block.flatten(0, 1).index_add_(0, place, outputs[inside])
                yield block
            return
        inputs = self.inputs_mTF(chosen)
        for rows in heights:
            yield torch.bmm(outputs[:, :, rows].transpose(1, 2), inputs, out=out)

    def similar_mTT(self, chosen: slice) -> torch.Tensor:
        """Inner products of the inputs at every two positions of each sample."""
        if isinstance(self.module, nn.Embedding):
            ids = self.inputs[chosen].flatten(1)
            return (ids[:, :, None] == ids[:, None]) & self._counts(ids)[:, None]
        inputs = self.inputs_mTF(chosen)
        return torch.bmm(inputs, inputs.transpose(1, 2))

    def _counts(self, ids: torch.Tensor) -> torch.Tensor:
        """Where an embedding's row has a gradient: not that of padding."""
        padding = self.module.padding_idx
        return torch.ones_like(ids, dtype=torch.bool) if padding is None else torch.ne(ids, padding)  # pyright: ignore

    def rows(self, name: str) -> torch.Tensor:
        """Gradients of a bias, or of a normalisation's scale or shift, (M, its size)."""
        module, gradients = self.module, self.gradients
        if not (_is_linear(module) or isinstance(module, (nn.Conv2d, *NORMS))):
            return self._rows_by_differentiating(name)
        if isinstance(module, NORMS) and name == "weight":
            gradients = gradients * _normalised(module, self.inputs)
        if isinstance(module, nn.LayerNorm):
            return gradients.reshape(len(gradients), -1, module.weight.numel()).sum(1)
        channel_first = not _is_linear(module)
        if gradients.ndim > 2:
            return gradients.flatten(2).sum(2) if channel_first else gradients.flatten(1, -2).sum(1)
        return gradients

    def _rows_by_differentiating(self, name: str) -> torch.Tensor:
        """Gradients of a parameter of a layer that sees each sample alone, by the layer's own derivative, (M, size)."""

        def one(entering: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
            def layer(value: torch.Tensor) -> torch.Tensor:
                return functional_call(self.module, {name: value}, (entering[None],))

            return vjp(layer, self.module.get_parameter(name).detach())[1](gradient[None])[0]

        return vmap(one)(self.inputs, self.gradients).flatten(1)

    def transposed(self) -> Use:
        """The use of a layer whose weight is stored the other way round, (F, O): what goes in and what comes back
        change places."""
        return Use(self.module, self.gradients, self.inputs)


@dataclass
class Captured:
    """One parameter's per-sample gradients: by its uses, each with the parameter's name in the module."""

    parameter: nn.Parameter
    uses: list[tuple[Use, str]]
    is_weight: bool
    room: Room = Room()
    samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.samples = len(self.uses[0][0].inputs)
        self.height = self.parameter.shape[0]
        self.fan_in = self.parameter.numel() // self.height

    def empty(self, samples: int) -> Captured:
        """An empty one for so many samples."""
        uses = [(use.empty(samples), name) for use, name in self.uses]
        return Captured(self.parameter, uses, self.is_weight, self.room)

    def put(self, samples: slice, part: Captured) -> None:
        """Take over a batch."""
        for (whole, _), (use, _) in zip(self.uses, part.uses, strict=True):
            whole.put(samples, use)

    def squares(self) -> torch.Tensor:
        """Squared norms, (M,) float64."""
        if not self.is_weight:
            return self.all_rows().square().sum(1, dtype=torch.float64)
        use = self.uses[0][0]
        outputs = use.outputs_MTO
        positions = outputs.shape[1]
        if len(self.uses) == 1 and positions == 1 and _is_linear(use.module):
            inputs = use.inputs.flatten(1).square().sum(1, dtype=torch.float64)
            return inputs * outputs.flatten(1).square().sum(1, dtype=torch.float64)
        squares = torch.zeros(self.samples, dtype=torch.float64, device=outputs.device)
        if len(self.uses) == 1 and self._positions_are_few(use):
            for chosen in _slices(self.samples, positions * (positions + self.fan_in)):
                part = outputs[chosen]
                products = torch.bmm(part, part.transpose(1, 2)) * use.similar_mTT(chosen)
                squares[chosen] = products.flatten(1).sum(1, dtype=torch.float64).clamp_(min=0)
            return squares
        for chosen, _, block in self.blocks():
            squares[chosen] += torch.linalg.vector_norm(block.flatten(1), dim=1).double().square()
        return squares

    def products(self, directions_GP: torch.Tensor) -> torch.Tensor:
        """Inner products with directions of the parameter's size, (M, G) float64."""
        if not self.is_weight:
            return (self.all_rows() @ directions_GP.T).double()
        use = self.uses[0][0]
        if len(self.uses) == 1 and _is_linear(use.module) and use.outputs_MTO.shape[1] == 1:
            images = use.inputs.flatten(1) @ directions_GP.reshape(-1, self.fan_in).T
            images = images.view(self.samples, len(directions_GP), self.height)
            return torch.einsum("mgo,mo->mg", images, use.outputs_MTO[:, 0]).double()
        total = torch.zeros(self.samples, len(directions_GP), dtype=torch.float64, device=directions_GP.device)
        directions = directions_GP.view(len(directions_GP), self.height, self.fan_in)
        for chosen, rows, block in self.blocks():
            total[chosen] += block.flatten(1) @ directions[:, rows].flatten(1).T
        return total

    def add_gram(self, gram: torch.Tensor) -> None:
        """Add a weight's inner products of every two samples to the lower triangle of `gram`, (M, M) float64."""
        use = self.uses[0][0]
        positions = use.outputs_MTO.shape[1]
        linear = _is_linear(use.module) and positions == 1
        held = self.samples * positions * self.fan_in * 16 <= self.room.samples
        if len(self.uses) == 1 and not isinstance(use.module, nn.Embedding) and (
            linear or (held and positions**2 * (self.fan_in + self.height) < self.fan_in * self.height)
        ):  # fmt: skip
            self._add_gram_of_positions(gram, use)
            return
        height = min(self.height, max(1, self.room.block // (4 * self.samples * self.fan_in)))
        # One room for all blocks: the first touch of fresh memory takes as long as making the gradients.
        room = use.gradients.new_empty(self.samples * height * self.fan_in)
        for first in range(0, self.height, height):
            add_gram(gram, self._rows_of_weight(slice(first, min(first + height, self.height)), room))

    def gradients(self) -> torch.Tensor:
        """The gradients themselves, (M, the parameter's size)."""
        if not self.is_weight:
            return self.all_rows()
        room = self.uses[0][0].gradients.new_empty(self.samples * self.parameter.numel())
        return self._rows_of_weight(slice(0, self.height), room)

    def _rows_of_weight(self, rows: slice, room: torch.Tensor) -> torch.Tensor:
        """Gradients of some output rows, (M, o F), made in the first part of `room`."""
        shape = (self.samples, rows.stop - rows.start, self.fan_in)
        block = room[: math.prod(shape)].view(shape)
        for chosen in _slices(self.samples, self.fan_in * self._positions()):
            self._block(chosen, [rows], out=block[chosen])
        return block.flatten(1)

    def sample_gradient(self, sample: int) -> torch.Tensor:
        """One sample's gradient, shaped as the parameter."""
        if not self.is_weight:
            return self.all_rows()[sample].view_as(self.parameter)
        return self._block(slice(sample, sample + 1), [slice(0, self.height)])[0][0].view_as(self.parameter)

    def _positions_are_few(self, use: Use) -> bool:
        """Whether a sample's inner products between positions cost less than its gradient does."""
        positions = use.outputs_MTO.shape[1]
        if isinstance(use.module, nn.Embedding):
            return positions * positions <= self.height * self.fan_in
        return positions * (self.fan_in + self.height) < self.fan_in * self.height

    def _add_gram_of_positions(self, gram: torch.Tensor, use: Use) -> None:
        """Sums over the positions of two samples of (inputs' product) x (outputs' product)."""
        inputs = use.inputs_mTF(slice(None)).flatten(0, 1)
        outputs = use.outputs_MTO.flatten(0, 1)
        positions = use.outputs_MTO.shape[1]
        tile = max(1, min(TILE, self.room.samples // (32 * positions * len(outputs))))
        for first in range(0, self.samples, tile):
            last = min(first + tile, self.samples)
            here, before = slice(first * positions, last * positions), slice(0, last * positions)
            products = inner(inputs[here], inputs[before]) * inner(outputs[here], outputs[before])
            if positions > 1:
                products = products.view(last - first, positions, last, positions).sum((1, 3))
            gram[first:last, :last] += products

    def all_rows(self) -> torch.Tensor:
        """Gradients of a parameter that is no weight, (M, its size)."""
        total = self.uses[0][0].rows(self.uses[0][1])
        for use, name in self.uses[1:]:
            total = total + use.rows(name)
        return total

    def _positions(self) -> int:
        return max(use.outputs_MTO.shape[1] for use, _ in self.uses)

    def blocks(self) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Weight gradients piece by piece: the samples, the output rows, and (m, o, F)."""
        height = max(1, PIECE_BYTES // (4 * self.fan_in))
        heights = [slice(a, min(a + height, self.height)) for a in range(0, self.height, height)]
        for chosen in _slices(self.samples, self.fan_in * max(self._positions(), self.height)):
            for rows, block in zip(heights, self._block(chosen, heights), strict=True):
                yield chosen, rows, block

    def _block(self, chosen: slice, heights: list[slice], out: torch.Tensor | None = None) -> list[torch.Tensor]:
        blocks = list(self.uses[0][0].weight_blocks(chosen, heights, out))
        for use, _ in self.uses[1:]:
            for block, more in zip(blocks, use.weight_blocks(chosen, heights), strict=True):
                block += more
        return blocks


def add_gram(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the inner products of rows (M, D) to the lower triangle of `gram`, (M, M) float64."""
    for column in range(0, rows.shape[1], COLUMNS):
        for first in range(0, len(rows), TILE):
            last = min(first + TILE, len(rows))
            piece = rows[:last, column : column + COLUMNS]
            gram[first:last, :last] += piece[first:] @ piece.T


def _normalised(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a normalisation scales and shifts."""
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(inputs, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(inputs, module.num_groups, eps=module.eps)
    assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
    return F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)


def _unfolded(inputs: torch.Tensor, module: nn.Conv2d) -> torch.Tensor:
    """What a convolution sees at every position, (M, C kh kw, T), as F.unfold gives it but several times faster."""
    (down, right), (pad_y, pad_x) = module.stride, module.padding
    padded = F.pad(inputs, (int(pad_x), int(pad_x), int(pad_y), int(pad_y)))
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    height, width = (
        (size - far - 1) // step + 1 for size, far, step in zip(padded.shape[2:], reach, (down, right), strict=True)
    )
    a, b, y, x = padded.stride()
    windows = padded.as_strided(
        (*padded.shape[:2], *module.kernel_size, height, width),
        (a, b, y * module.dilation[0], x * module.dilation[1], y * down, x * right),
    )
    return windows.reshape(len(inputs), -1, height * width)


def _slices(count: int, floats: int) -> list[slice]:
    """Consecutive slices of samples of which each takes so many floats, within PIECE_BYTES."""
    width = max(1, PIECE_BYTES // (4 * max(1, floats)))
    return [slice(first, min(first + width, count)) for first in range(0, count, width)]


def inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Inner products of rows, summed in float64 beyond COLUMNS columns."""
    if left.shape[1] <= COLUMNS:
        return left @ right.T
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for column in range(0, left.shape[1], COLUMNS):
        piece = slice(column, column + COLUMNS)
        total += left[:, piece] @ right[:, piece].T
    return total

"""Tensors of a checkpoint that have not been read yet, whatever the format, and where in files their numbers lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from opsig_cli.errors import OpsigError

SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4, "uint64": 8,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
"""Bytes of a number, by torch's name of its type."""


@dataclass(frozen=True)
class Piece:
    """`count` numbers of a tensor from `start` on, in its own order, that lie one after the other in a file: `offset`
    is in bytes, and `dtype` one of SIZES."""

    path: str
    offset: int
    dtype: str
    start: int
    count: int


class Entry:
    """A tensor that has not been read yet. `read` returns a torch tensor on the CPU; `pieces` where its numbers lie, or
    None where they do not lie in a file as they are."""

    def __init__(self, shape: Sequence[int], read: Callable[[], Any], pieces: Sequence[Piece] | None = None):
        self.shape, self._read, self._pieces = tuple(shape), read, pieces

    def read(self) -> Any:
        """The tensor, mapped from its file where the format allows."""
        return self._read()

    def pieces(self) -> Sequence[Piece] | None:
        """Where its numbers lie, in its own order."""
        return self._pieces

    def numel(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


def tensor_of(values: Any) -> Any:
    """A numpy array as a torch tensor; bfloat16, which numpy saves as two bytes without a type, as such."""
    import torch

    if values.dtype.name == "bfloat16" or values.dtype.str[1:] == "V2":
        return torch.from_numpy(values.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


class Split(Entry):
    """A tensor of which a file holds one process's part alone."""

    def __init__(self, shape: Sequence[int], path: str):
        super().__init__(shape, self._refuse)
        self._path = path

    def _refuse(self) -> NoReturn:
        raise OpsigError(
            f"{self._path} holds one process's part of its tensors. Save with torch.distributed.checkpoint, whose "
            "folder is read as it is, or the full state dict (get_model_state_dict with full_state_dict=True)"
        )


def assembled(shape: Sequence[int], parts: Sequence[tuple[Sequence[int], Entry]], pieces: bool = True) -> Entry:
    """A tensor out of blocks, each with the place of its first element.

    Blocks that are whole along all axes but the first lie in the tensor as they lie in their files.
    """
    shape = tuple(shape)
    row = math.prod(shape[1:])

    def read() -> Any:
        import torch

        if len(parts) == 1 and parts[0][1].shape == shape:
            return parts[0][1].read()
        whole = None
        for place, part in parts:
            block = part.read()
            if whole is None:
                whole = torch.zeros(shape, dtype=block.dtype)
            whole[tuple(slice(a, a + n) for a, n in zip(place, block.shape, strict=True))] = block
        return torch.zeros(shape) if whole is None else whole

    found: list[Piece] | None = []
    for place, part in parts if pieces else ():
        lie = part.pieces()
        if lie is None or any(place[1:]) or part.shape[1:] != shape[1:]:
            found = None
            break
        first = place[0] * row if place else 0
        found += [Piece(each.path, each.offset, each.dtype, first + each.start, each.count) for each in lie]
    return Entry(shape, read, found if pieces else None)


def cut(parts: Sequence[Entry], first: int, shape: Sequence[int]) -> Entry:
    """A tensor out of consecutive flat parts, from their number `first` on: how flat partitions hold parameters."""
    size, spans, begin = math.prod(shape), [], 0
    for part in parts:
        length = part.numel()
        low, high = max(first, begin), min(first + size, begin + length)
        if low < high:
            spans.append((part, low - begin, high - begin, low - first))
        begin += length

    def read() -> Any:
        import torch

        flat = [part.read().reshape(-1)[low:high] for part, low, high, _ in spans]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).view(tuple(shape))

    pieces: list[Piece] | None = []
    for part, low, high, at in spans:
        for each in part.pieces() or ():
            a, b = max(low, each.start), min(high, each.start + each.count)
            if a < b:
                place = each.offset + (a - each.start) * SIZES[each.dtype]
                pieces.append(Piece(each.path, place, each.dtype, at + a - low, b - a))
    if sum(each.count for each in pieces) != size:
        pieces = None
    if sum(high - low for _, low, high, _ in spans) != size:
        raise OpsigError(f"partitions of a flat group hold {begin:,} numbers, and a parameter ends at {first + size:,}")
    return Entry(shape, read, pieces)

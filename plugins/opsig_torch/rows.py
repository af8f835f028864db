"""Long vectors that are taken in one by one, never copied, and their inner products. n rows of P numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch

from opsig_torch.arithmetic import narrow

BLOCK = 16
"""Rows that are allocated at a time."""
PIECE = 1 << 14
"""Columns whose products are summed in the rows' own precision: sums of so many pieces are float64, and float32's error
is some 5e-9 of the two lengths; 2e-5 at the worst, where all numbers are the same and roundings do not cancel."""
FEW = 4
"""Combinations below which oneDNN's preparations take longer than the product of matrices does."""


class Rows:
    """Rows (n, P) in blocks that stay where they are as more come."""

    def __init__(self, first: torch.Tensor):
        """Begin with these rows (m, P), which are not copied."""
        self._blocks = [first] if len(first) else []
        self.like = first
        self._last = 0  # rows that the last block, which is BLOCK long, holds
        self.count = len(first)

    def put(self, *rows: torch.Tensor) -> torch.Tensor:
        """Take in more, (P,) each, a divisor of BLOCK at a time; they as they are held, (m, P)."""
        if self._last in (0, BLOCK):
            self._blocks.append(self.like.new_empty(BLOCK, self.like.shape[1]))
            self._last = 0
        held = self._blocks[-1][self._last : self._last + len(rows)]
        for place, row in zip(held, rows, strict=True):
            place.copy_(row)
        self._last += len(rows)
        self.count += len(rows)
        return held

    def products(self, others: torch.Tensor, first: int = 0, every: int = 1) -> np.ndarray:
        """Inner products (n, c) with others (c, P), summed in float64 over PIECE columns at a time; of every so many
        rows from the first on."""
        found = [inner(block, others) for block in self._from(first, every)]
        return np.concatenate(found) if found else np.zeros((0, len(others)))

    def combine(self, coefficients: np.ndarray, first: int = 0, every: int = 1) -> torch.Tensor:
        """Combinations (k, P) of rows by coefficients (n, k), of every so many rows from the first on."""
        total, place = None, 0
        with narrow() if coefficients.shape[1] < FEW else nullcontext():
            for block in self._from(first, every):
                some = torch.from_numpy(coefficients[place : place + len(block)].T.copy()).to(block)
                total = some @ block if total is None else total.addmm_(some, block)
                place += len(block)
        return self.like.new_zeros(coefficients.shape[1], self.like.shape[1]) if total is None else total

    def keep(self, count: int) -> None:
        """Forget all rows but the first so many, which are those it began with."""
        assert count == (len(self._blocks[0]) if count else 0)
        self._blocks = self._blocks[: 1 if count else 0]
        self._last, self.count = 0, count

    def _from(self, first: int, every: int) -> Iterator[torch.Tensor]:
        """Views of the rows first, first + every, ... in each block."""
        begin = 0
        for number, block in enumerate(self._blocks):
            held = min(len(block), self.count - begin)
            skip = first - begin if first > begin else (begin - first) % every and every - (begin - first) % every
            if skip < held:
                yield block[:held][skip::every]
            begin += len(block) if number < len(self._blocks) - 1 else held


def inner(rows: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """Inner products (n, c) of rows (n, P) with others (c, P), summed in float64 over PIECE columns at a time."""
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=others.device)
    with narrow():
        for left, right in zip(rows.split(PIECE, 1), others.split(PIECE, 1), strict=True):
            total += left @ right.T
    return total.cpu().numpy()

"""How much every sample swings at period two, from one pass over losses.

T steps, S samples, R rows of a piece, W steps of a moving mean. Losses come in blocks of consecutive rows, (., S); what
is worked on are pieces of few rows and tiles of few samples, so that a tile's arrays stay in the processor's cache, and
what a piece needs of the rows before it is carried as the differences and sums that they were made into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH = 16
"""W: steps that are averaged over; a power of two."""

ALTERNATES = 0.75
"""An alternation above this is period two: white noise gives 0.35, a smooth curve next to 0, and losses that only fall,
however unevenly, at most the root of a half."""

TILE = 4096
"""Samples worked on at a time."""
_PIECE_ROWS = 32
_PIECE_BYTES = 64 << 20
_REACHES = (1, 1, *(1 << power for power in range(WIDTH.bit_length() - 1)))
"""Rows back to the other part of each difference or sum: of losses, of their changes, and then of sums of 1, 2, 4, ...
second differences."""


@dataclass(frozen=True)
class Swings:
    """Of the R rows of a piece; rows with fewer than W + 1 before them hold nothing that means anything but `mean_R`.

    `swing_RS` float32: the sum over the W second differences that end with a row's of (-1)^t (L_{t+1} - 2 L_t +
    L_{t-1}), its sign that of the last. `alternation_R`: see `Movement`. `spread_R`: the swings' root mean square over
    samples. `mean_R`: the mean loss.
    """

    swing_RS: np.ndarray
    alternation_R: np.ndarray
    spread_R: np.ndarray
    mean_R: np.ndarray


def swings(blocks: Iterable[np.ndarray]) -> Iterator[tuple[Swings, list[np.ndarray]]]:
    """The swings of consecutive pieces of losses, and each piece's rows, R arrays (S,).

    `swing_RS` is overwritten by the next one.
    """
    running = None
    for piece in _pieces(blocks):
        running = running or _Running(piece[0].shape[1])
        yield running.take(piece), [row for part in piece for row in part]
        piece.clear()  # nothing is held of it while the next is read


class _Running:
    """Differences and moving sums of rows as they come."""

    def __init__(self, samples: int):
        self._carried = [np.zeros((reach, samples), np.float32) for reach in _REACHES]
        self._movement = np.zeros(WIDTH)  # at each of the last rows: all samples' squared half changes
        self._room = np.empty((0, samples), np.float32)

    def take(self, piece: Sequence[np.ndarray]) -> Swings:
        """The swings of the next R rows, given as arrays (., S) that follow one another."""
        count, samples = sum(map(len, piece)), piece[0].shape[1]
        if len(self._room) < count:
            self._room = np.empty((count, samples), np.float32)
        swing = self._room[:count]
        total, movement, power = np.zeros((3, count))
        room = [np.empty((reach + count, min(TILE, samples)), np.float32) for reach in _REACHES]
        for first in range(0, samples, TILE):
            tile = slice(first, first + TILE)
            stages = room if first + TILE <= samples else [each[:, : samples - first] for each in room]
            at = 1
            for part in piece:
                stages[0][at : at + len(part)] = part[:, tile]
                at += len(part)
            target = swing[:, tile]
            for order, (stage, reach, carried) in enumerate(zip(stages, _REACHES, self._carried, strict=True)):
                stage[:reach] = carried[:, tile]
                carried[:, tile] = stage[-reach:]
                made = target if stage is stages[-1] else stages[order + 1][_REACHES[order + 1] :]
                # Second differences alternate in sign, so that the first sum over them is a difference, too.
                (np.subtract if order < 3 else np.add)(stage[reach:], stage[:-reach], out=made)
            total += stages[0][1:].sum(1, dtype=np.float64)
            movement += np.vecdot(stages[1][1:], stages[1][1:])
            power += np.vecdot(target, target)
        return Swings(swing, self._alternation(movement / 4, power), np.sqrt(power / samples), total / samples)

    def _alternation(self, movement: np.ndarray, power: np.ndarray) -> np.ndarray:
        """At period two a change is twice the amplitude; each second difference is of two changes, and at most as large
        as both are."""
        movement = np.concatenate([self._movement, movement])
        self._movement = movement[-WIDTH:]
        total = np.convolve((movement[1:] + movement[:-1]) / 2, np.full(WIDTH, 1 / WIDTH), "valid")
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(power / (4 * WIDTH) ** 2 / total)


def _pieces(blocks: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Blocks of rows of any height cut, or put together, to so many rows as are worked on at once."""
    waiting: list[np.ndarray] = []
    lacking = 0
    for block in blocks:
        while len(block):
            if not waiting:
                lacking = max(1, min(_PIECE_ROWS, _PIECE_BYTES // (4 * max(1, block.shape[1]))))
            waiting.append(block[:lacking])
            block, lacking = block[lacking:], lacking - len(waiting[-1])
            if not lacking:
                yield waiting
                waiting = []
    if waiting:
        yield waiting

"""Rows held against the checksums that are stored with them, and how work goes on without those that are damaged.

N rows of a group, in any order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.rows import column_checksum, fill_of, is_fill

SHOWN = 8
"""Damaged steps that a message names one by one."""
Result = TypeVar("Result")
_CRC32 = np.array([~zlib.crc32(bytes([byte]), 0xFFFFFFFF) & 0xFFFFFFFF for byte in range(256)], np.uint32)
"""What one byte makes of crc32's register."""


class DamagedRows(OpsigError):
    """Rows of a group are not what was written. `leave_out()` takes all of the group's damaged rows out of what the
    open file presents, and says which in one line; raised on, it is a refusal."""

    def __init__(self, path: str, group: str, steps: Sequence[int], leave_out: Callable[[], str]):
        whose = "its checksum is wrong" if len(steps) == 1 else "their checksums are wrong"
        super().__init__(
            f"{path}: {group} at {named_steps(steps)} {'is' if len(steps) == 1 else 'are'} damaged: {whose}. "
            f"See what is intact: opsig verify {path}"
        )
        self.leave_out = leave_out


def without_damage(work: Callable[[], Result], say: Callable[[str], None]) -> Result:
    """What `work()` returns; where it meets damaged rows it is done again from the start as if they had never been
    recorded, and `say` is told. At most one more time for each row group of each file."""
    while True:
        try:
            return work()
        except DamagedRows as damaged:
            say(damaged.leave_out())


def named_steps(steps: Sequence[int]) -> str:
    """Steps in words, the first few by number.

    >>> named_steps([7]), named_steps(range(20))
    ('step 7', 'steps 0, 1, 2, 3, 4, 5, 6, 7 and 12 more')
    """
    listed = ", ".join(str(step) for step in steps[:SHOWN])
    more = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
    return f"step{'s' if len(steps) != 1 else ''} {listed}{more}"


def row_checksums(name: str, values: np.ndarray) -> np.ndarray:
    """crc32 of a dataset's name and of its bytes in each row, (N,) uint32; 0 where nothing was measured.

    `values` (N, ...) as the file holds them.
    """
    found = np.zeros(len(values), np.uint32)
    if not values.size:
        return found
    if values.dtype.kind == "S":
        found[:] = [0 if is_fill(np.asarray(value)) else column_checksum(name, np.asarray(value)) for value in values]
        return found
    values = np.ascontiguousarray(values)
    if values.ndim == 1:
        return np.where(_is_fill(values), np.uint32(0), _crc32(values, zlib.crc32(name.encode())))
    start, width = zlib.crc32(name.encode()), values.nbytes // len(values)
    data = values.reshape(-1).view(np.uint8).data
    found[:] = [zlib.crc32(data[at : at + width], start) for at in range(0, len(data), width)]
    flat = values.reshape(len(values), -1)
    blank = np.flatnonzero(_is_fill(flat[:, 0]))
    found[blank[[bool(_is_fill(flat[row]).all()) for row in blank]]] = 0
    return found


def _crc32(values: np.ndarray, start: int) -> np.ndarray:
    """zlib.crc32 of the bytes of each number (N,), begun from `start`: for short rows without a call for each.

    >>> _crc32(np.array([258], "<i2"), 7).tolist() == [zlib.crc32(bytes([2, 1]), 7)]
    True
    """
    found = np.full(len(values), ~start & 0xFFFFFFFF, np.uint32)
    for byte in values.view(np.uint8).reshape(len(values), -1).T:
        found = _CRC32[(found ^ byte) & 0xFF] ^ (found >> np.uint32(8))
    return ~found


def _is_fill(values: np.ndarray) -> np.ndarray:
    fill = fill_of(values.dtype)
    return np.isnan(values) if fill != fill else values == fill

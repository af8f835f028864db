"""How much memory measuring may take, and how much there is. Bytes throughout."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

MARGIN = 0.1
"""Share of what is free that is left to others where a person gives no bound."""
LATER = 64 << 20
"""Bytes of libraries that are loaded while it works, such as scipy's, and of the command's own records."""
MAPPED_BYTES, TRIMMED_BYTES = 1 << 20, 8 << 20
"""Within a bound, the size from which on memory is given back when it is freed, and how much of smaller pieces the C
library keeps. By itself it comes to keep pieces of up to 32 MiB, which count as used."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
UNKNOWN = 1 << 40
"""What is taken to be there where the system does not say."""


def free(device: str) -> int:
    """What can be allocated on a device: what the system has left, and on the CPU what a container allows."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = [UNKNOWN]
    found += [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, held = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and held and limit[0].isdecimal():
        found.append(max(0, int(limit[0]) - int(held[0])))
    return min(found)


def held(device: str) -> int:
    """What this process has of a device."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    lines = [line for line in _lines("/proc/self/status") if line.startswith("VmRSS:")]
    return int(lines[0].split()[1]) << 10 if lines else 0


def let_go() -> None:
    """Give back what is held for nothing: tensors that hold on to each other, and what the C library keeps of those
    that were freed, 2.6 GiB after a check of a model of 124 million parameters."""
    gc.collect()
    _trim()


def settled(device: str) -> int:
    """What this process has of a device, without what the C library keeps of freed memory."""
    if device == "cpu":
        _trim()
    return held(device)


def _trim() -> None:
    with suppress(OSError, AttributeError):  # another library has no such call
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """From now on, freed memory is given back as it is freed, at the price of touching fresh memory: what a process
    holds is then what it uses, which a bound can be held to."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_TRIM_THRESHOLD, TRIMMED_BYTES)


def bound_of(device: str) -> int:
    """A bound for this process where a person gives none: what it has and what is free, less a margin.

    To the next lower eighth of a power of two, so that it is the same as long as what is free is about the same.
    """
    room = held(device) + int((1 - MARGIN) * free(device))
    unit = 1 << max(0, room.bit_length() - 3)
    return room // unit * unit


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

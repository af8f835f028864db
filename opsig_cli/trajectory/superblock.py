"""The superblock of an HDF5 file: its flag "open for writing" (file format 3.0, section II.A, version 3)."""

from __future__ import annotations

import struct

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SUPERBLOCK = 48
END_OF_DATA = 28  # offset in the superblock of the address where the file's data ends


def is_superblock(data: bytes | memoryview) -> bool:
    """Whether a file that begins so has a superblock of the version that opsig writes."""
    return len(data) >= SUPERBLOCK and bytes(data[:8]) == SIGNATURE and data[8] == 3


def _with_flag(data: bytes, flag: int) -> bytes:
    if not is_superblock(data) or data[11] == flag:
        return data
    changed = bytearray(data)
    changed[11] = flag
    struct.pack_into("<I", changed, 44, _lookup3(bytes(changed[:44])))
    return bytes(changed)


def flagged(data: bytes) -> bytes:
    """The superblock, saying that the file is open for writing."""
    return _with_flag(data, 1)


def unflagged(data: bytes) -> bytes:
    """The superblock, saying that nobody writes."""
    return _with_flag(data, 0)


def hide_flag(start: int, target: memoryview) -> None:
    """Clear the flag in bytes that were read from `start` on."""
    if start == 0 and is_superblock(target):
        target[:SUPERBLOCK] = unflagged(bytes(target[:SUPERBLOCK]))


def _lookup3(data: bytes) -> int:
    """Bob Jenkins' lookup3 hash with initial value 0, HDF5's checksum of metadata."""
    mask = 0xFFFFFFFF

    def rotated(x: int, bits: int) -> int:
        return (x << bits | x >> 32 - bits) & mask

    a = b = c = 0xDEADBEEF + len(data) & mask
    while len(data) > 12:
        a, b, c = (old + new & mask for old, new in zip((a, b, c), struct.unpack_from("<III", data), strict=True))
        for bits in (4, 6, 8, 16, 19, 4):
            a = (a - c & mask) ^ rotated(c, bits)
            c = c + b & mask
            a, b, c = b, c, a
        data = data[12:]
    if data:
        last = struct.unpack("<III", data.ljust(12, b"\0"))
        a, b, c = (old + new & mask for old, new in zip((a, b, c), last, strict=True))
        for bits in (14, 11, 25, 16, 4, 14, 24):
            c = (c ^ b) - rotated(b, bits) & mask
            a, b, c = b, c, a
        a, b, c = c, a, b
    return c


def intact(data: bytes) -> bool:
    """Whether these bytes are a whole superblock, by its own checksum."""
    return is_superblock(data) and struct.pack("<I", _lookup3(data[:44])) == data[44:]

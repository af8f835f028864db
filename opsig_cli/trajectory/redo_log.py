"""The redo log beside a file, RUN.h5.redo: its format, and how it is read and applied.

A header says who writes and to which file; a record holds all writes of one commit, checksummed.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import write_all
from opsig_cli.trajectory.superblock import SIGNATURE, SUPERBLOCK, flagged, intact, unflagged

LOG_SUFFIX = ".redo"

MAGIC = b"opsigredo1\0\0"
HEADER = struct.Struct("<12sI64s48sI")  # magic, process, host, the file's superblock, checksum
_RECORD = struct.Struct("<QQQII")  # sequence number, file size, body length, body checksum, checksum of the rest
_EXTENT = struct.Struct("<QQ")  # offset, length

Extent = tuple[int, bytes | memoryview]
"""Bytes and the offset in the file where they belong."""


def packed_record(sequence: int, size: int, extents: list[Extent]) -> bytes:
    """One commit as bytes: its number in the log, the file's size after it, and its writes."""
    body = b"".join(part for offset, data in extents for part in (_EXTENT.pack(offset, len(data)), data))
    head = _RECORD.pack(sequence, size, len(body), zlib.crc32(body), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + body


def committed(path: str, fd: int) -> Iterator[tuple[int, list[Extent]]]:
    """The log's records in order: the file's size after each, and its extents.

    A record that is not whole is where the log ends: it was never committed. Raises OpsigError where the log was
    written for another file.
    """
    try:
        with open(path + LOG_SUFFIX, "rb") as file:
            log = memoryview(file.read())
    except FileNotFoundError:
        return
    if len(log) < HEADER.size:
        return
    magic, _, _, superblock, checksum = HEADER.unpack_from(log)
    if magic != MAGIC or zlib.crc32(log[: HEADER.size - 4]) != checksum:
        return
    records = list(_whole_records(log[HEADER.size :]))
    now = unflagged(os.pread(fd, SUPERBLOCK, 0).ljust(SUPERBLOCK, b"\0"))
    past = [superblock] + [bytes(d[:SUPERBLOCK]) for _, extents in records for o, d in extents if o == 0]
    if now not in past and intact(now):
        raise OpsigError(f"{path}{LOG_SUFFIX} is the log of another file than {path}. Move one of them away")
    yield from records


def _whole_records(log: memoryview) -> Iterator[tuple[int, list[Extent]]]:
    place = expected = 0
    while place + _RECORD.size <= len(log):
        sequence, size, length, body_checksum, checksum = _RECORD.unpack_from(log, place)
        body = log[place + _RECORD.size : place + _RECORD.size + length]
        if zlib.crc32(log[place : place + _RECORD.size - 4]) != checksum or sequence != expected:
            return
        if len(body) < length or zlib.crc32(body) != body_checksum:
            return
        extents: list[Extent] = []
        at = 0
        while at < length:
            offset, count = _EXTENT.unpack_from(body, at)
            at += _EXTENT.size
            extents.append((offset, body[at : at + count]))
            at += count
        yield size, extents
        place += _RECORD.size + length
        expected += 1


def apply(fd: int, extents: list[Extent]) -> None:
    """Write extents to the file; meanwhile the superblock says that it is open for writing."""
    if not extents:
        return
    superblock = os.pread(fd, SUPERBLOCK, 0)
    if superblock.startswith(SIGNATURE):
        write_all(fd, flagged(superblock), 0)
    for offset, data in extents:
        if offset < SUPERBLOCK:
            merged = bytearray(superblock.ljust(SUPERBLOCK, b"\0"))
            merged[offset : offset + len(data)] = data[: SUPERBLOCK - offset]
            superblock = bytes(merged)
            data = data[SUPERBLOCK - offset :]
            offset = SUPERBLOCK
        if len(data):
            write_all(fd, data, offset)
    write_all(fd, unflagged(superblock), 0)

"""The redo log beside a file, RUN.h5.redo: its format, and how it is read and applied.

A header says who writes, and to which file at which commit: it holds the bytes that the file has at one place, its
stamp. A record holds all writes of one commit, the new stamp among them; its checksum begins from the stamp before it.
So a log fits one file, from the commit at which the log began to its last, and each record fits the one before it.
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import read_at, read_into, write_all
from opsig_cli.trajectory.identity import STAMP_BYTES, is_whole
from opsig_cli.trajectory.superblock import SIGNATURE, SUPERBLOCK, flagged, intact, unflagged

LOG_SUFFIX = ".redo"

MAGIC = b"opsigredo2\0\0"
HEADER = struct.Struct("<12sI64sQ64sI")  # magic, process, host, place of the stamp, the stamp, checksum
GATE = HEADER.size
"""Offset of one byte, outside of the checksum: not 0 while the writer asks new readers to wait."""
LOG_START = HEADER.size + 8
"""Offset of the first record."""
_FIRST_MAGIC = b"opsigredo1\0\0"
_FIRST_HEADER = struct.Struct("<12sI64s48sI")  # of opsig's first logs: the superblock stands for the stamp
_RECORD = struct.Struct("<QQQII")  # sequence number, file size, body length, body checksum, checksum of the rest
_EXTENT = struct.Struct("<QQ")  # offset, length
FARTHEST = 1 << 56

Extent = tuple[int, bytes | memoryview]
"""Bytes and the offset in the file where they belong."""


@dataclass(frozen=True)
class Stamp:
    """What the file has at the place of its stamp; place 0 is the superblock of a file that has no stamp."""

    place: int
    data: bytes

    def now(self, fd: int) -> Stamp:
        """The same place as it is in the open file."""
        return Stamp.of(fd, self.place)

    @classmethod
    def of(cls, fd: int, place: int) -> Stamp:
        """The stamp of an open file."""
        if place:
            return cls(place, read_at(fd, STAMP_BYTES, place))
        return cls(0, unflagged(read_at(fd, SUPERBLOCK, 0)))

    def after(self, extents: Iterable[Extent]) -> Stamp:
        """The stamp once these were written to the file."""
        data = self.data
        for offset, written in extents:
            if offset == self.place and len(written) >= len(data):
                data = bytes(written[: len(data)])
        return Stamp(self.place, data)

    @property
    def torn(self) -> bool:
        """Whether a crash may have cut the writing of it."""
        return not (is_whole(self.data) if self.place else intact(self.data))


@dataclass(frozen=True)
class Log:
    """A log that was read: the stamp of the file when it began, and what each record does.

    `records`: the file's size after a commit, the commit's extents, and its stamp, in order.
    """

    base: Stamp
    records: list[tuple[int, list[Extent], Stamp]]

    def fits(self, fd: int) -> bool:
        """Whether the log is of this file, at a commit of the log."""
        now = self.base.now(fd)
        known = [self.base.data, *(stamp.data for _, _, stamp in self.records)]
        if now.data in known:
            return True
        same_run = now.place == 0 or now.data[:32] == self.base.data[:32]
        return now.torn and same_run


def packed_header(stamp: Stamp) -> bytes:
    """The beginning of a log of this process, up to its first record."""
    host = socket.gethostname().encode()[:64]
    header = HEADER.pack(MAGIC, os.getpid(), host, stamp.place, stamp.data, 0)[:-4]
    return (header + struct.pack("<I", zlib.crc32(header))).ljust(LOG_START, b"\0")


def packed_record(sequence: int, size: int, extents: list[Extent], before: Stamp) -> bytes:
    """One commit as bytes: its number in the log, the file's size after it, its writes, and the stamp before it."""
    body = b"".join(part for offset, data in extents for part in (_EXTENT.pack(offset, len(data)), data))
    head = _RECORD.pack(sequence, size, len(body), zlib.crc32(body), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head, zlib.crc32(before.data))) + body


def read_log(path: str) -> Log | None:
    """What is committed in the log beside a file, or None where there is no log with a record.

    A record that is not whole is where the log ends: it was never committed. Raises OpsigError for a log that opsig did
    not write, or that is damaged where no crash damages it.
    """
    try:
        fd = os.open(path + LOG_SUFFIX, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        log = memoryview(bytearray(os.fstat(fd).st_size))
        log = log[: read_into(fd, log, 0)].toreadonly()
    finally:
        os.close(fd)
    first = bytes(log[:12]) == _FIRST_MAGIC
    header, start = (_FIRST_HEADER, _FIRST_HEADER.size) if first else (HEADER, LOG_START)
    if len(log) <= start:
        return None
    magic, _, _, *about, checksum = header.unpack_from(log)
    if magic not in (MAGIC, _FIRST_MAGIC) or zlib.crc32(log[: header.size - 4]) != checksum:
        raise OpsigError(
            f"{path}{LOG_SUFFIX} is damaged, or no log of opsig. Without it the last steps of {path} are lost; "
            "move it away to use the file as it is"
        )
    base = Stamp(0, about[0]) if first else Stamp(about[0], about[1][: STAMP_BYTES if about[0] else SUPERBLOCK])
    records = _whole_records(log[start:], base, chained=not first)
    if any(offset + len(data) > FARTHEST for _, extents, _ in records for offset, data in extents):
        raise OpsigError(f"{path}{LOG_SUFFIX} writes beyond the end of any file: it is no log of opsig. Remove it")
    return Log(base, records) if records else None


def own_log(path: str, fd: int) -> Log | None:
    """The log of the open file at this path, or None where it has none. Raises OpsigError for that of another file."""
    log = read_log(path)
    if log is not None and not log.fits(fd):
        of = f", of run {log.base.data[:32].decode(errors='replace')}" if log.base.place else ""
        raise OpsigError(
            f"{path}{LOG_SUFFIX} is the log of another file than {path}{of}, or was cut off. Move one of them away: "
            "the log holds the last steps of its own file"
        )
    return log


def _whole_records(log: memoryview, before: Stamp, chained: bool) -> list[tuple[int, list[Extent], Stamp]]:
    records: list[tuple[int, list[Extent], Stamp]] = []
    place = 0
    while place + _RECORD.size <= len(log):
        sequence, size, length, body_checksum, checksum = _RECORD.unpack_from(log, place)
        body = log[place + _RECORD.size : place + _RECORD.size + length]
        seed = zlib.crc32(before.data) if chained else 0
        if zlib.crc32(log[place : place + _RECORD.size - 4], seed) != checksum or sequence != len(records):
            break
        if len(body) < length or zlib.crc32(body) != body_checksum:
            break
        extents = _extents(body)
        before = before.after(extents)
        records.append((size, extents, before))
        place += _RECORD.size + length
    return records


def _extents(body: memoryview) -> list[Extent]:
    extents: list[Extent] = []
    at = 0
    while at + _EXTENT.size <= len(body):
        offset, count = _EXTENT.unpack_from(body, at)
        at += _EXTENT.size
        extents.append((offset, body[at : at + count]))
        at += count
    return extents


def apply(fd: int, extents: list[Extent]) -> None:
    """Write extents to the file; meanwhile the superblock says that it is open for writing."""
    if not extents:
        return
    superblock = read_at(fd, SUPERBLOCK, 0)
    if superblock.startswith(SIGNATURE):
        write_all(fd, flagged(superblock), 0)
    for offset, data in extents:
        if offset < SUPERBLOCK:
            merged = bytearray(superblock)
            merged[offset : offset + len(data)] = data[: SUPERBLOCK - offset]
            superblock = bytes(merged)
            data = data[SUPERBLOCK - offset :]
            offset = SUPERBLOCK
        if len(data):
            write_all(fd, data, offset)
    write_all(fd, unflagged(superblock), 0)

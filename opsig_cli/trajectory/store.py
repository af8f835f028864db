"""Atomic, durable commits to an HDF5 file: a physical redo log under h5py's file-object driver. POSIX only.

HDF5 alone loses committed steps when a process is killed, when power fails, and silently when the disk is full. Here
its writes stay in memory until `RedoFile.commit`, which

1. allocates the space that the file will need, so that a full disk is an error while nothing has changed,
2. appends one checksummed record with all writes to the log, RUN.h5.redo, and waits until the disk has it: the commit
   point,
3. applies the writes to the file under an exclusive lock, or leaves them for later while somebody reads.

Large writes to space that no committed byte uses go straight to the file, ahead of the record that makes them part of
it. A file and its log together are always one consistent state: a reader lays the log's records over the file
(`SnapshotFile`), and the next writer applies them for good. The log is cut when it has grown to LOG_BYTES, and removed
when the writer closes: a finished run is one plain HDF5 file.

While writes are being applied the superblock says that the file is open for writing, so that plain h5py refuses it
rather than read a torn state. Between commits plain h5py reads the last state applied.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import zlib
from collections.abc import Iterator

from opsig_cli.errors import OpsigError

LOG_SUFFIX = ".redo"
LOG_BYTES = 64 << 20
"""The log is applied for good and cut once it is longer."""
DIRECT_BYTES = 32 << 10
"""Writes to new space of at least this size do not go through the log."""

MAGIC = b"opsigredo1\0\0"
_HEADER = struct.Struct("<12sI64s48sI")  # magic, process, host, the file's superblock, checksum
_RECORD = struct.Struct("<QQQII")  # sequence number, file size, body length, body checksum, checksum of the rest
_EXTENT = struct.Struct("<QQ")  # offset, length

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = 48
_END_OF_DATA = 28  # offset in the superblock of the address where the file's data ends
_PAGE = 16  # bits: extents are found by the 64 KiB pages that they touch

Extent = tuple[int, bytes | memoryview]
"""Bytes and the offset in the file where they belong."""


class Overlay:
    """Extents that lie over a file, later ones over earlier ones."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self._pages: dict[int, list[int]] = {}

    def add(self, offset: int, data: bytes | memoryview) -> None:
        """Lay an extent on top."""
        number = len(self.extents)
        self.extents.append((offset, data))
        for page in range(offset >> _PAGE, (offset + len(data) - 1 >> _PAGE) + 1):
            self._pages.setdefault(page, []).append(number)

    def touching(self, start: int, stop: int) -> list[Extent]:
        """The extents that overlap a range, in order."""
        pages = range(start >> _PAGE, (stop - 1 >> _PAGE) + 1)
        numbers = {number for page in pages for number in self._pages.get(page, ())}
        found = (self.extents[number] for number in sorted(numbers))
        return [(offset, data) for offset, data in found if offset < stop and offset + len(data) > start]

    def patch(self, start: int, target: memoryview) -> None:
        """Copy what the extents say into `target`, which stands for the file from `start` on."""
        stop = start + len(target)
        for offset, data in self.touching(start, stop):
            low, high = max(offset, start), min(offset + len(data), stop)
            target[low - start : high - start] = data[low - offset : high - offset]


class SnapshotFile:
    """One consistent state of a file, for reading, as a file object for h5py. Nothing on disk is changed.

    Holds a shared lock, so that a writer leaves the file as it is until this is closed. Raises OpsigError where the log
    beside the file belongs to another file.
    """

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH)
            self.size = os.fstat(self.fd).st_size
            self.overlay = Overlay()
            for size, extents in _committed(path, self.fd):
                self.size = size
                for offset, data in extents:
                    self.overlay.add(offset, data)
        except BaseException:
            os.close(self.fd)
            raise
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, target: memoryview) -> int:
        start = self._position
        filled = os.preadv(self.fd, [target], start)
        target[filled:] = bytes(len(target) - filled)
        self._lay_over(start, target)
        if start < _SUPERBLOCK:
            _hide_flag(start, target)
        self._position += len(target)
        return len(target)

    def _lay_over(self, start: int, target: memoryview) -> None:
        self.overlay.patch(start, target)

    def read(self, count: int = -1) -> bytes:
        target = bytearray(self.size - self._position if count < 0 else count)
        self.readinto(memoryview(target))
        return bytes(target)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        os.close(self.fd)


class RedoFile(SnapshotFile):
    """A file whose writes become durable together, as a file object for h5py. See the module's first lines.

    Opening applies what a killed writer had committed. Raises OpsigError where another process is writing, naming it.
    """

    def __init__(self, path: str, create: bool = False):
        self.path = path
        self._log = _lock_log(path)
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_TRUNC if create else 0)
            if create:
                os.ftruncate(self._log, 0)  # what is left there belonged to the file that is replaced
            self.fd = os.open(path, flags, 0o666)
            try:
                self._recover()
                self._start_log()
            except BaseException:
                os.close(self.fd)
                raise
        except BaseException:
            os.close(self._log)
            raise
        _sync_folder(path)
        self.size = self._committed_size = os.fstat(self.fd).st_size
        self.overlay = Overlay()  # committed but not yet applied
        self._fresh = Overlay()  # since the last commit
        self._wrote_direct = False
        self._position = 0

    def _recover(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        for _, extents in _committed(self.path, self.fd):
            _apply(self.fd, extents)
        superblock = os.pread(self.fd, _SUPERBLOCK, 0)
        if _is_superblock(superblock):  # what lies behind the end of the file's data was never committed
            os.ftruncate(self.fd, struct.unpack_from("<Q", superblock, _END_OF_DATA)[0])
        os.fsync(self.fd)
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def _start_log(self) -> None:
        """An empty log that says who writes and to which file."""
        superblock = os.pread(self.fd, _SUPERBLOCK, 0).ljust(_SUPERBLOCK, b"\0")
        header = _HEADER.pack(MAGIC, os.getpid(), socket.gethostname().encode()[:64], _unflagged(superblock), 0)
        header = header[:-4] + struct.pack("<I", zlib.crc32(header[:-4]))
        os.ftruncate(self._log, 0)
        _write_all(self._log, header, 0)
        os.fsync(self._log)
        self._end_of_log = len(header)
        self._sequence = 0

    def _lay_over(self, start: int, target: memoryview) -> None:
        self.overlay.patch(start, target)
        self._fresh.patch(start, target)

    def write(self, data: bytes | memoryview) -> int:
        start, count = self._position, len(data)
        if count and not self._write_direct(start, data):
            self._fresh.add(start, _unflagged(bytes(data)) if start == 0 else bytes(data))
        self._position += count
        self.size = max(self.size, self._position)
        return count

    def _write_direct(self, start: int, data: bytes | memoryview) -> bool:
        """Whether the data went straight to space that nothing committed uses and nothing in memory covers."""
        if len(data) < DIRECT_BYTES or start < self._committed_size or self._fresh.touching(start, start + len(data)):
            return False
        try:
            _write_all(self.fd, data, start)
        except OSError:  # a full disk is for `commit` to report
            return False
        self._wrote_direct = True
        return True

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def commit(self) -> None:
        """Make all writes since the last commit durable, together. Raises OSError with nothing lost: call it again."""
        if not self._fresh.extents and not self._wrote_direct:
            return
        allocated = os.fstat(self.fd).st_size
        if self.size > allocated:
            os.posix_fallocate(self.fd, allocated, self.size - allocated)
        if self._wrote_direct:
            os.fdatasync(self.fd)
        if not self._fresh.touching(0, _SUPERBLOCK):  # every record can mend a superblock torn while it was applied
            superblock = bytearray(min(_SUPERBLOCK, self.size))
            self._position = 0
            self.readinto(memoryview(superblock))
            self._fresh.add(0, bytes(superblock))
        record = _record(self._sequence, self.size, self._fresh.extents)
        _write_all(self._log, record, self._end_of_log)
        os.fdatasync(self._log)
        self._end_of_log += len(record)
        self._sequence += 1
        committed, self._fresh = self._fresh, Overlay()
        if self.overlay.extents:
            for offset, data in committed.extents:
                self.overlay.add(offset, data)
        else:
            self.overlay = committed
        self._wrote_direct = False
        self._committed_size = self.size
        self._apply()

    def _apply(self) -> None:
        """Write what is committed to the file, unless somebody reads: then the next commit tries again."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        try:
            _apply(self.fd, self.overlay.extents)
            self.overlay = Overlay()
            if self._end_of_log > LOG_BYTES:
                os.fsync(self.fd)
                self._start_log()
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def close(self, patience: float = 60.0) -> None:
        """Leave one plain file with everything committed; what was not committed is dropped.

        While somebody has been reading for `patience` seconds, the log stays: the next writer applies it.
        """
        import time

        until = time.monotonic() + patience
        while self.overlay.extents and time.monotonic() < until:
            self._apply()
            if self.overlay.extents:
                time.sleep(0.05)
        if not self.overlay.extents:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            os.ftruncate(self.fd, self._committed_size)
            os.fsync(self.fd)
            os.unlink(self.path + LOG_SUFFIX)
            _sync_folder(self.path)
        os.close(self.fd)
        os.close(self._log)


def writer_of(path: str) -> str | None:
    """The process that is writing to the file, as text, or None. Raises nothing where there is no log."""
    try:
        log = os.open(path + LOG_SUFFIX, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(log)
    finally:
        os.close(log)
    return None


def _lock_log(path: str) -> int:
    """The log, opened and locked for this writer."""
    while True:
        log = os.open(path + LOG_SUFFIX, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(log)
            os.close(log)
            raise OpsigError(f"{path} is being written by {holder}. Wait for it to end, or stop it") from None
        try:  # its last writer may have removed it between our opening and locking it
            same = os.fstat(log).st_ino == os.stat(path + LOG_SUFFIX).st_ino
        except FileNotFoundError:
            same = False
        if same:
            return log
        os.close(log)


def _holder(log: int) -> str:
    header = os.pread(log, _HEADER.size, 0)
    if len(header) < _HEADER.size:
        return "another process"
    _, process, host, _, _ = _HEADER.unpack(header)
    name = host.rstrip(b"\0").decode(errors="replace")
    return f"process {process} on {name}"


def _record(sequence: int, size: int, extents: list[Extent]) -> bytes:
    body = b"".join(part for offset, data in extents for part in (_EXTENT.pack(offset, len(data)), data))
    head = _RECORD.pack(sequence, size, len(body), zlib.crc32(body), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head)) + body


def _committed(path: str, fd: int) -> Iterator[tuple[int, list[Extent]]]:
    """The log's records in order: the file's size after each, and its extents.

    A record that is not whole is where the log ends: it was never committed. Raises OpsigError where the log was
    written for another file.
    """
    try:
        with open(path + LOG_SUFFIX, "rb") as file:
            log = memoryview(file.read())
    except FileNotFoundError:
        return
    if len(log) < _HEADER.size:
        return
    magic, _, _, superblock, checksum = _HEADER.unpack_from(log)
    if magic != MAGIC or zlib.crc32(log[: _HEADER.size - 4]) != checksum:
        return
    records = list(_whole_records(log[_HEADER.size :]))
    now = _unflagged(os.pread(fd, _SUPERBLOCK, 0).ljust(_SUPERBLOCK, b"\0"))
    past = [superblock] + [bytes(d[:_SUPERBLOCK]) for _, extents in records for o, d in extents if o == 0]
    if now not in past and _is_superblock(now) and struct.pack("<I", _lookup3(now[:44])) == now[44:]:
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


def _apply(fd: int, extents: list[Extent]) -> None:
    """Write extents to the file; meanwhile the superblock says that it is open for writing."""
    if not extents:
        return
    superblock = os.pread(fd, _SUPERBLOCK, 0)
    if superblock.startswith(_SIGNATURE):
        _write_all(fd, _flagged(superblock), 0)
    for offset, data in extents:
        if offset < _SUPERBLOCK:
            merged = bytearray(superblock.ljust(_SUPERBLOCK, b"\0"))
            merged[offset : offset + len(data)] = data[: _SUPERBLOCK - offset]
            superblock = bytes(merged)
            data = data[_SUPERBLOCK - offset :]
            offset = _SUPERBLOCK
        if len(data):
            _write_all(fd, data, offset)
    _write_all(fd, _unflagged(superblock), 0)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write everything: one call may write less at a full disk, at a limit, or on a signal."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, "nothing could be written")
        view, offset = view[written:], offset + written


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# -- the superblock's flag "open for writing" (HDF5 file format 3.0, section II.A, version 3)


def _is_superblock(data: bytes | memoryview) -> bool:
    return len(data) >= _SUPERBLOCK and bytes(data[:8]) == _SIGNATURE and data[8] == 3


def _with_flag(data: bytes, flag: int) -> bytes:
    if not _is_superblock(data) or data[11] == flag:
        return data
    changed = bytearray(data)
    changed[11] = flag
    struct.pack_into("<I", changed, 44, _lookup3(bytes(changed[:44])))
    return bytes(changed)


def _flagged(data: bytes) -> bytes:
    return _with_flag(data, 1)


def _unflagged(data: bytes) -> bytes:
    return _with_flag(data, 0)


def _hide_flag(start: int, target: memoryview) -> None:
    if start == 0 and _is_superblock(target):
        target[:_SUPERBLOCK] = _unflagged(bytes(target[:_SUPERBLOCK]))


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

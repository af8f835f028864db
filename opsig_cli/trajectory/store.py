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

import fcntl
import os
import socket
import struct
import zlib

from opsig_cli.trajectory.disk import sync_folder, write_all
from opsig_cli.trajectory.locks import lock_log
from opsig_cli.trajectory.redo_log import HEADER, LOG_SUFFIX, MAGIC, apply, committed, packed_record
from opsig_cli.trajectory.snapshot import Overlay, SnapshotFile
from opsig_cli.trajectory.superblock import END_OF_DATA, SUPERBLOCK, is_superblock, unflagged

LOG_BYTES = 64 << 20
"""The log is applied for good and cut once it is longer."""
DIRECT_BYTES = 32 << 10
"""Writes to new space of at least this size do not go through the log."""


class RedoFile(SnapshotFile):
    """A file whose writes become durable together, as a file object for h5py. See the module's first lines.

    Opening applies what a killed writer had committed. Raises OpsigError where another process is writing, naming it.
    """

    def __init__(self, path: str, create: bool = False):
        self.path = path
        self._log = lock_log(path)
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
        sync_folder(path)
        self.size = self._committed_size = os.fstat(self.fd).st_size
        self.overlay = Overlay()  # committed but not yet applied
        self._fresh = Overlay()  # since the last commit
        self._wrote_direct = False
        self._position = 0

    def _recover(self) -> None:
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        for _, extents in committed(self.path, self.fd):
            apply(self.fd, extents)
        superblock = os.pread(self.fd, SUPERBLOCK, 0)
        if is_superblock(superblock):  # what lies behind the end of the file's data was never committed
            os.ftruncate(self.fd, struct.unpack_from("<Q", superblock, END_OF_DATA)[0])
        os.fsync(self.fd)
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def _start_log(self) -> None:
        """An empty log that says who writes and to which file."""
        superblock = os.pread(self.fd, SUPERBLOCK, 0).ljust(SUPERBLOCK, b"\0")
        header = HEADER.pack(MAGIC, os.getpid(), socket.gethostname().encode()[:64], unflagged(superblock), 0)
        header = header[:-4] + struct.pack("<I", zlib.crc32(header[:-4]))
        os.ftruncate(self._log, 0)
        write_all(self._log, header, 0)
        os.fsync(self._log)
        self._end_of_log = len(header)
        self._sequence = 0

    def _lay_over(self, start: int, target: memoryview) -> None:
        self.overlay.patch(start, target)
        self._fresh.patch(start, target)

    def write(self, data: bytes | memoryview) -> int:
        start, count = self._position, len(data)
        if count and not self._write_direct(start, data):
            self._fresh.add(start, unflagged(bytes(data)) if start == 0 else bytes(data))
        self._position += count
        self.size = max(self.size, self._position)
        return count

    def _write_direct(self, start: int, data: bytes | memoryview) -> bool:
        """Whether the data went straight to space that nothing committed uses and nothing in memory covers."""
        if len(data) < DIRECT_BYTES or start < self._committed_size or self._fresh.touching(start, start + len(data)):
            return False
        try:
            write_all(self.fd, data, start)
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
        if not self._fresh.touching(0, SUPERBLOCK):  # every record can mend a superblock torn while it was applied
            superblock = bytearray(min(SUPERBLOCK, self.size))
            self._position = 0
            self.readinto(memoryview(superblock))
            self._fresh.add(0, bytes(superblock))
        record = packed_record(self._sequence, self.size, self._fresh.extents)
        write_all(self._log, record, self._end_of_log)
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
            apply(self.fd, self.overlay.extents)
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
            sync_folder(self.path)
        os.close(self.fd)
        os.close(self._log)

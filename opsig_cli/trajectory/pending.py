"""A file with what was written to it since, in memory, over it."""

from __future__ import annotations

import os

from opsig_cli.trajectory.disk import write_all
from opsig_cli.trajectory.snapshot import Overlay, SnapshotFile
from opsig_cli.trajectory.superblock import unflagged

DIRECT_BYTES = 32 << 10
"""Writes to new space of at least this size are not kept in memory."""
NEW_SUFFIX = ".new"
"""Of a file that is not whole yet: it takes its own name when it is."""
_PIECE = 4 << 20


class PendingFile(SnapshotFile):
    """A file, as a file object for h5py, whose writes stay in memory until somebody commits them.

    `overlay`: what is committed but not yet written to the file; `fresh`: what was written since the last commit.
    Large writes to space that no committed byte uses go straight to the file.
    """

    def __init__(self, path: str, fd: int):
        self.path = path
        self.fd = fd
        self.size = self.committed_size = os.fstat(fd).st_size
        self.overlay = Overlay()
        self.fresh = Overlay()
        self.wrote_direct = False
        self._position = 0

    @property
    def changed(self) -> bool:
        """Whether something was written since the last commit."""
        return bool(self.fresh.extents) or self.wrote_direct

    def _lay_over(self, start: int, target: memoryview) -> None:
        self.overlay.patch(start, target)
        self.fresh.patch(start, target)

    def write(self, data: bytes | memoryview) -> int:
        start, count = self._position, len(data)
        if count and not self._write_direct(start, data):
            self.fresh.add(start, unflagged(bytes(data)) if start == 0 else bytes(data))
        self._position += count
        self.size = max(self.size, self._position)
        return count

    def _write_direct(self, start: int, data: bytes | memoryview) -> bool:
        """Whether the data went straight to space that nothing committed uses and nothing in memory covers."""
        if len(data) < DIRECT_BYTES or start < self.committed_size or self.fresh.touching(start, start + len(data)):
            return False
        try:
            write_all(self.fd, data, start)
        except OSError:  # a full disk is for `commit` to report
            return False
        self.wrote_direct = True
        return True

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def read_at(self, start: int, target: memoryview) -> None:
        """Fill the target from `start` on."""
        self._position = start
        self.readinto(target)

    def drop(self) -> None:
        """Forget what was written since the last commit."""
        self.fresh, self.wrote_direct = Overlay(), False
        self.size = self.committed_size

    def committed(self) -> None:
        """What was written is committed now, and lies over the file until it is applied."""
        fresh, self.fresh = self.fresh, Overlay()
        if self.overlay.extents:
            for offset, data in fresh.extents:
                self.overlay.add(offset, data)
        else:
            self.overlay = fresh
        self.wrote_direct = False
        self.committed_size = self.size

    def copy_to(self, path: str, flags: int) -> int:
        """A durable copy of the file as it is here, opened."""
        copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o666)
        try:
            os.fchmod(copy, os.fstat(self.fd).st_mode & 0o777)
            piece = memoryview(bytearray(_PIECE))
            for start in range(0, self.size, _PIECE):
                part = piece[: min(_PIECE, self.size - start)]
                self.read_at(start, part)
                write_all(copy, part, start)
            os.fsync(copy)
        except BaseException:
            os.close(copy)
            os.unlink(path)
            raise
        return copy

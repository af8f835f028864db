"""One consistent state of a file and its log, for reading."""

from __future__ import annotations

import fcntl
import os

from opsig_cli.trajectory.redo_log import Extent, committed
from opsig_cli.trajectory.superblock import SUPERBLOCK, hide_flag

_PAGE = 16  # bits: extents are found by the 64 KiB pages that they touch


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
            for size, extents in committed(path, self.fd):
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
        if start < SUPERBLOCK:
            hide_flag(start, target)
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

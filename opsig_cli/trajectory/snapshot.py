"""One consistent state of a file and its log, for reading."""

from __future__ import annotations

import fcntl
import os

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import read_into, same_file
from opsig_cli.trajectory.locks import lock_or_fail, pass_gate
from opsig_cli.trajectory.redo_log import Extent, own_log
from opsig_cli.trajectory.superblock import SUPERBLOCK, hide_flag

TRIES = 50
"""How often a file may be replaced under somebody who opens it."""
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
        self.path = path
        self._position = 0
        for _ in range(TRIES):
            if self._open():
                return
        raise OpsigError(f"{path} is replaced again and again while it is being opened. Try again later")

    def _open(self) -> bool:
        """Whether file and log belong together; where they do not, one was replaced between our looking at them."""
        pass_gate(self.path)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lock_or_fail(self.fd, fcntl.LOCK_SH, self.path)
            self.size = os.fstat(self.fd).st_size
            self.overlay = Overlay()
            try:
                log = own_log(self.path, self.fd)
            except OpsigError:
                if same_file(self.fd, self.path):
                    raise
                log = None
            for size, extents, _ in log.records if log else ():
                self.size = size
                for offset, data in extents:
                    self.overlay.add(offset, data)
            if same_file(self.fd, self.path):
                return True
        except BaseException:
            os.close(self.fd)
            raise
        os.close(self.fd)
        return False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, target: memoryview) -> int:
        start = self._position
        filled = read_into(self.fd, target, start)
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
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

"""System calls on files that finish what they begin."""

from __future__ import annotations

import errno
import os


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write everything: one call may write less at a full disk, at a limit, or on a signal."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, "nothing could be written")
        view, offset = view[written:], offset + written


def sync_folder(path: str) -> None:
    """Wait until the disk has the names in the folder of this file."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

"""System calls on files that finish what they begin: one call may read or write less than it was asked to."""

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


def read_into(fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset` on, up to the end of the file; returns the number of bytes there were."""
    filled = 0
    while filled < len(target):
        got = os.preadv(fd, [target[filled:]], offset + filled)
        if not got:
            break
        filled += got
    return filled


def read_at(fd: int, count: int, offset: int) -> bytes:
    """`count` bytes, zeros where the file ends before."""
    target = bytearray(count)
    read_into(fd, memoryview(target), offset)
    return bytes(target)


def same_file(fd: int, path: str) -> bool:
    """Whether the path still leads to the open file."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def sync_folder(path: str) -> None:
    """Wait until the disk has the names in the folder of this file."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

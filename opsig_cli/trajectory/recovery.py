"""What a killed writer left: its log is applied to its file, or keeps another run from being put in its place."""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import read_at, sync_folder
from opsig_cli.trajectory.locks import set_gate, wait_for_lock
from opsig_cli.trajectory.pending import NEW_SUFFIX, PendingFile
from opsig_cli.trajectory.redo_log import LOG_SUFFIX, Log, apply, own_log, read_log
from opsig_cli.trajectory.superblock import END_OF_DATA, SUPERBLOCK, is_superblock

READER_SECONDS = 5.0
"""Readers are waited for so long before a copy takes the file's place."""


def recover(path: str, fd: int, log: int) -> None:
    """Apply what a killed writer committed to the open file, and drop what it had not; the log is locked.

    Where readers do not leave, the file is from then on a copy that has taken its place. Raises OpsigError for the log
    of another file.
    """
    with suppress(FileNotFoundError):
        os.unlink(path + NEW_SUFFIX)  # of a copy that was not finished
    found = own_log(path, fd)
    if found:
        set_gate(log, True)
        if wait_for_lock(fd, fcntl.LOCK_EX, path, READER_SECONDS, "; a copy will take its place then"):
            for _, extents, _ in found.records:
                apply(fd, extents)
        else:
            _replace_by_copy(path, fd, found)
    superblock = read_at(fd, SUPERBLOCK, 0)
    if is_superblock(superblock):  # what lies behind the end of the file's data was never committed
        os.ftruncate(fd, struct.unpack_from("<Q", superblock, END_OF_DATA)[0])
    os.fsync(fd)
    if found:  # before anybody reads the log beside the file it was applied to
        os.ftruncate(log, 0)
        fcntl.flock(fd, fcntl.LOCK_UN)


def _replace_by_copy(path: str, fd: int, log: Log) -> None:
    whole = PendingFile(path, fd)
    for whole.size, extents, _ in log.records:
        for offset, data in extents:
            whole.overlay.add(offset, data)
    copy = whole.copy_to(path + NEW_SUFFIX, os.O_TRUNC)
    try:
        os.replace(path + NEW_SUFFIX, path)
        os.dup2(copy, fd, inheritable=False)
    finally:
        os.close(copy)
    sync_folder(path)


def clear_the_way(path: str, log: int) -> None:
    """Apply the log of a file that is to be replaced, so that it is whole until the new one takes its place.

    Raises OpsigError where the log holds the last steps of a run that was moved away.
    """
    if read_log(path) is not None:
        if not os.path.exists(path):
            raise OpsigError(
                f"{path}{LOG_SUFFIX} holds the last steps of a run that is not here any more. "
                "Move it back beside its file, or remove it"
            )
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            recover(path, fd, log)
        finally:
            os.close(fd)
    os.ftruncate(log, 0)

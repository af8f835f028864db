"""Who may write: the writer of a file holds its log locked."""

from __future__ import annotations

import fcntl
import os

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.redo_log import HEADER, LOG_SUFFIX


def writer_of(path: str) -> str | None:
    """The process that is writing to the file, as text, or None. Raises nothing where there is no log."""
    try:
        log = os.open(path + LOG_SUFFIX, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return holder_of(log)
    finally:
        os.close(log)
    return None


def lock_log(path: str) -> int:
    """The log, opened and locked for this writer."""
    while True:
        log = os.open(path + LOG_SUFFIX, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = holder_of(log)
            os.close(log)
            raise OpsigError(f"{path} is being written by {holder}. Wait for it to end, or stop it") from None
        try:  # its last writer may have removed it between our opening and locking it
            same = os.fstat(log).st_ino == os.stat(path + LOG_SUFFIX).st_ino
        except FileNotFoundError:
            same = False
        if same:
            return log
        os.close(log)


def holder_of(log: int) -> str:
    """Who wrote the log's header, as text."""
    header = os.pread(log, HEADER.size, 0)
    if len(header) < HEADER.size:
        return "another process"
    _, process, host, _, _ = HEADER.unpack(header)
    name = host.rstrip(b"\0").decode(errors="replace")
    return f"process {process} on {name}"

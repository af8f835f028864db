"""Who may write, who may read, and who waits for whom.

The writer of a file holds its log locked from beginning to end. Readers hold the file itself, shared, while they read;
the writer takes it alone for the moment in which it applies commits. So that readers in turn cannot keep it out for
good, it may close a gate, a byte in its log: readers that come while it is closed wait a little before they enter.
Nobody waits without a word or without an end.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import read_at, same_file, write_all
from opsig_cli.trajectory.redo_log import GATE, HEADER, LOG_SUFFIX, MAGIC

log = logging.getLogger("opsig")
"""What is said while something waits or is put right; without a handler Python prints it on stderr."""

LOCK_SECONDS = 15.0
"""A lock that another program holds is waited for so long."""
SAY_SECONDS = 1.0
"""A wait is said after so long."""
GATE_SECONDS = 3.0
"""A reader waits at a closed gate for so long at the most: its writer may have been stopped."""
_PAUSE = 0.005


def try_lock(fd: int, kind: int) -> bool:
    """Take the lock if nobody is in the way. Raises OpsigError where the file system has no locks."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise OpsigError(
                "the file system cannot lock files, without which a reader could see half a commit. "
                "Keep runs on one that can"
            ) from error
        raise
    return True


def wait_for_lock(fd: int, kind: int, path: str, seconds: float, why: str = "") -> bool:
    """Take the lock within `seconds`, saying on the way who is waited for; whether it was got."""
    begin = time.monotonic()
    said = False
    while not try_lock(fd, kind):
        waited = time.monotonic() - begin
        if waited > seconds:
            return False
        if waited > SAY_SECONDS and not said:
            said = True
            log.warning("%s: waiting up to %.0f seconds for %s%s", path, seconds, holders(fd), why)
        time.sleep(min(_PAUSE + waited / 20, 0.05))
    return True


def lock_or_fail(fd: int, kind: int, path: str) -> None:
    """Take the lock of a file. Raises OpsigError where somebody else has held it for LOCK_SECONDS."""
    if not wait_for_lock(fd, kind, path, LOCK_SECONDS):
        raise OpsigError(
            f"{path} has been locked for {LOCK_SECONDS:.0f} seconds by {holders(fd)}. Close it there and try again"
        )


def holders(fd: int) -> str:
    """Who holds locks on an open file, as text; Linux says the processes."""
    try:
        with open("/proc/locks") as locks:
            rows = [line.split() for line in locks]
        inode = os.fstat(fd).st_ino
    except OSError:
        return "another program"
    found = sorted({row[-4] for row in rows if "->" not in row and row[-3].endswith(f":{inode}")} - {"-1"})
    if not found:
        return "another program"
    return (
        f"process {found[0]}" if len(found) == 1 else f"processes {', '.join(found[:3])}" + ", ..." * (len(found) > 3)
    )


def set_gate(log: int, closed: bool) -> None:
    """Close the gate in a log, or open it."""
    if os.pread(log, len(MAGIC), 0) == MAGIC:
        write_all(log, b"\1" if closed else b"\0", GATE)


def pass_gate(path: str) -> None:
    """Wait, as a reader, while the writer has the gate closed; at the most GATE_SECONDS."""
    until = time.monotonic() + GATE_SECONDS
    while time.monotonic() < until:
        try:
            fd = os.open(path + LOG_SUFFIX, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            closed = read_at(fd, 1, GATE) != b"\0" and not try_lock(fd, fcntl.LOCK_SH)  # a dead writer's gate is open
        finally:
            os.close(fd)
        if not closed:
            return
        time.sleep(_PAUSE)


def writer_of(path: str) -> str | None:
    """The process that is writing to the file, as text, or None. Raises nothing where there is no log."""
    try:
        fd = os.open(path + LOG_SUFFIX, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if try_lock(fd, fcntl.LOCK_SH) else holder_of(fd)
    finally:
        os.close(fd)


def lock_log(path: str) -> int:
    """The log, opened and locked for this writer. Raises OpsigError, naming the other, where somebody else writes."""
    while True:
        fd = os.open(path + LOG_SUFFIX, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for _ in range(10):
                if try_lock(fd, fcntl.LOCK_EX):
                    break
                time.sleep(2 * _PAUSE)  # a reader looks for a moment whether a gate's writer is alive
            else:
                raise OpsigError(f"{path} is being written by {holder_of(fd)}. Wait for it to end, or stop it")
            if same_file(fd, path + LOG_SUFFIX):  # or its last writer removed it before we had it locked
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def holder_of(log: int) -> str:
    """Who wrote the log's header, as text."""
    header = os.pread(log, HEADER.size, 0)
    if len(header) < HEADER.size:
        return "another process"
    _, process, host, _, _, _ = HEADER.unpack(header)
    name = host.rstrip(b"\0").decode(errors="replace")
    return f"process {process} on {name}"

"""Atomic, durable commits to an HDF5 file: a physical redo log under h5py's file-object driver. POSIX only.

HDF5 alone loses committed steps when a process is killed, when power fails, and silently when the disk is full. Here
its writes stay in memory until `RedoFile.commit`, which

1. makes sure that file and log are still where they were (`whereabouts.py`),
2. allocates the space that the file will need, so that a full disk is an error while nothing has changed,
3. appends one checksummed record with all writes to the log, RUN.h5.redo, and waits until the disk has it: the commit
   point,
4. applies the writes to the file under an exclusive lock, or leaves them for later while somebody reads.

Large writes to space that no committed byte uses go straight to the file, ahead of the record that makes them part of
it. A file and its log together are always one consistent state: a reader lays the log's records over the file
(`SnapshotFile`), and the next writer applies them for good. The log is cut when it has grown to LOG_BYTES, and removed
when the writer closes: a finished run is one plain HDF5 file. A new file gets its name with its first commit.

Readers cannot hold a writer up for good. When commits have waited for a second, the writer keeps new readers out for a
moment; where old ones stay, it goes on, and once the log is long, or at the end, a whole copy takes the file's place,
while they go on reading the file that they have opened.

While writes are being applied the superblock says that the file is open for writing, so that plain h5py refuses it
rather than read a torn state. Between commits plain h5py reads the last state applied.
"""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from typing import NoReturn

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import same_file, sync_folder, write_all
from opsig_cli.trajectory.identity import new_stamp
from opsig_cli.trajectory.locks import lock_log, log, set_gate, try_lock, wait_for_lock, writer_of
from opsig_cli.trajectory.pending import NEW_SUFFIX, PendingFile
from opsig_cli.trajectory.recovery import clear_the_way, recover
from opsig_cli.trajectory.redo_log import (
    LOG_SUFFIX,
    Stamp,
    apply,
    packed_header,
    packed_record,
)
from opsig_cli.trajectory.snapshot import Overlay
from opsig_cli.trajectory.superblock import SUPERBLOCK
from opsig_cli.trajectory.whereabouts import move_log, path_of, spare_names

LOG_BYTES = 64 << 20
"""The log is applied for good and cut once it is longer."""
LONG_LOG_BYTES = 1 << 30
"""While readers stay, it may grow to a quarter of the file, but not beyond this."""
BEHIND_SECONDS = 1.0
"""Commits that wait for readers longer than this make new readers wait."""
CLOSE_SECONDS = 10.0
"""At the end, readers are waited for so long before a copy takes the file's place."""

_open_files: weakref.WeakSet[RedoFile] = weakref.WeakSet()


def _let_go() -> None:
    """A forked child holds no lock of its parent's: the parent may die, and be followed by another writer."""
    for store in list(_open_files):
        store.let_go()


os.register_at_fork(after_in_child=_let_go)


class RedoFile(PendingFile):
    """A file whose writes become durable together, as a file object for h5py. See the module's first lines.

    `stamp`: where the file has its stamp, 0 for a file that has none; `like`: the open file that must still be there.
    Opening applies what a killed writer had committed. Raises OpsigError where another process is writing, naming it.
    """

    def __init__(self, path: str, create: bool = False, stamp: int = 0, like: os.stat_result | None = None):
        self.path = path
        self._log = lock_log(path)
        self.fd = -1
        try:
            self._named = not create  # whether the file has its own name yet
            if create:
                clear_the_way(path, self._log)
                self.fd = os.open(path + NEW_SUFFIX, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            else:
                self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                now = os.fstat(self.fd)
                if like is not None and (now.st_dev, now.st_ino) != (like.st_dev, like.st_ino):
                    raise OpsigError(f"{path} was replaced while it was being opened. Try again")
                if now.st_nlink > 1:  # the lock is on the log, which goes by the name
                    raise OpsigError(
                        f"{path} has another name, too (a hard link), under which others could write to it at the same "
                        f"time. Make it a file of its own: cp {path} NEW && mv NEW {path}"
                    )
                recover(path, self.fd, self._log)
            super().__init__(path, self.fd)
            self._applied = Stamp.of(self.fd, stamp)  # of what the file holds
            self._start_log()
            sync_folder(path)
        except BaseException:
            self.let_go()
            raise
        self._behind_since: float | None = None
        self._patient_until = 0.0
        self._next_place, self._run_id = 0, b""
        self._drawn: bytes | None = None  # the stamp of the commit that is being made
        self._over: OpsigError | None = None  # why nothing can be written any more
        _open_files.add(self)

    def let_go(self) -> None:
        """Close the files, and with them the locks, and leave everything as it is."""
        for fd in (self.fd, self._log):
            if fd >= 0:
                os.close(fd)
        self.fd = self._log = -1

    def stamp_at(self, place: int, run_id: str) -> None:
        """Every commit from the next on leaves its stamp at this place of the file."""
        self._next_place, self._run_id = place, run_id.encode()

    def _start_log(self) -> None:
        """A log that says who writes, and to which file at which commit, and that has what is not applied to it yet."""
        self._end_of_log = 0  # until it is there
        os.ftruncate(self._log, 0)
        begin, self._sequence = packed_header(self._applied), 0
        if self.overlay.extents:
            begin += packed_record(0, self.committed_size, self.overlay.extents, self._applied)
            self._sequence = 1
        write_all(self._log, begin, 0)
        os.fsync(self._log)
        self._stamp = self._applied.after(self.overlay.extents)  # of the last commit
        self._end_of_log = len(begin)

    # -- committing

    def commit(self) -> None:
        """Make all writes since the last commit durable, together.

        Raises OSError with nothing lost: call it again. Raises OpsigError where the file is not there any more, and
        says where everything is kept.
        """
        if self._over is not None:
            raise self._over
        if not self.changed:
            return
        if not self._named:
            return self._commit_first()
        self._stay()
        if not self._end_of_log:
            self._start_log()
        allocated = os.fstat(self.fd).st_size
        if self.size > allocated:
            os.posix_fallocate(self.fd, allocated, self.size - allocated)
        if self.wrote_direct:
            self._sync(self.fd)
        if not self.fresh.touching(0, SUPERBLOCK):  # every record can mend a superblock torn while it was applied
            superblock = bytearray(min(SUPERBLOCK, self.size))
            self.read_at(0, memoryview(superblock))
            self.fresh.add(0, bytes(superblock))
        stamp = self._add_stamp()
        record = packed_record(self._sequence, self.size, self.fresh.extents, self._stamp)
        write_all(self._log, record, self._end_of_log)
        os.fdatasync(self._log)
        self._end_of_log += len(record)
        self._sequence += 1
        self.committed()
        self._stamp, self._drawn = stamp, None
        self._apply_soon()

    def _add_stamp(self) -> Stamp:
        """Lay the new commit's stamp over the file, and return the stamp that the log goes on from.

        A commit that is tried again keeps its stamp: a file half applied may hold it.
        """
        if self._next_place:
            if self._drawn is None:
                self._drawn = new_stamp(self._run_id)
            self.fresh.add(self._next_place, self._drawn)
        return self._stamp.after(self.fresh.extents)

    def _commit_first(self) -> None:
        """Write a new file whole, and give it its name: before, there was none, or the one that it replaces."""
        self._add_stamp()
        for offset, data in self.fresh.extents:
            write_all(self.fd, data, offset)
        os.ftruncate(self.fd, self.size)
        self._sync(self.fd)
        os.replace(self.path + NEW_SUFFIX, self.path)
        self._named = True
        self.committed()
        self.overlay, self._drawn = Overlay(), None
        self._applied = Stamp.of(self.fd, self._next_place)
        self._end_of_log = 0
        sync_folder(self.path)
        self._start_log()

    def _sync(self, fd: int) -> None:
        """Wait until the disk has the file. What it failed to take once it may never say again: then all is over."""
        try:
            os.fdatasync(fd)
        except OSError as error:
            self._over = OpsigError(
                f"{self.path}: the disk failed: {error.strerror}. What was committed before is in the file and its "
                "log: copy both elsewhere and continue with --resume"
            )
            raise self._over from error

    # -- applying

    def _apply_soon(self) -> None:
        """Apply what is committed; while somebody reads, a later commit does, or a copy takes the file's place."""
        if not try_lock(self.fd, fcntl.LOCK_EX):
            now = time.monotonic()
            self._behind_since = now if self._behind_since is None else self._behind_since
            long = self._end_of_log > max(LOG_BYTES, min(self.size // 4, LONG_LOG_BYTES))
            if not long and (now - self._behind_since < BEHIND_SECONDS or now < self._patient_until):
                return
            if not self._lock_out_readers(BEHIND_SECONDS):
                self._patient_until = time.monotonic() + 10 * BEHIND_SECONDS
                if long:
                    self._replace_by_copy()
                return
        self._apply()

    def _lock_out_readers(self, seconds: float, why: str = "") -> bool:
        """Take the file alone as soon as the readers of now have left; whether they did within the time."""
        set_gate(self._log, True)
        try:
            return wait_for_lock(self.fd, fcntl.LOCK_EX, self.path, seconds, why)
        finally:
            set_gate(self._log, False)

    def _apply(self) -> None:
        """Write what is committed to the file, which is locked, and unlock it."""
        try:
            apply(self.fd, self.overlay.extents)
            self._all_applied()
            if self._end_of_log > LOG_BYTES or self._next_place not in (0, self._stamp.place):
                self._sync(self.fd)
                self._applied = Stamp.of(self.fd, self._next_place or self._stamp.place)
                self._start_log()
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def _all_applied(self) -> None:
        self.overlay = Overlay()
        self._applied = self._stamp
        self._behind_since = None

    def _replace_by_copy(self) -> bool:
        """Let a copy with everything committed take the file's place; who has the file open goes on reading it.

        Returns False where there is no room for it: the log stays.
        """
        new = self.path + NEW_SUFFIX
        try:
            copy = self.copy_to(new, os.O_TRUNC)
        except OSError:
            return False
        try:
            os.replace(new, self.path)
        except BaseException:
            os.close(copy)
            raise
        os.close(self.fd)
        self.fd = copy
        self._all_applied()
        sync_folder(self.path)
        self._start_log()
        return True

    # -- where the file is

    def _stay(self) -> None:
        """Make sure that file and log are where they were, and the file as it was left.

        Raises OpsigError, with everything kept elsewhere, where the file was removed, replaced or written by others.
        """
        self._stay_with_file()
        if not same_file(self._log, self.path + LOG_SUFFIX):
            self._regain_log()
        if not self.overlay.extents and self._applied.now(self.fd) != self._applied:
            self._rescue("written by another process, too,")

    def _stay_with_file(self) -> None:
        if same_file(self.fd, self.path):
            return
        moved = path_of(self.fd)
        if moved is None:
            self._rescue("replaced by another file" if os.path.exists(self.path) else "removed")
        move_log(self._log, self.path, moved)
        log.warning("%s was renamed while it was being written: it goes on as %s", self.path, moved)
        self.path = moved

    def _regain_log(self) -> None:
        try:
            new = os.open(self.path + LOG_SUFFIX, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            self._rescue(f"taken over by {writer_of(self.path) or 'another process'} after its log was removed")
        os.close(self._log)
        self._log = new
        if not try_lock(new, fcntl.LOCK_EX) or self._applied.now(self.fd) != self._applied:
            self._rescue("taken over by another process after its log was removed")
        self._start_log()
        sync_folder(self.path)
        log.warning("%s was removed while it was needed: it was made anew", self.path + LOG_SUFFIX)

    def _rescue(self, how: str) -> NoReturn:
        """Keep a copy of everything under another name, and raise OpsigError that says so."""
        kept = None
        if self._applied.now(self.fd) == self._applied:
            self._add_stamp()
            for name in spare_names(self.path):
                try:
                    os.close(self.copy_to(name, os.O_EXCL))
                    sync_folder(name)
                    kept = name
                    break
                except OSError:
                    continue
        where = f"All that was recorded is kept in {kept}" if kept else "What this process recorded could not be kept"
        self._over = OpsigError(f"{self.path} was {how} while it was being written. {where}")
        if same_file(self._log, self.path + LOG_SUFFIX):
            os.unlink(self.path + LOG_SUFFIX)
        raise self._over

    def replace_by(self, path: str) -> None:
        """Let another, finished file take this one's place, and close. Raises OpsigError where this one has changed."""
        changed = not same_file(self.fd, self.path) or not same_file(self._log, self.path + LOG_SUFFIX)
        if changed or self._stamp.now(self.fd) != self._stamp:
            raise OpsigError(f"{self.path} was written or replaced meanwhile. It was left as it is: try again")
        os.replace(path, self.path)
        os.unlink(self.path + LOG_SUFFIX)
        sync_folder(self.path)
        self.let_go()

    def close(self) -> None:
        """Leave one plain file with everything committed; what was not committed is dropped.

        Readers that hold this up are named, and waited for until a copy takes the file's place.
        """
        try:
            if self.fd >= 0 and self._over is None:
                self._finish()
        finally:
            self.let_go()

    def _finish(self) -> None:
        self.drop()
        self._drawn = None
        if not self._named:
            os.unlink(self.path + NEW_SUFFIX)
        elif self._settle():
            os.ftruncate(self.fd, self.committed_size)
            self._sync(self.fd)
        else:
            return
        if same_file(self._log, self.path + LOG_SUFFIX):
            os.unlink(self.path + LOG_SUFFIX)
        sync_folder(self.path)

    def _settle(self) -> bool:
        """Apply what is not applied yet; whether the log can go."""
        self._stay_with_file()
        if not self.overlay.extents:  # what another process did after our log was removed is not ours to cut
            return self._applied.now(self.fd) == self._applied
        self._stay()
        done = self._apply_at_last()
        if not done:
            log.warning("%s is whole only together with %s", self.path, self.path + LOG_SUFFIX)
        return done

    def _apply_at_last(self) -> bool:
        why = " to let go of it; a copy will take its place then"
        if try_lock(self.fd, fcntl.LOCK_EX) or self._lock_out_readers(CLOSE_SECONDS, why):
            self._apply()
            return True
        return self._replace_by_copy()

"""What a disk holds after a crash, simulated from a recording of everything that a writer did to it.

A recorded writer's every operation on the file and its log goes through the `os` of MODULES, as HDF5 itself never
touches the disk. `kill_states` are what a killed process leaves: every prefix of the operations, and halves of writes.
`power_loss` is what a power cut may leave: of the operations on a file after its last sync, any subset of sectors.
"""

import os
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsig_cli.trajectory import disk, locks, pending, recovery, redo_log, snapshot, store, whereabouts

MODULES = (disk, locks, pending, recovery, redo_log, snapshot, store, whereabouts)

SECTOR = 512


class Recorder:
    """Stands for the module `os` in MODULES, does everything, and writes it down."""

    def __init__(self):
        self.operations: list[tuple] = []
        self._names: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path, flags, mode=0o777, **keywords):
        existed = os.path.exists(path)
        fd = os.open(path, flags, mode, **keywords)
        if os.path.isdir(path):
            self._names[fd] = ""
        else:
            self._names[fd] = os.path.basename(path)
            if flags & os.O_CREAT and not existed:
                self.operations.append(("create", self._names[fd]))
            if flags & os.O_TRUNC:
                self.operations.append(("truncate", self._names[fd], 0))
        return fd

    def pwrite(self, fd, data, offset):
        self.operations.append(("write", self._names[fd], offset, bytes(data)))
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd, size):
        self.operations.append(("truncate", self._names[fd], size))
        os.ftruncate(fd, size)

    def posix_fallocate(self, fd, offset, length):
        self.operations.append(("allocate", self._names[fd], offset + length))
        os.posix_fallocate(fd, offset, length)

    def fsync(self, fd):
        os.fsync(fd)
        self.operations.append(("sync", self._names[fd]))

    fdatasync = fsync

    def unlink(self, path):
        self.operations.append(("unlink", os.path.basename(path)))
        os.unlink(path)

    def replace(self, source, target):
        old, new = os.path.basename(source), os.path.basename(target)
        self.operations.append(("rename", old, new))
        os.replace(source, target)
        self._names = {fd: new if name == old else name for fd, name in self._names.items()}

    def mark(self, what: Any) -> None:
        """Note in the recording that something was promised."""
        self.operations.append(("mark", what))


@contextmanager
def recorded():
    """Record what a writer does inside."""
    recorder = Recorder()
    for module in MODULES:
        module.os = recorder  # pyright: ignore
    try:
        yield recorder
    finally:
        for module in MODULES:
            module.os = os


def apply(files: dict[str, bytearray], operation: tuple) -> None:
    """Carry out one operation on files held in memory."""
    kind, name = operation[:2]
    if kind == "create":
        files[name] = bytearray()
    elif kind == "unlink":
        files.pop(name, None)
    elif kind == "rename" and name in files:
        files[operation[2]] = files.pop(name)
    elif kind in ("truncate", "allocate") and name in files:
        size = operation[2]
        content = files[name]
        if size > len(content):
            content.extend(bytes(size - len(content)))
        elif kind == "truncate":
            del content[size:]
    elif kind == "write" and name in files:
        _, _, offset, data = operation
        content = files[name]
        if offset > len(content):
            content.extend(bytes(offset - len(content)))
        content[offset : offset + len(data)] = data


def kill_states(operations: list[tuple]):
    """(files, marks) after every operation, and in the middle of every write."""
    files: dict[str, bytearray] = {}
    marks: list[Any] = []
    yield {}, []
    for operation in operations:
        if operation[0] == "mark":
            marks.append(operation[1])
            continue
        if operation[0] == "write" and len(operation[3]) > 1:
            torn = {name: bytearray(content) for name, content in files.items()}
            apply(torn, (*operation[:3], operation[3][: len(operation[3]) // 2]))
            yield torn, list(marks)
        apply(files, operation)
        yield {name: bytearray(content) for name, content in files.items()}, list(marks)


def power_loss(operations: list[tuple], generator: random.Random):
    """(files, marks) that one power cut at a random moment may leave."""
    cut = generator.randrange(len(operations) + 1)
    seen = operations[:cut]
    marks = [operation[1] for operation in seen if operation[0] == "mark"]
    last_sync = {operation[1]: place for place, operation in enumerate(seen) if operation[0] == "sync"}
    keep = generator.choice((0.0, 0.2, 0.5, 0.8, 1.0))
    files: dict[str, bytearray] = {}
    for place, operation in enumerate(seen):
        kind = operation[0]
        if kind in ("mark", "sync"):
            continue
        # names are durable with the folder, contents with the file
        anchor = "" if kind in ("create", "unlink", "rename") else operation[1]
        if place < last_sync.get(anchor, -1):
            apply(files, operation)
        elif kind == "create":  # ordered journals keep a name once its file was synced
            if operation[1] in last_sync or generator.random() < keep:
                apply(files, operation)
        elif kind == "write":
            _, name, offset, data = operation
            first = 0
            while first < len(data):
                last = min(len(data), (offset + first) // SECTOR * SECTOR + SECTOR - offset)
                if generator.random() < keep:
                    apply(files, ("write", name, offset + first, data[first:last]))
                first = last
        elif generator.random() < keep:
            apply(files, operation)
    return files, marks


def lay_out(files: dict[str, bytearray], folder: Path) -> None:
    """Put the files into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)

"""Faults at system calls: one, or every kind of them at every call that a command makes.

For the latter a command runs once. At each of its calls its process is copied once for each kind of fault: the copy
meets the fault and goes on to its end, in the same folder, while the first waits; then the folder is put back as it
was, down to the inodes that the first has open. So a fault costs what the command does after it, not the whole command.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opsig_cli.trajectory import identity, recorder, store

KINDS = ("kill", "torn", "EIO", "ENOSPC", "EINTR", "EMFILE", "short")
"""To be killed before the call, or in the middle of a write; errors; and calls that do half of what they were asked."""
KILLS = ("kill", "torn")
READS = ("pread", "preadv", "read", "stat", "fstat", "readlink", "flock")
"""Calls that need no room on the disk."""
SECONDS = 20.0
"""A command that takes longer hangs."""


class Meet(Protocol):
    """Makes a call, or lets it fail; `count` calls were made so far."""

    count: int

    def __call__(self, name: str, call: Callable, *arguments: Any, **keywords: Any) -> Any: ...


class One:
    """One fault, at one call."""

    def __init__(self, kind: str, at: int):
        self._kind, self._at, self.count = kind, at, 0

    def __call__(self, name: str, call: Callable, *arguments: Any, **keywords: Any) -> Any:
        self.count += 1
        if self.count != self._at:
            return call(*arguments, **keywords)
        return fault(self._kind, name, call, *arguments, **keywords)


def fault(kind: str, name: str, call: Callable, *arguments: Any, **keywords: Any) -> Any:
    """What becomes of a call that meets this fault."""
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return call(*arguments, **keywords)
    if kind in ("short", "torn"):
        done = _half(name, call, *arguments)
        if kind == "torn":
            os.kill(os.getpid(), signal.SIGKILL)
        return done
    raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))


def _half(name: str, call: Callable, *arguments: Any) -> Any:
    if name == "pwrite":
        fd, data, offset = arguments
        return call(fd, data[: max(1, len(data) // 2)], offset)
    if name == "preadv":
        fd, (target, *_), offset = arguments
        return call(fd, [memoryview(target)[: max(1, len(target) // 2)]], offset)
    fd, count, offset = arguments  # pread
    return call(fd, max(1, count // 2), offset)


def applies(kind: str, name: str) -> bool:
    """Whether a call of this name can meet such a fault."""
    names = {"torn": ("pwrite",), "short": ("pwrite", "preadv", "pread"), "EMFILE": ("open",)}
    return name in names.get(kind, (name,)) and (kind != "ENOSPC" or name not in READS)


# -- what processes say


def say_into(process: int, before: int | None = None) -> None:
    """Let stdout and stderr of this process be files in the current folder; what `before` has said on stdout counts."""
    if before is not None:
        shutil.copy(f".out{before}", f".out{process}")
    for fd, name, flags in ((0, os.devnull, 0), (1, f".out{process}", os.O_CREAT), (2, f".err{process}", os.O_CREAT)):
        opened = os.open(name, (os.O_WRONLY | os.O_APPEND if fd else os.O_RDONLY) | flags, 0o666)
        os.dup2(opened, fd)
        os.close(opened)


def said(folder: Path, process: int) -> tuple[str, str]:
    """What a process said on stdout and stderr; the files are removed."""
    files = [folder / f".{name}{process}" for name in ("out", "err")]
    out, err = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    for file in files:
        file.unlink(missing_ok=True)
    return out, err


# -- a folder, and what is open in it


def content(folder: Path) -> dict[str, bytes | None]:
    """Files by their names, and folders as None; without what processes say and how many calls they made."""
    found: dict[str, bytes | None] = {}
    for place, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(place, name), folder)] = None
        for name in files:
            if not name.startswith((".out", ".err", ".calls")):
                path = os.path.join(place, name)
                found[os.path.relpath(path, folder)] = Path(path).read_bytes()
    return found


class Kept:
    """A folder as it is, to be put back: links keep the inodes of its files."""

    def __init__(self, folder: Path, links: Path):
        self._folder, self._links = folder, links
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir()
        self.content = content(folder)
        self._inodes = self._now()
        for number, (name, data) in enumerate(self.content.items()):
            if data is not None:
                os.link(folder / name, links / str(number))

    def _now(self) -> dict[str, tuple[int, int]]:
        status = {
            name: os.stat(self._folder / name) for name, data in content(self._folder).items() if data is not None
        }
        return {name: (each.st_ino, each.st_mode) for name, each in status.items()}

    def put_back(self) -> None:
        now = content(self._folder)
        if now == self.content and self._now() == self._inodes:
            return
        for each in self._folder.iterdir():
            if not each.name.startswith((".out", ".err", ".calls")):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        for number, (name, data) in enumerate(self.content.items()):
            if data is None:
                (self._folder / name).mkdir(parents=True, exist_ok=True)
                continue
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(self._links / str(number), self._folder / name)
            os.chmod(self._folder / name, self._inodes[name][1] & 0o777)
            with open(self._folder / name, "r+b") as file:
                file.truncate(len(data))
                file.write(data)


@dataclass
class Open:
    """An open file: its descriptor, path, inode, flags and place, and the lock that it holds."""

    fd: int
    path: str
    inode: int
    flags: int
    place: int
    lock: int


def open_files(folder: Path) -> list[Open]:
    """All that this process has open in a folder."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            fd, path = int(name), os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)")
            said = os.path.basename(path).startswith((".out", ".err", ".calls"))
            if path.startswith(f"{folder}/") and not said:
                info = Path(f"/proc/self/fdinfo/{fd}").read_text()
                locks = [line for line in info.splitlines() if line.startswith("lock:")]
                lock = 0 if not locks else fcntl.LOCK_EX if "WRITE" in locks[0] else fcntl.LOCK_SH
                flags, place = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, os.lseek(fd, 0, os.SEEK_CUR)
                found.append(Open(fd, path, os.fstat(fd).st_ino, flags, place, lock))
    return found


def open_anew(files: list[Open]) -> None:
    """Give these descriptors descriptions of their own, with the locks and places that they had."""
    for each in files:
        there = os.path.exists(each.path) and os.stat(each.path).st_ino == each.inode
        new = os.open(each.path if there else f"/proc/self/fd/{each.fd}", each.flags | os.O_CLOEXEC)
        os.dup2(new, each.fd, inheritable=False)
        os.close(new)
        os.lseek(each.fd, each.place, os.SEEK_SET)
        if each.lock:
            fcntl.flock(each.fd, each.lock | fcntl.LOCK_NB)


class EveryCall:
    """Meets these calls of a command with every one of these kinds of fault, each in a copy of its process.

    Outcomes are written to `states/outcomes`, a line of JSON each; the folders that faults leave are kept by the
    digests of their content.
    """

    def __init__(self, folder: Path, states: Path, calls: range, kinds: Sequence[str]):
        self._folder, self._states, self._calls, self._kinds = folder.resolve(), states, calls, kinds
        self.count, self._inert = 0, False
        self._drawn: random.Random | None = None
        states.mkdir(parents=True)
        (states / "outcomes").touch()  # there may be none: a command may make fewer calls

    def __call__(self, name: str, call: Callable, *arguments: Any, **keywords: Any) -> Any:
        self.count += 1
        if (
            self._drawn is None
        ):  # what copies draw, they draw alike: what they leave is the same where they did the same
            self._drawn = random.Random(0)
            identity.os = recorder.os = _Same(self._drawn)  # pyright: ignore
        here = not self._inert and self.count in self._calls
        kinds = [kind for kind in self._kinds if here and applies(kind, name)]
        if kinds:
            before = Kept(self._folder, self._states / ".links")
            for kind in kinds:
                if kind == "kill":
                    self._outcome(kind, name, None, False, "", "")
                elif self._copy():
                    return fault(kind, name, call, *arguments, **keywords)
                else:
                    self._outcome(kind, name, *self._ended)
                    before.put_back()
                    open_anew(self._open)
        done = call(*arguments, **keywords)
        return _without_our_link(done) if name in ("stat", "fstat") else done

    def _copy(self) -> bool:
        """Go on in a copy of this process, as its own, and return True there; False here, when it has ended."""
        self._open = open_files(self._folder)
        for each in self._open:
            if each.lock:
                fcntl.flock(each.fd, fcntl.LOCK_UN)
        parent = os.getpid()
        held, store._open_files = store._open_files, weakref.WeakSet()  # a copy keeps what others would let go
        try:
            child = os.fork()
        finally:
            store._open_files = held
        if not child:
            self._inert = True
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # whose signal ends it
            say_into(os.getpid(), parent)
            open_anew(self._open)
            return True
        status = os.waitpid(child, 0)[1]
        hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        (self._folder / ".calls").unlink(missing_ok=True)
        self._ended = code, hung, *said(self._folder, child)
        return False

    def _outcome(self, kind: str, name: str, code: int | None, hung: bool, out: str, err: str) -> None:
        now = content(self._folder)
        digest = hashlib.blake2b(repr(sorted(now.items())).encode(), digest_size=16).hexdigest()
        if not (self._states / digest).exists():
            for each, data in {".": None, **now}.items():
                place = self._states / digest / each
                (place if data is None else place.parent).mkdir(parents=True, exist_ok=True)
                if data is not None:
                    place.write_bytes(data)
        about = {
            "kind": kind,
            "at": self.count,
            "name": name,
            "code": code,
            "hung": hung,
            "out": out,
            "err": err[-2000:],
        }
        with open(self._states / "outcomes", "a") as file:
            file.write(json.dumps(about | {"state": digest}) + "\n")


def _without_our_link(found: os.stat_result) -> os.stat_result:
    """What the system says of a file, that of `Kept` not counted among its names."""
    return os.stat_result((*found[:3], max(1, found.st_nlink - 1), *found[4:10]))


class _Same:
    """Stands for the module `os` in a process and its copies: numbers drawn from a seed, and one process id."""

    def __init__(self, drawn: random.Random):
        self._drawn, self._process = drawn, os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def urandom(self, count: int) -> bytes:
        return self._drawn.randbytes(count)

    def getpid(self) -> int:
        return self._process

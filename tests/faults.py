"""Commands in processes of their own in which one system call fails, is cut short, or is the last.

Everything that opsig does to a trajectory file goes through `os` and `fcntl` of a few modules: `Faults` stands for
them. A process is forked for each experiment from one that has imported everything, so that a thousand take minutes.
Whoever uses this must not have run autograd before: its threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import crash
import h5py
import numpy as np

from opsig_cli.trajectory import file, integrity
from opsig_cli.trajectory.file import Trajectory, cut_off_at_birth, open_trajectory

CALLS = (
    "open", "pwrite", "pread", "preadv", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "unlink", "replace",
    "rename", "stat", "fstat", "readlink", "fchmod",
)  # fmt: skip
KINDS = ("kill", "EIO", "ENOSPC", "EINTR", "EMFILE", "short")
SECONDS = 20.0
"""A command that takes longer hangs."""
TASK = f"{Path(__file__).parent / 'tasks' / 'tiny.py'}:Tiny"

TRAIN = ["train", "--task", TASK, "-o", "run.h5", "--steps", 6, "--learning-rate", 0.5, "--seed", 3]
TRAIN += ["--commit-every", 1, "--checkpoint-every", 2]


def preload(folder: Path) -> None:
    """Import what a command that trains imports, once for all that are forked."""
    command = [*TRAIN, "--track", "--sharpness-every", 2]
    ended = run(folder, command, when_done=lambda: Path(".modules").write_text("\n".join(sys.modules)), seconds=200)
    assert ended.code == 0, ended.err
    for name in (folder / ".modules").read_text().split():
        with contextlib.suppress(Exception):
            import_module(name)


class Faults:
    """Stands for a module: counts its calls over all stand-ins, and lets the chosen one fail."""

    def __init__(self, module: Any, names: tuple[str, ...], kind: str | None, at: int, count: list[int]):
        self._module, self._names, self._kind, self._at, self._count = module, names, kind, at, count

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._module, name)
        return (lambda *a, **k: self._call(name, call, *a, **k)) if name in self._names else call

    def _call(self, name: str, call: Callable, *arguments: Any, **keywords: Any) -> Any:
        self._count[0] += 1
        if self._count[0] != self._at or self._kind is None:
            return call(*arguments, **keywords)
        if self._kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
            return call(*arguments, **keywords)
        if self._kind == "short":
            return self._half(name, call, *arguments, **keywords)
        raise OSError(getattr(errno, self._kind), os.strerror(getattr(errno, self._kind)))

    def _half(self, name: str, call: Callable, *arguments: Any, **keywords: Any) -> Any:
        if name == "pwrite":
            fd, data, offset = arguments
            return call(fd, data[: max(1, len(data) // 2)], offset)
        if name == "preadv":
            fd, (target, *_), offset = arguments
            return call(fd, [memoryview(target)[: max(1, len(target) // 2)]], offset)
        return call(*arguments, **keywords)


def install(kind: str | None, at: int) -> list[int]:
    """Put the stand-ins in place; returns the count of calls so far, which goes on."""
    count = [0]
    for module in (*crash.MODULES, file, integrity):
        if hasattr(module, "os"):
            module.os = Faults(os, CALLS, kind, at, count)  # pyright: ignore
        if hasattr(module, "fcntl"):
            module.fcntl = Faults(fcntl, ("flock",), kind, at, count)  # pyright: ignore
    return count


@dataclass
class Ended:
    """How a command ended: its exit code, None where it hung or was killed, what it said, and its system calls."""

    code: int | None
    err: str
    calls: int
    hung: bool
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether it ended well, or with one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("opsig: ")]
        return self.code == 0 or (self.code in (1, 130) and len(lines) == 1 and "Traceback" not in self.err)


def run(
    folder: Path, arguments: list[Any], kind: str | None = None, at: int = 0, prepare: Callable = bool,
    when_stopped: Callable = bool, when_done: Callable = bool, seconds: float = SECONDS,
) -> Ended:  # fmt: skip
    """Run a command in a process of its own inside of the folder; where it stops, do something and let it go on."""
    from opsig_cli.main import run as main

    calls = folder / ".calls"
    begin = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.chdir(folder)
            os.environ.pop("OPSIG_DEBUG", None)
            fd = os.open(f".err{os.getpid()}", os.O_WRONLY | os.O_CREAT)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(fd, 2)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            sys.argv = ["opsig", *map(str, arguments)]
            _promise()
            prepare()
            count = install(kind, at)
            try:
                main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            when_done()
            Path(".calls").write_text(str(count[0]))
            sys.stderr.flush()
        finally:
            os._exit(code)
    status = None
    while time.monotonic() - begin < seconds:
        done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if done and os.WIFSTOPPED(status):
            stopped = time.monotonic()
            when_stopped()
            begin += time.monotonic() - stopped
            os.kill(child, signal.SIGCONT)
        elif done:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = None
    code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None
    out = folder / f".err{child}"
    err = out.read_text(errors="replace") if out.exists() else ""
    out.unlink(missing_ok=True)
    made = int(calls.read_text() or 0) if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return Ended(code, err, made, status is None, time.monotonic() - begin)


def _promise() -> None:
    """Let every commit that returns leave how many steps it made durable."""
    commit = Trajectory.commit

    def promising(self: Trajectory) -> None:
        commit(self)
        if os.path.basename(self.path) == "run.h5" and ".repack-" not in self.path:
            counts = [str(len(self.steps(group))) for group in GROUPS]
            Path(".promised").write_text(" ".join(counts))

    Trajectory.commit = promising


GROUPS = ("scalars", "losses", "checkpoints", "sharpness")


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of a run by name, but the stamp of its last commit; read by plain h5py."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as plain:
        plain.visititems(lambda name, d: found.update({name: d[()]}) if isinstance(d, h5py.Dataset) else None)
    found.pop("commit", None)
    return found


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray], solved: bool = False) -> bool:
    """Whether two runs hold the same to the bit; eigenvalues, where they were `solved` for, to the tolerance.

    `opsig sharpness` begins each solve at the one before: where it is cut off, the next begins elsewhere.
    """
    if left.keys() != right.keys():
        return False
    for name, values in left.items():
        if solved and name.startswith("sharpness/") and name != "sharpness/step":
            if name == "sharpness/eigenvalue" and not np.allclose(values, right[name], rtol=1e-3):
                return False
        elif not np.array_equal(values, right[name], equal_nan=values.dtype.kind == "f"):
            return False
    return True


@dataclass
class Scenario:
    """A command on a folder, what goes on with it after it was cut off, and what the run must hold in the end."""

    name: str
    command: list[Any]
    again: Callable[[Path], list[Any]]
    begin: Path | None = None

    def lay_out(self, folder: Path) -> None:
        """An empty folder with what the command begins from."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.begin is not None:
            for each in self.begin.iterdir():
                if not each.name.startswith("."):
                    shutil.copy(each, folder / each.name)


def scenarios(base: Path) -> list[Scenario]:
    """Those of every command that writes; their beginnings are made in `base`."""
    tracked = [*TRAIN, "--track", "--sharpness-every", 2]
    for name, command in (("bare", TRAIN), ("whole", tracked), ("other", [*tracked, "--seed", 4])):
        (base / name).mkdir(parents=True)
        ended = run(base / name, command)
        assert ended.code == 0, ended.err
    (base / "table").mkdir()
    np.save(base / "table" / "losses.npy", np.random.default_rng(0).random((8, 30)))
    (base / "killed").mkdir()
    calls = run(base / "killed", tracked).calls
    (base / "killed" / "run.h5").unlink()
    run(base / "killed", tracked, "kill", calls * 2 // 3)

    def resumed(folder: Path) -> list[Any]:
        there = (folder / "run.h5").exists() or cut_off_at_birth(str(folder / "run.h5"))
        return [*tracked, "--resume"] if there else tracked

    def replaced(folder: Path) -> list[Any]:
        with contextlib.suppress(Exception), open_trajectory(folder / "run.h5") as kept:
            if kept.attributes["settings_json"]["seed"] == 3:
                return [*tracked, "--resume"]
        return [*tracked, "--replace"]

    def imported(folder: Path) -> list[Any]:
        return [*table, "--append"] if (folder / "run.h5").exists() else table

    table = ["import", "--losses", "losses.npy", "-o", "run.h5"]
    own = ["run.h5", "--task", TASK]
    return [
        Scenario("train", tracked, resumed),
        Scenario("train --resume", [*tracked, "--resume"], resumed, base / "killed"),
        Scenario("train --replace", [*tracked, "--replace"], replaced, base / "other"),
        Scenario("track", ["track", *own], lambda _: ["track", *own], base / "bare"),
        Scenario("sharpness", ["sharpness", *own], lambda _: ["sharpness", *own], base / "bare"),
        Scenario("import", table, imported, base / "table"),
        Scenario("repack", ["repack", "run.h5"], lambda _: ["repack", "run.h5"], base / "whole"),
        Scenario("repack a killed run", ["repack", "run.h5"], lambda _: ["repack", "run.h5"], base / "killed"),
    ]


def _few_descriptors(spare: int) -> None:
    used = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + spare))


def _little_memory(megabytes: float) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = int(pages * resource.getpagesize() + megabytes * (1 << 20))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _small_disk(kilobytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, kilobytes << 10))


def _read_only_folder(_: float) -> None:
    os.chmod(".", 0o555)
    if os.geteuid() == 0:
        os.setuid(65534)


def _jumping_clock(seconds: float) -> None:
    draw = np.random.default_rng(int(seconds))
    time.time = lambda: float(draw.uniform(0, 4e9))


CONDITIONS: dict[str, tuple[Callable, Sequence[float]]] = {
    "few descriptors": (_few_descriptors, range(12)),
    "little memory": (_little_memory, (0.1, 0.5, 1, 2, 4, 8, 16, 32, 64)),
    "small disk": (_small_disk, (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)),
    "read-only folder": (_read_only_folder, (0,)),
    "jumping clock": (_jumping_clock, (0, 1)),
}
"""What may be scarce or odd around a process, and how much of it: set in a process before its command runs."""


def judge(scenario: Scenario, folder: Path, ended: Ended, kind: str, truth: dict[str, np.ndarray]) -> str | None:
    """What is wrong after a command with a fault, in a word first, or None."""
    if ended.hung:
        return "hang"
    if ended.code is None and kind not in ("kill", "little memory"):  # libraries abort when they get none
        return "died"
    if ended.code is not None and not ended.clean:
        return "traceback: " + ended.err[-600:]
    path, solved = folder / "run.h5", scenario.name == "sharpness"
    if ended.code == 0 and not (path.exists() and same(arrays(path), truth, solved)):
        return "silent"
    promised = folder / ".promised"
    os.chmod(folder, 0o755)
    if promised.exists():
        try:
            with open_trajectory(path) as kept:
                have = [len(kept.steps(group)) for group in GROUPS]
                damaged = [group for group in GROUPS if kept.has(group) and kept.damaged_steps(group)]
        except Exception as error:
            return f"lost: {error}"
        if damaged or any(h < int(p) for h, p in zip(have, promised.read_text().split(), strict=True)):
            return "lost"
    elif scenario.begin is not None and (scenario.begin / "run.h5").exists() and not path.exists():
        return "lost: the run is gone"
    again = run(folder, scenario.again(folder))
    if again.hung or again.code != 0:
        return f"cannot go on: {again.err[-600:]}"
    left = [n.name for n in folder.iterdir() if n.name.startswith("run.h5.")]
    if left:
        return f"left behind: {left}"
    return None if same(arrays(path), truth, solved) else "mixed"

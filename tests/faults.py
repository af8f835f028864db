"""Commands in processes of their own in which a system call fails, is cut short, or is the last.

Everything that opsig does to a trajectory file goes through `os` and `fcntl` of a few modules, for which `Calls`
stands. `run` gives a command with one fault, or with every fault at every call: see `every_call`. Processes are forked
from one that has imported everything. Whoever uses this must not have run autograd on a GPU before: its threads do not
survive a fork.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import crash
import every_call
import h5py
import numpy as np

from opsig_cli.studies import mining
from opsig_cli.studies.importing import flow
from opsig_cli.trajectory import chunks, external, file, integrity, sightings
from opsig_cli.trajectory.file import Trajectory, cut_off_at_birth, open_trajectory
from opsig_cli.trajectory.recorder import Recorder

CALLS = (
    "open", "pwrite", "pread", "preadv", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "unlink", "replace",
    "rename", "stat", "fstat", "readlink", "fchmod",
)  # fmt: skip
SECONDS = every_call.SECONDS
TASK = f"{Path(__file__).parent / 'tasks' / 'tiny.py'}:Tiny"

TRAIN = ["train", "--task", TASK, "-o", "run.h5", "--steps", 2, "--learning-rate", 0.5, "--seed", 3]
TRAIN += ["--commit-every", 1, "--checkpoint-every", 1]


def preload(folder: Path, scenario: Scenario) -> None:
    """Import what a command imports, once for all processes that are forked to run it."""
    scenario.lay_out(folder)
    names = folder / ".modules"
    ended = run(folder, scenario.command, when_done=lambda: names.write_text("\n".join(sys.modules)), seconds=200)
    assert ended.code == 0, ended.err
    for name in names.read_text().split():
        with contextlib.suppress(Exception):
            import_module(name)


class Calls:
    """Stands for a module: what is called by these names in it is handed to `meet`."""

    def __init__(self, module: Any, names: tuple[str, ...], meet: every_call.Meet):
        self._module, self._names, self._meet = module, names, meet

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._module, name)
        return (lambda *a, **k: self._meet(name, call, *a, **k)) if name in self._names else call


class ReadFile:
    """An open file that is read, through `meet`."""

    def __init__(self, meet: every_call.Meet, *arguments: Any):
        self._meet, self._file = meet, meet("open", open, *arguments)
        self.seek = self._file.seek

    def __enter__(self) -> ReadFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def read(self, count: int) -> bytes:
        return self._meet("read", self._file.read, count)


class Here(Executor):
    """Stands for threads, which a copy of a process does not have."""

    def __init__(self, *_: Any):
        pass

    def submit(self, call: Callable, *arguments: Any, **keywords: Any) -> Future:
        done = Future()
        try:
            done.set_result(call(*arguments, **keywords))
        except Exception as error:
            done.set_exception(error)
        return done


def install(meet: every_call.Meet) -> None:
    """Put the stand-ins in place."""
    for module in (*crash.MODULES, chunks, external, file, integrity):
        if hasattr(module, "os"):
            module.os = Calls(os, CALLS, meet)  # pyright: ignore
        if hasattr(module, "fcntl"):
            module.fcntl = Calls(fcntl, ("flock",), meet)  # pyright: ignore
    external.open = lambda *arguments: ReadFile(meet, *arguments)  # pyright: ignore
    flow.ThreadPoolExecutor = Here  # pyright: ignore


@dataclass
class Ended:
    """How a command ended: its exit code, None where it hung or was killed, what it said, and its system calls."""

    code: int | None
    err: str
    calls: int
    hung: bool
    out: str = ""

    @property
    def clean(self) -> bool:
        """Whether it ended well, or with one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("opsig: ")]
        return self.code == 0 or (self.code in (1, 130) and len(lines) == 1 and "Traceback" not in self.err)


def run(
    folder: Path, command: list[Any] | Callable, meet: every_call.Meet | None = None, prepare: Callable = bool,
    when_stopped: Callable = bool, when_done: Callable = bool, seconds: float = SECONDS,
) -> Ended:  # fmt: skip
    """Run a command in a process of its own inside of the folder; where it stops, do something and let it go on."""
    meet = meet or every_call.One("", 0)
    calls = folder / ".calls"
    begin = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            os.chdir(folder)
            os.environ.pop("OPSIG_DEBUG", None)
            every_call.say_into(os.getpid())
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            _promise()
            prepare()
            install(meet)
            code = _called(command)
            when_done()
            sys.stdout.flush()
            sys.stderr.flush()
            Path(".calls").write_text(str(meet.count))
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
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = None
    code = os.WEXITSTATUS(status) if status is not None and os.WIFEXITED(status) else None
    out, err = every_call.said(folder, child)
    made = int(calls.read_text() or 0) if calls.exists() else 0
    calls.unlink(missing_ok=True)
    return Ended(code, err, made, status is None, out)


def _called(command: list[Any] | Callable) -> int:
    """The exit code of a command, or of a function that uses opsig as a library."""
    from opsig_cli.errors import OpsigError
    from opsig_cli.main import run as main

    try:
        if callable(command):
            command()
            return 0
        sys.argv = ["opsig", *map(str, command)]
        main()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except OpsigError as error:
        print(f"opsig: {error}", file=sys.stderr)
        return 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70


def _promise() -> None:
    """Let every commit that returns leave how many steps it made durable."""
    commit = Trajectory.commit

    def promising(self: Trajectory) -> None:
        commit(self)
        if os.path.basename(self.path) == "run.h5" and ".repack-" not in self.path:
            counts = [str(_count(self, group)) for group in GROUPS]
            Path(".promised").write_text(" ".join(counts))

    Trajectory.commit = promising


GROUPS = ("scalars", "losses", "checkpoints", "sharpness", "sightings")


def _count(run: Trajectory, group: str) -> int:
    return sightings.count(run) if group == "sightings" else len(run.steps(group))


def _damaged(run: Trajectory, group: str) -> bool:
    return bool(len(sightings.damaged_places(run)) if group == "sightings" else run.damaged_steps(group))


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of a run by name, but the stamp of its last commit and results that may be kept or not; read by
    plain h5py."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(path) as plain:
        plain.visititems(lambda name, d: found.update({name: d[()]}) if isinstance(d, h5py.Dataset) else None)
    return {name: values for name, values in found.items() if not name.startswith(("commit", "clusters/", "mined/"))}


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
    command: list[Any] | Callable
    again: Callable[[Path], list[Any] | Callable]
    begin: Path | None = None
    answers: bool = False
    """Whether what it writes to stdout is a part of what must be true."""

    def lay_out(self, folder: Path) -> None:
        """An empty folder with what the command begins from."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self.begin is not None:
            shutil.copytree(self.begin, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))


def make_beginnings(base: Path) -> None:
    """What commands begin from, each in a folder of its own."""
    tracked = [*TRAIN, "--track", "--sharpness-every", 2]
    preload(base / "first", Scenario("", tracked, lambda _: tracked))
    _make(base / "bare", TRAIN)
    _make(base / "whole", tracked)
    _make(base / "other", [*tracked, "--seed", 4])
    _make_killed(base / "killed", tracked)
    _make(base / "looped", _loop)
    _make_killed(base / "loop killed", _loop)
    (base / "table").mkdir()
    np.save(base / "table" / "losses.npy", np.random.default_rng(0).random((8, 30)))
    (base / "log").mkdir()
    lines = [f"{step},{(step * 7 + i) % 30},{step + i / 8}" for step in range(8) for i in range(3)]
    (base / "log" / "log.csv").write_text("\n".join(["step,sample,loss", *lines]))
    _make(base / "saved", _saved)
    _make(base / "seen", [*TRAIN, "--track", "--steps", 24, "--commit-every", 24, "--checkpoint-every", 6])
    shutil.copytree(base / "bare", base / "parts")
    for number in (1, 2):
        part = ["track", "run.h5", "--task", TASK, "--part", f"{number}/2", "-o", f"part{number}.h5"]
        ended = run(base / "parts", part)
        assert ended.code == 0, ended.err
    for name, source in (("parent", "whole"), ("divided", "bare")):
        (base / name).mkdir()
        shutil.copy(base / source / "run.h5", base / name / f"{name}.h5")


def scenarios(base: Path) -> list[Scenario]:
    """Those of every command that writes, from the beginnings in `base`; those without torch first, which are cheap to
    fork."""
    tracked = [*TRAIN, "--track", "--sharpness-every", 2]
    own = ["run.h5", "--task", TASK]
    mining.LONG_BYTES = 0  # what is mined is kept in every run

    def resumed(folder: Path) -> list[Any]:
        there = (folder / "run.h5").exists() or cut_off_at_birth(str(folder / "run.h5"))
        return [*tracked, "--resume"] if there else tracked

    def replaced(folder: Path) -> list[Any]:
        with contextlib.suppress(Exception), open_trajectory(folder / "run.h5") as kept:
            if kept.attributes["settings_json"]["seed"] == 3:
                return [*tracked, "--resume"]
        return [*tracked, "--replace"]

    def appended(command: list[Any]) -> Callable[[Path], list[Any]]:
        return lambda folder: [*command, "--append"] if (folder / "run.h5").exists() else command

    def begun_anew(command: list[Any]) -> Callable[[Path], list[Any]]:
        return lambda folder: [*command, "--replace"] if (folder / "run.h5").exists() else command

    def simply(name: str, command: list[Any] | Callable, begin: str | None = None, answers: bool = False) -> Scenario:
        return Scenario(name, command, lambda _: command, base / begin if begin else None, answers)

    table = ["import", "--losses", "losses.npy", "-o", "run.h5"]
    log = ["import", "--losses", "log.csv", "--sightings", "-o", "run.h5"]
    held = ["import", "saved", "--task", TASK, "-o", "run.h5", "--batch-size", "full", "--track"]
    refers = [*held, "--reference"]
    branch = ["branch", "parent.h5", "--task", TASK, "--from", 1, "--steps", 1, "--learning-rate", 0.1, "-o", "run.h5"]
    divided = ["track", "divided.h5", "--task", TASK, "--part", "1/2", "-o", "run.h5"]
    return [
        Scenario("import", table, appended(table), base / "table"),
        Scenario("import of sightings", log, begun_anew(log), base / "log"),
        simply("Recorder", _loop),
        simply("mine", ["mine", "run.h5", "--top", 5], "seen", True),
        simply("merge", ["merge", "run.h5", "part1.h5", "part2.h5"], "parts"),
        simply("repack", ["repack", "run.h5"], "looped"),
        simply("repack a killed run", ["repack", "run.h5"], "loop killed"),
        simply("cluster", ["cluster", *own, "--by", "loss"], "seen", True),
        simply("track", ["track", *own], "bare"),
        simply("track --part", divided, "divided"),
        simply("sharpness", ["sharpness", *own], "bare"),
        Scenario("import of checkpoints", held, appended(held), base / "saved"),
        Scenario("import --reference", refers, appended(refers), base / "saved"),
        Scenario("train", tracked, resumed),
        Scenario("train --resume", [*tracked, "--resume"], resumed, base / "killed"),
        Scenario("train --replace", [*tracked, "--replace"], replaced, base / "other"),
        Scenario("branch", branch, begun_anew(branch), base / "parent"),
    ]


def _make(folder: Path, command: list[Any] | Callable) -> None:
    folder.mkdir(parents=True)
    ended = run(folder, command, seconds=200)
    assert ended.code == 0, ended.err


def _make_killed(folder: Path, command: list[Any] | Callable) -> None:
    """What is left of a command that was killed when it had done two thirds."""
    folder.mkdir()
    calls = run(folder, command, seconds=200).calls
    (folder / "run.h5").unlink()
    run(folder, command, every_call.One("kill", calls * 2 // 3))


def _saved() -> None:
    """Two checkpoints of another program's run."""
    import torch
    from tasks import tiny

    task = tiny.Tiny()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    os.mkdir("saved")
    for step in range(2):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"saved/step{step}.pt")
        optimizer.zero_grad()
        task.losses(model, (task.x, task.y)).mean().backward()
        optimizer.step()


def _loop() -> None:
    """A loop of a person's own, that goes back to the last step where it was cut off."""
    with Recorder("run.h5", samples=20, resume=os.path.exists("run.h5"), commit_every=1) as recorder:
        first = recorder.last_step or 0
        recorder.rewind(first)
        for step in range(first, 4):
            seen = np.arange(step, step + 4)
            recorder.observe(step, seen.tolist(), seen / 4)
            recorder.record(step, losses=np.arange(20) / (step + 1), scalars={"train_loss": step, "norm": 2.0})


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


@dataclass
class Truth:
    """What a run and its command's answer are without a fault."""

    arrays: dict[str, np.ndarray]
    out: str


def how_it_ended(ended: Ended, may_die: bool) -> str | None:
    """What is wrong with the end of a command with a fault, in a word first, or None."""
    if ended.hung:
        return "hang"
    if ended.code is None and not may_die:
        return "died"
    return None if ended.code is None or ended.clean else "traceback: " + ended.err[-600:]


def what_it_left(scenario: Scenario, folder: Path, ended: Ended, truth: Truth) -> str | None:
    """What is wrong with what a command with a fault left behind, or None; goes on with the command."""
    path = folder / "run.h5"
    if ended.code == 0 and "left out" not in ended.err and not _is_true(scenario, path, ended, truth):
        return "silent"
    promised = folder / ".promised"
    os.chmod(folder, 0o755)
    if promised.exists():
        try:
            with open_trajectory(path) as kept:
                have = [_count(kept, group) for group in GROUPS]
                damaged = [group for group in GROUPS if kept.has(group) and _damaged(kept, group)]
        except Exception as error:
            return f"lost: {error}"
        if damaged or any(h < int(p) for h, p in zip(have, promised.read_text().split(), strict=True)):
            return "lost"
    elif scenario.begin is not None and (scenario.begin / "run.h5").exists() and not path.exists():
        return "lost: the run is gone"
    again = run(folder, scenario.again(folder))
    if again.hung or again.code != 0:
        return f"cannot go on: {again.err[-600:]}"
    if scenario.answers:  # where the result was kept, nothing was written
        open_trajectory(path, "r+").close()
    left = [n.name for n in folder.iterdir() if n.name.startswith("run.h5.")]
    if left:
        return f"left behind: {left}"
    return None if _is_true(scenario, path, again, truth) else "mixed"


def _is_true(scenario: Scenario, path: Path, ended: Ended, truth: Truth) -> bool:
    if scenario.answers and ended.out != truth.out:
        return False
    return path.exists() and same(arrays(path), truth.arrays, scenario.name.startswith("sharpness"))


def judge(scenario: Scenario, folder: Path, ended: Ended, may_die: bool, truth: Truth) -> str | None:
    """What is wrong after a command with a fault, in a word first, or None."""
    return how_it_ended(ended, may_die) or what_it_left(scenario, folder, ended, truth)


def truth_of(scenario: Scenario, folder: Path) -> tuple[Truth, int]:
    """What the command makes without a fault, and its number of system calls."""
    scenario.lay_out(folder)
    whole = run(folder, scenario.command)
    assert whole.code == 0, whole.err
    return Truth(arrays(folder / "run.h5"), whole.out), whole.calls


def attack(
    scenario: Scenario, base: Path, calls: range, kinds: Sequence[str]
) -> list[tuple[str, int, str, str | None]]:
    """Every kind of fault at these calls of a command: kind, number and name of the call, and what was wrong.

    What is left behind is judged once, however many faults leave the same.
    """
    truth = truth_of(scenario, base / "truth")[0]
    folder, states = base / "here", base / "states"
    shutil.rmtree(states, ignore_errors=True)
    scenario.lay_out(folder)
    found = every_call.EveryCall(folder, states, calls, kinds)
    whole = run(folder, scenario.command, found, seconds=100_000)
    assert whole.code == 0, whole.err
    assert _is_true(scenario, folder / "run.h5", whole, truth), "the faults reached the process that has none"
    known: dict[tuple, str | None] = {}
    outcomes = []
    for each in map(json.loads, (states / "outcomes").read_text().splitlines()):
        ended = Ended(each["code"], each["err"], 0, each["hung"], each["out"])
        wrong = how_it_ended(ended, each["kind"] in every_call.KILLS)
        if wrong is None:
            key = (each["state"], ended.code == 0, scenario.answers and ended.out, "left out" in ended.err)
            if key not in known:
                shutil.rmtree(folder)
                shutil.copytree(states / each["state"], folder)
                known[key] = what_it_left(scenario, folder, ended, truth)
            wrong = known[key]
        outcomes.append((each["kind"], each["at"], each["name"], wrong))
    return outcomes

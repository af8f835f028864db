"""Damaged files through every command that reads: the answer is that of the run without its damaged rows, or a refusal.

    python benchmarks/damaged.py [--files 2000] [--first SEED] [--heavy 2] [--processes 20] [--runs written,packed]

Each file is a small run with bytes changed, a page zeroed, two pieces swapped, its end cut off, or a value changed
behind its checksum. Runs are as written, or repacked; also with what `mine` and `cluster` found kept in them (kept),
seen batch by batch (seen), or with their checkpoints in other files (refers). Which rows are damaged is found by
comparing a file with the original through plain h5py. Each command's exit code and records are then held against those
for a run in which these rows were never recorded. Commands that take long take turns, `--heavy` of them a file (0:
all). A sample is run again in processes of their own. Prints counts by command, also where it is interrupted, and every
failure with the seed that makes it again; exit code 1 where there is one.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from opsig_cli import Recorder
from opsig_cli.studies import mining
from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.file import create_trajectory, open_trajectory
from opsig_cli.trajectory.schema import is_known

TASKS = Path(__file__).parent.parent / "tests" / "tasks" / "tiny.py"
TASK = ("--task", f"{TASKS}:Tiny:samples=24")
RUNS = ("written", "packed", "kept", "seen", "refers")
GROUPS = ("scalars", "losses", "checkpoints", "sharpness")
KINDS_OF_ROWS = (*GROUPS, "sightings")
mining.LONG_BYTES = 0  # what is mined is kept in small runs, too
LIGHT = {
    "info": ("info", "RUN"),
    "verify": ("verify", "RUN"),
    "mine": ("mine", "RUN", "--top", "6"),
    "mine --step": ("mine", "RUN", "--step", "12"),
    "mine --window": ("mine", "RUN", "--window", "4:20", "--score", "variation"),
    "compare": ("compare", "RUN"),
    "probe --projection": ("probe", "RUN", "--projection"),
    "repack": ("repack", "RUN", "-o", "NEW"),
}
HEAVY = {
    "cluster --by loss": ("cluster", "RUN", "--by", "loss"),
    "report": ("report", "RUN", "--by", "loss", "-o", "NEW.html"),
    "cluster": ("cluster", "RUN", *TASK),
    "sharpness --metrics": ("sharpness", "RUN", "--metrics", "gradient_norm", *TASK),
    "sharpness": ("sharpness", "RUN", *TASK),
    "track": ("track", "RUN", *TASK),
    "train --resume": ("train", "-o", "RUN", "--resume", "--steps", "26", *TASK),
    "train --like": ("train", "-o", "NEW", "--like", "RUN", "--steps", "2", *TASK),
}
COMMANDS = LIGHT | HEAVY
CHANGES_FILE = {
    "sharpness",
    "track",
    "train --resume",
    "cluster",
    "cluster --by loss",
    "report",
    "mine",
    "mine --step",
    "mine --window",
}  # or keeps what it found
NOT_COMPARED = ("trajectory", "path", "bytes", "bytes_before", "reason", "groups", "parameters")
SECONDS = 20
"""A command that takes longer hangs."""


class Hang(Exception):
    """A command took longer than SECONDS."""


def call(arguments: tuple[str, ...], run: Path, new: Path) -> tuple[int, str, str]:
    """A command in this process: exit code (-1: an exception got out, -2: it hung), stdout and stderr."""
    from opsig_cli.main import run as main

    def hangs(*_: object) -> None:
        raise Hang

    places = {"RUN": str(run), "NEW": str(new), "NEW.html": f"{new}.html"}
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["opsig", *(places.get(argument, argument) for argument in arguments)]
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except Hang:
        code = -2
    except BaseException:
        err.write(traceback.format_exc())
        code = -1
    finally:
        signal.alarm(0)
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def records_of(out: str) -> list[dict]:
    """Records without what depends on where and how large a file is."""
    return [{k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED} for line in out.splitlines()]


def without(source: Path, target: Path, left_out: dict[str, set[int]]) -> None:
    """A copy of a run in which rows, given by their places, were never recorded."""
    with open_trajectory(source) as run, create_trajectory(target, run.samples, replace=True) as copy:
        for key, value in run._file.attrs.items():
            copy._file.attrs[key] = value
        for name in run.names():
            if name not in copy._file and name.split("/")[0] not in KINDS_OF_ROWS:
                copy.write(name, run.read(name))
        for group in GROUPS:
            names = [n for n in run.names() if n.startswith(f"{group}/") and not n.endswith(("/step", "/checksum"))]
            for place, step in enumerate(run.steps(group).tolist()):
                if place not in left_out.get(group, ()):
                    row = {name.removeprefix(f"{group}/").replace("/", "__"): run.row(name, step) for name in names}
                    copy.append(group, step, **row)
        if sightings.count(run):
            whole = sightings.joined(list(sightings.blocks(run)))
            sightings.append(copy, whole[~np.isin(np.arange(len(whole)), list(left_out.get("sightings", ())))])


class Original:
    """The whole run, what is in it, and what commands answer to it without any of its rows."""

    def __init__(self, path: Path, folder: Path):
        self.path, self._folder = path, folder
        with h5py.File(path) as file:
            self.datasets: dict[str, np.ndarray] = {}
            file.visititems(lambda name, item: self._keep(name, item))
        self.answer = functools.lru_cache(None)(self._answer)

    def _keep(self, name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and is_known(name):  # others stand for dimensions and hold nothing
            self.datasets[name] = item[()]

    def damage_of(self, path: Path) -> dict[str, set[int]] | None:
        """Places of the rows that differ in each row group, and under "" anything else that does; None where plain
        h5py cannot open the file."""
        found: dict[str, set[int]] = {}
        try:
            with h5py.File(path) as file:
                for name, whole in self.datasets.items():
                    group = name.split("/")[0] if name.split("/")[0] in KINDS_OF_ROWS else ""
                    found.setdefault(group, set()).update(self._differing(file, name, whole))
        except (OSError, RuntimeError, KeyError, ValueError):
            return None
        return {group: places for group, places in found.items() if places}

    @staticmethod
    def _differing(file: h5py.File, name: str, whole: np.ndarray) -> set[int]:
        def same(place: object) -> bool:
            try:
                return np.asarray(file[name][place]).tobytes() == np.asarray(whole[place]).tobytes()
            except (OSError, RuntimeError, KeyError, ValueError, IndexError):
                return False

        return set() if same(()) else {place for place in range(len(whole)) if not same(place)} or {0}

    def _answer(self, name: str, left_out: frozenset) -> tuple[int, list[dict]]:
        run, new = self._folder / "reference.h5", self._folder / "new.h5"
        clear(self._folder)
        shutil.copy(self.path, run)
        if left_out:
            without(self.path, run, {group: set(places) for group, places in left_out})
        code, out, _ = call(COMMANDS[name], run, new)
        return code, records_of(out)


def alike(ours: Any, theirs: Any) -> bool:
    """Whether two answers are the same but for the last digits of numbers, which depend on where arrays lie."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-9)
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[key], theirs[key]) for key in ours)
    return ours == theirs


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def judge(
    name: str, original: Original, damaged: Path, damage: dict[str, set[int]] | None, folder: Path
) -> tuple[str, str]:
    """What became of one command: "intact", "left out", "refused", or a failure; and what it said."""
    run, new = folder / "run.h5", folder / "new.h5"
    clear(folder)
    shutil.copy(damaged, run)
    code, out, err = call(COMMANDS[name], run, new)
    said = [
        line
        for line in err.splitlines()
        if not line.startswith(("note:", "device:", "measured", "resuming", "wrote:", "found:", "next:"))
    ]
    if code < 0:
        return ("HANG" if code == -2 else "TRACEBACK"), err
    if name not in CHANGES_FILE and run.read_bytes() != damaged.read_bytes():
        return "CHANGED THE FILE", err
    if code:
        fits = code in (1, 2) and len(said) == 1
        return ("refused" if fits else "SEVERAL LINES"), err
    found = records_of(out)
    if damage is None:
        damage = {"": {0}}
    if name == "verify":
        return ("intact" if not damage else "SILENT"), err
    if alike(found, original.answer(name, frozenset())[1]):
        return "intact", err
    groups = [group for group in damage if group]
    for count in range(1, len(groups) + 1):
        for some in itertools.combinations(groups, count):
            expected = original.answer(name, frozenset((group, frozenset(damage[group])) for group in some))
            if expected[0] == 0 and alike(found, expected[1]):
                return ("left out" if "left out" in err else "UNSAID"), err
    return "ANOTHER ANSWER", f"{damage}\n{err}{out[:2000]}"


def damage(data: bytes, path: Path, generator: random.Random, originals: Original) -> str:
    """Write a damaged copy of a file, and say how."""
    changed, place = bytearray(data), generator.randrange(len(data))
    kind = generator.choice(("bytes", "bytes", "bytes", "page", "swap", "cut", "value", "value", "value"))
    if kind == "bytes":
        for i in range(place, min(len(data), place + generator.choice((1, 1, 4, 64, 512)))):
            changed[i] ^= generator.randrange(1, 256)
    elif kind == "page":
        changed[place : place + 512] = bytes(len(changed[place : place + 512]))
    elif kind == "swap":
        other = generator.randrange(len(data))
        a, b = bytes(changed[place : place + 256]), bytes(changed[other : other + 256])
        if len(a) == len(b) == 256 and abs(place - other) >= 256:
            changed[place : place + 256], changed[other : other + 256] = b, a
    elif kind == "cut":
        del changed[place:]
    path.write_bytes(changed)
    if kind == "value":
        names = [n for n in originals.datasets if originals.datasets[n].size and "/" in n]
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            for _ in range(generator.choice((1, 1, 3))):
                dataset = file[generator.choice(names)]
                row = generator.randrange(dataset.shape[0])
                values = np.array(dataset[row])
                raw = bytearray(values.tobytes())
                raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
                dataset[row] = np.frombuffer(bytes(raw), values.dtype).reshape(values.shape)
    return kind


def make(folder: Path) -> None:
    """The runs that are damaged."""
    written, packed, kept, seen, refers = (folder / f"{name}.h5" for name in RUNS)
    options = ("--steps", "24", "--learning-rate", "0.5", "--track", "--checkpoint-every", "6")
    keep = [(("cluster", "RUN", "--by", "loss"), kept), (("mine", "RUN", "--top", "6"), kept)]
    observed(seen, folder / "saved")
    brought = ("import", str(folder / "saved"), *TASK, "--reference", "--track", "--batch-size", "8", "-o", "RUN")
    for command, run in [
        (("train", "-o", "RUN", *TASK, *options), written),
        (("sharpness", "RUN", *TASK), written),
        (("repack", "RUN", "-o", "NEW"), written),
        (("repack", "RUN", "-o", "NEW"), written),
        *keep,
        (brought, refers),
        (("sharpness", "RUN", *TASK), refers),
    ]:
        code, _, err = call(command, run, kept if packed.exists() else packed)
        assert code == 0, err


def observed(path: Path, saved: Path) -> None:
    """A loop over batches of eight that records what it sees, and saves checkpoints of its own, too."""
    import torch
    from tasks import tiny

    task, settings = tiny.Tiny(samples=24), {"task": TASK[1], "optimizer": "gd", "learning_rate": 0.5, "batch_size": 8}
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    saved.mkdir()
    with Recorder(path, samples=24, attributes={"settings_json": settings}) as recorder:
        for step in range(25):
            if step % 6 == 0:
                recorder.record(step, model=model)
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                           saved / f"step{step}.pt")  # fmt: skip
            batch = torch.randperm(24)[:8]
            losses = task.losses(model, (task.x[batch], task.y[batch]))
            recorder.observe(step, batch, losses)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()


def worker(source: Path, first: int, last: int, heavy: int, runs: list[str]) -> None:
    """Judge the files of these seeds; a line of JSON for each command."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [folder / part for part in ("reference", "run", "damaged")]
        for part in parts:
            part.mkdir()
        originals = [Original(source / f"{run}.h5", parts[0]) for run in runs]
        for seed in range(first, last):
            generator = random.Random(seed)
            original = originals[seed % len(originals)]
            damaged = parts[2] / "damaged.h5"
            kind = damage(original.path.read_bytes(), damaged, generator, original)
            found = original.damage_of(damaged)
            chosen = list(HEAVY) if heavy == 0 else generator.sample(list(HEAVY), heavy)
            for command in (*LIGHT, *chosen):
                print(json.dumps([seed, command, "starts", kind]), flush=True)
                outcome, said = judge(command, original, damaged, found, parts[1])
                print(json.dumps([seed, command, outcome, said if outcome.isupper() else ""]), flush=True)


def supervised(source: Path, first: int, last: int, heavy: int, runs: str) -> Iterator[tuple[int, str, str, str]]:
    """Outcomes of a range of seeds; a process that crashes or hangs is an outcome, too, and is followed by another."""
    while first < last:
        command = [sys.executable, __file__, "--worker", str(source), str(first), str(last), str(heavy), runs]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        at, pending, until = (first, ""), b"", time.monotonic() + 20 * SECONDS
        try:
            while time.monotonic() < until:
                if not select.select([process.stdout], [], [], 1)[0]:
                    continue
                piece = process.stdout.read()
                if not piece:
                    break
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    seed, name, outcome, said = json.loads(line)
                    at, until = (seed, name), time.monotonic() + 3 * SECONDS
                    if outcome != "starts":
                        yield seed, name, outcome, said
            else:
                process.kill()
                process.wait()
        except BaseException:  # the reader of these has had enough
            process.kill()
            raise
        err = process.communicate()[1].decode(errors="replace")
        if process.returncode == 0:
            return
        yield *at, "HANG" if process.returncode == -signal.SIGKILL else "CRASH", err[-2000:]
        first = at[0] + 1


def again(source: Path, seeds: list[int], folder: Path, runs: list[str]) -> Counter:
    """The commands in processes of their own: exit codes and lines are those of the command in this process."""
    found = Counter()
    for seed in seeds:
        generator = random.Random(seed)
        original = Original(source / f"{runs[seed % len(runs)]}.h5", folder)
        damaged = source / "damaged.h5"
        damage(original.path.read_bytes(), damaged, generator, original)
        name = list(COMMANDS)[seed % len(COMMANDS)]
        outcomes = []
        for alone in (False, True):
            run, new = source / "run.h5", source / "new.h5"
            for path in (run, new, Path(f"{new}.html")):
                path.unlink(missing_ok=True)
            shutil.copy(damaged, run)
            if alone:
                places = {"RUN": str(run), "NEW": str(new), "NEW.html": f"{new}.html"}
                command = [sys.executable, "-m", "opsig_cli.main", *(places.get(a, a) for a in COMMANDS[name])]
                done = subprocess.run(command, capture_output=True, text=True, timeout=3 * SECONDS)
                outcomes.append((done.returncode, records_of(done.stdout), done.stderr))
            else:
                code, out, err = call(COMMANDS[name], run, new)
                outcomes.append((code, records_of(out), err))
        found["same alone" if outcomes[0] == outcomes[1] else f"OTHERWISE ALONE (seed {seed}, {name})"] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--heavy", type=int, default=2, help="commands that take long, of each file; 0: all")
    parser.add_argument("--processes", type=int, default=20, help="commands to run again in processes of their own")
    parser.add_argument("--runs", default="written,packed", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        source, *numbers, runs = options.worker
        worker(Path(source), *map(int, numbers), runs.split(","))
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    counts: dict[str, Counter] = {name: Counter() for name in COMMANDS}
    failures, files, alone = 0, set(), Counter()
    with tempfile.TemporaryDirectory() as name:
        source, empty = Path(name) / "source", Path(name) / "empty"
        source.mkdir()
        empty.mkdir()
        make(source)
        last = options.first + options.files
        with contextlib.suppress(KeyboardInterrupt):  # says what it has so far
            for seed, command, outcome, said in supervised(source, options.first, last, options.heavy, options.runs):
                counts.setdefault(command, Counter())[outcome] += 1
                files.add(seed)
                if outcome.isupper():
                    failures += 1
                    print(f"seed {seed}: {command}: {outcome}\n{said}", flush=True)
                if len(files) % 100 == 0 and command == "info":
                    print(f"{len(files)} files", file=sys.stderr, flush=True)
            alone = again(
                source, list(range(options.first, options.first + options.processes)), empty, options.runs.split(",")
            )
    for command, found in counts.items():
        print(f"{command:20}", ", ".join(f"{outcome} {count}" for outcome, count in sorted(found.items())))
    print(", ".join(f"{what} {count}" for what, count in alone.items()))
    failures += sum(count for what, count in alone.items() if what != "same alone")
    print(f"{len(files)} files, {sum(map(Counter.total, counts.values()))} answers, {failures} failures")
    return 1 if failures or not files else 0


if __name__ == "__main__":
    sys.exit(main())

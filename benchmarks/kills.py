"""Two processes of which one is killed at a random moment: what is lost, what the other says, and the same once more.

    python benchmarks/kills.py FOLDER [--rounds 10] [--seed 0]

Rounds take turns at `track`, `sharpness` and `cluster`. Each kills one of the two, either as likely as the other, at a
moment drawn from the first four fifths of the time in which the command measures; where it turns out to have had all
that it needed of the victim by then, the round is drawn again. Every row of the file must then be that of a run that
nobody disturbed, the process that is left must end with one line, and the command, run again, with the same numbers.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from processes import launched

from opsig_cli import open_trajectory

TRAIN = (
    "train --task fashion-mnist --model mlp --learning-rate 0.1 --steps 40 --checkpoint-every 1 --chunk-size 100 -q "
    "--replace -o whole.h5"
)
COMMANDS = {
    "track": ["track", "run.h5"],
    "sharpness": ["sharpness", "run.h5", "--at", "iterate", "--steps", "0:40:2"],
    "cluster": ["cluster", "run.h5", "--top", "40", "--budget", "60"],
}
ROWS = {"track": "losses/loss", "sharpness": "sharpness/eigenvalue"}
AGAIN = "run the same command again"
WITHIN = 0.8
EARLIER = "it was done before the kill"
LONGEST = 600
"""Seconds after which a process that has not ended counts as one that hangs."""


def start(folder: Path, command: str) -> list[subprocess.Popen]:
    """Two processes on a fresh copy of the run, the first of which measures by now."""
    processes = launched(folder, 2, COMMANDS[command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in processes[0].stderr or ():
        if line.startswith("device:"):
            break
    return processes


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit status, output and messages of each."""
    return [(p.returncode, *said) for p, said in [(p, p.communicate(timeout=LONGEST)) for p in processes]]


def rows(folder: Path, command: str) -> dict[int, np.ndarray]:
    """What the file holds of what the command measures, by step."""
    with open_trajectory(folder / "run.h5") as run:
        name = ROWS.get(command)
        if name is None or not run.has(name):
            return {}
        return {step: run.row(name, step) for step in run.steps(name.partition("/")[0]).tolist()}


def fresh(folder: Path, command: str) -> None:
    """The run as the command finds it."""
    shutil.copy(folder / ("done.h5" if command == "cluster" else "whole.h5"), folder / "run.h5")
    for log in folder.glob("run.h5.*"):
        log.unlink()


def undisturbed(folder: Path, command: str) -> tuple[float, dict[int, np.ndarray], str]:
    """Seconds of measuring, the rows, and the output."""
    fresh(folder, command)
    processes = start(folder, command)
    begin = time.monotonic()
    ends = ended(processes)
    assert [end[0] for end in ends] == [0, 0], ends
    return time.monotonic() - begin, rows(folder, command), ends[0][1]


def killed(folder: Path, command: str, victim: int, after: float, known: dict[int, np.ndarray], out: str) -> str:
    """What went wrong in one round; nothing is ''."""
    fresh(folder, command)
    processes = start(folder, command)
    time.sleep(after)
    if processes[victim].poll() is not None:
        ended(processes)
        return EARLIER
    processes[victim].send_signal(signal.SIGKILL)
    left = ended(processes)[1 - victim]
    if left[0] == 0:
        complete = rows(folder, command).keys() == known.keys() and (command != "cluster" or left[1] == out)
        return EARLIER if complete else "the other ended as if all were done"
    lines = [line for line in left[2].splitlines() if line.startswith("opsig:")]
    if left[0] != 1 or len(lines) != 1 or AGAIN not in lines[0] or "Traceback" in left[2]:
        return f"the other ended with {left[0]} and said {left[2]!r}"
    held = rows(folder, command)
    if any(not np.array_equal(row, known[step]) for step, row in held.items()):
        return "a row is another"
    again = ended(start(folder, command))
    if [end[0] for end in again] != [0, 0]:
        return f"again: {again[0][2]!r}"
    found = rows(folder, command)
    same = found.keys() == known.keys() and all(np.allclose(found[s], known[s], rtol=1e-3) for s in known)
    same &= all(np.array_equal(found[step], row) for step, row in held.items())
    if not same or (command == "cluster" and again[0][1] != out):
        return "the rerun has other numbers"
    print(f"  {len(held):3} of {len(known)} rows were kept", end="")
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, generator = arguments.folder, random.Random(arguments.seed)
    if not (folder / "done.h5").exists():
        for command in (TRAIN, "track done.h5 -q"):
            subprocess.run([sys.executable, "-m", "opsig_cli", *command.split()], cwd=folder, check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
            if command == TRAIN:
                shutil.copy(folder / "whole.h5", folder / "done.h5")
    known = {command: undisturbed(folder, command) for command in COMMANDS}
    bad = done = 0
    while done < arguments.rounds:
        command, victim = list(COMMANDS)[done % len(COMMANDS)], generator.randrange(2)
        seconds, held, out = known[command]
        after = generator.uniform(0, WITHIN * seconds)
        wrong = killed(folder, command, victim, after, held, out)
        if wrong == EARLIER:
            print("  drawn again: it was done before the kill", flush=True)
            continue
        done, bad = done + 1, bad + bool(wrong)
        print(
            f"  {command:10} process {victim} killed {after:5.1f} s into {seconds:5.1f}: {wrong or 'fine'}", flush=True
        )
    print(f"{done - bad} of {done} kills: nothing lost, one line, the rerun completes")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()

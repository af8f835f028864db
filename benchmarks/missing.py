"""Runs with random holes in their losses through mine, cluster, report and compare: none may end in a traceback.

    python benchmarks/missing.py [--runs 200] [--first 0]

Warnings are errors. Prints each command that ends otherwise than with code 0, or with code 1 and one line; then counts.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from opsig_cli.main import run
from opsig_cli.trajectory.file import create_trajectory

HOLES = {
    "many cells": lambda losses, draw: losses.__setitem__(draw.random(losses.shape) < draw.random() * 0.9, np.nan),
    "a cell": lambda losses, draw: losses.__setitem__(_cell(losses, draw), np.nan),
    "an infinite cell": lambda losses, draw: losses.__setitem__(_cell(losses, draw), np.inf),
    "a sample": lambda losses, draw: losses.__setitem__((slice(None), _cell(losses, draw)[1]), np.nan),
    "the end of a sample": lambda losses, draw: losses.__setitem__(_after(losses, draw), np.nan),
    "a row": lambda losses, draw: losses.__setitem__(_cell(losses, draw)[0], np.nan),
    "the end": lambda losses, draw: losses.__setitem__(slice(_cell(losses, draw)[0], None), np.nan),
    "half of the end": lambda losses, draw: losses[_cell(losses, draw)[0] :, ::2].fill(-np.inf),
}


def _cell(losses, draw):
    return int(draw.integers(len(losses))), int(draw.integers(losses.shape[1]))


def _after(losses, draw):
    row, column = _cell(losses, draw)
    return slice(row, None), column


def make(path: Path, seed: int) -> None:
    """A run of up to 60 steps and 30 samples, with labels or not, at every step or every second one, with holes."""
    draw = np.random.default_rng(seed)
    steps, samples = int(draw.integers(1, 60)), int(draw.integers(1, 30))
    losses = np.abs(np.cumsum(draw.standard_normal((steps, samples)), 0))
    if draw.random() < 0.5:
        losses += np.where(np.arange(steps) % 2, 1, -1)[:, None] * draw.standard_normal(samples)
    for name in draw.choice(list(HOLES), int(draw.integers(0, 4))):
        HOLES[name](losses, draw)
    with create_trajectory(path, np.arange(samples)) as trajectory:
        if draw.random() < 0.5:
            trajectory.write("samples/label", np.array([f"label {i % 3}" for i in range(samples)]))
        for step, row in enumerate(losses):
            trajectory.append("losses", step * (1 + seed % 2), loss=row.astype(np.float32))


def call(*arguments: object) -> str | None:
    """Run a command; what is wrong with how it ends, None for nothing."""
    sys.argv = ["opsig", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("error")
            run()
    except SystemExit as end:
        code = end.code
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    lines = [
        line for line in err.getvalue().splitlines() if not line.startswith(("note: ", "wrote: ", "found: ", "next: "))
    ]
    if code == 0 and not lines:
        return None
    return None if code == 1 and len(lines) == 1 else f"code {code}: {lines}"


def problems(seed: int, folder: Path) -> list[str]:
    """What is wrong with how the commands take the run of this seed."""
    path = folder / f"{seed}.h5"
    make(path, seed)
    scores = [("mine", path, "--score", score) for score in ("change", "oscillation", "variation", "surprise")]
    commands = [("mine", path), *scores, ("mine", path, "--step", 2), ("cluster", path), ("compare", path)]
    commands += [("report", path, "-o", folder / f"{seed}.html")]
    ends = {" ".join(map(str, command)): call(*command) for command in commands}
    return [f"{command}: {wrong}" for command, wrong in ends.items() if wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.runs):
            found = problems(seed, Path(folder))
            counts["runs"] += 1
            counts["problems"] += len(found)
            for words in found:
                print(f"seed {seed}: {words}", flush=True)
    print(dict(counts))


if __name__ == "__main__":
    main()

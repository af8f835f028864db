"""A trajectory of many samples and steps: what `info`, `mine` and `cluster --by loss` take of time and memory.

    python benchmarks/scale.py FOLDER --samples 1280000 --steps 1000

Losses are made up: most decay with noise, and 1,000 alternate, half of them against the others. The file stays in the
folder for another look; remove it afterwards.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
from plain_scan import SCANS

from opsig_cli.trajectory.file import create_trajectory

MOVERS = 1000


def make(path: Path, samples: int, steps: int) -> None:
    """Write the file, a row a step."""
    generator = np.random.default_rng(0)
    base = generator.gamma(2.0, 0.5, samples).astype(np.float32)
    side = np.where(np.arange(MOVERS) % 2, 1, -1).astype(np.float32)
    movers = generator.choice(samples, MOVERS, replace=False)
    with create_trajectory(path, np.arange(samples), {"state": "complete"}, replace=True) as run:
        for step in range(steps):
            row = base * np.float32(np.exp(-step / steps)) + generator.random(samples, np.float32) * np.float32(0.02)
            row[movers] += side * np.float32((-1) ** step * 0.4 + 0.6)
            run.append("losses", step, loss=row)
            run.append("scalars", step, train_loss=float(row.mean(dtype=np.float64)), learning_rate=0.1)
            if step % 20 == 0:
                run.commit()


def measured(*command: object) -> tuple[float, float, float, float]:
    """Seconds of CPU, and of wall time, peak GiB, and records of a command."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        ["/usr/bin/time", "-f", "%M", sys.executable, "-m", "opsig_cli", *map(str, command)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, time.perf_counter() - begin, int(done.stderr.split()[-1]) / 2**20, len(done.stdout.splitlines())


def memmap(path: Path, samples: int, steps: int) -> dict[str, float]:
    """Seconds of CPU that plain numpy takes over the same numbers in a raw file (see `plain_scan.py`)."""
    raw = path.with_suffix(".raw")
    with h5py.File(path) as file:
        out = np.memmap(raw, np.float32, "w+", shape=(steps, samples))
        for first in range(0, steps, 16):
            out[first : first + 16] = file["losses/loss"][first : first + 16]
        out.flush()
    rows = np.memmap(raw, np.float32, "r", shape=(steps, samples))
    found = []
    for scan in SCANS.values():
        begin = time.process_time()
        scan(rows)
        found.append(time.process_time() - begin)
    raw.unlink()
    return dict(zip(SCANS, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=1_280_000)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    path = arguments.folder / "scale.h5"
    if not path.exists():
        make(path, arguments.samples, arguments.steps)
    print(f"{path.stat().st_size / 1e9:.2f} GB", flush=True)
    for command in (
        ["info", path],
        ["mine", path, "--top", 2000],
        ["cluster", path, "--by", "loss", "--top", 2000, "-q"],
    ):
        cpu, wall, peak, records = measured(*command)
        print(f"{command[0]:8} {cpu:8.2f} s of CPU {wall:8.2f} s {peak:6.2f} GiB {records} records", flush=True)
    for name, seconds in memmap(path, arguments.samples, arguments.steps).items():
        print(f"plain numpy, {name}: {seconds:8.2f} s of CPU")


if __name__ == "__main__":
    main()

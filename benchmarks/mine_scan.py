"""CPU time and memory of `opsig mine` over a large run, against plain numpy over the same numbers in a raw file.

    python benchmarks/mine_scan.py [--steps 10000] [--samples 50000] [--directory DIR]

Makes the run once (2 GB with the defaults, and the same array raw) and prints the costs of whole processes, the ratios
(`plain_scan.py` says to what), and what of ours goes into holding every row against its checksum.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from plain_scan import SCANS

from opsig_cli.studies import mining
from opsig_cli.trajectory.file import Trajectory, create_trajectory, open_trajectory

PLANTED = 200


def make(directory: Path, steps: int, samples: int) -> None:
    """A run of losses that fall, with noise, and whose first PLANTED samples alternate in the second half."""
    run, raw = directory / "run.h5", directory / "raw.f32"
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((97, samples), dtype=np.float32) * 1e-3
    sides = np.where(np.arange(samples) % 2, 1, -1) * (np.arange(samples) < PLANTED) * np.float32(0.5)
    with create_trajectory(run, np.arange(samples), replace=True) as trajectory, open(raw, "wb") as file:
        for step in range(steps):
            row = np.float32(2 - step / steps) + noise[step % 97]
            if step > steps // 2:
                row = row + np.float32((-1) ** step) * sides
            row = row.astype(np.float32)
            trajectory.append("losses", step, loss=row)
            if step % 500 == 499:
                trajectory.commit()
            file.write(row.tobytes())


def measure(command: list[str]) -> tuple[float, float, str]:
    """CPU seconds, peak resident memory in MB, and stdout of a command."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, out


def scan_seconds(trajectory: Trajectory) -> float:
    """CPU seconds of one scan in this process."""
    start = time.process_time()
    mining.find(trajectory, 40)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        maker = multiprocessing.Process(target=make, args=(Path(directory), options.steps, options.samples))
        maker.start()  # a process begins with the peak memory of the one that starts it
        maker.join()
        run, raw = Path(directory) / "run.h5", Path(directory) / "raw.f32"
        ours = [  # of another number of samples each time, as the last result is kept
            measure([sys.executable, "-m", "opsig_cli.main", "mine", str(run), "--top", str(40 + repeat), "-q"])
            for repeat in range(options.repeats)
        ]
        plain = Path(__file__).with_name("plain_scan.py")
        bare = {
            name: [measure([sys.executable, str(plain), str(raw), str(options.samples), name]) for _ in ours]
            for name in SCANS
        }
        for out in (*(o[2] for o in ours), *(b[2] for b in bare["same"])):
            found = [json.loads(line) for line in out.splitlines()]
            names = found[0] if isinstance(found[0], list) else [record["sample"] for record in found]
            assert max(names) < PLANTED, "the scans must find the samples that alternate"
        with open_trajectory(run) as trajectory:  # rows are held against their checksums once while the file is open
            checked, unchecked = (scan_seconds(trajectory) for _ in range(2))
    cpu = min(o[0] for o in ours)
    print(f"opsig mine: {cpu:.1f} s CPU, {max(o[1] for o in ours):.0f} MB at most")
    for name, runs in bare.items():
        least = min(b[0] for b in runs)
        print(
            f"plain numpy, {name}: {least:.1f} s CPU, {max(b[1] for b in runs):.0f} MB at most, its pages included: ",
            end="",
        )
        print(f"ratio {cpu / least:.2f}")
    cost = f"{checked - unchecked:.2f} s of {checked:.2f} s"
    print(f"checksums: {cost}, so that a scan takes {checked / unchecked:.2f} times what it would without them")


if __name__ == "__main__":
    main()

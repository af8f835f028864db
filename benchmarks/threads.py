"""Training beside busy neighbours: what threads that wait cost, by how they wait.

    python benchmarks/threads.py [STEPS] [NAME=VALUE ...]

Prints for each way of waiting, and for each further setting of the environment, the wall seconds of `opsig train` alone
and beside one spinning process for each core, the best of three, in turns. Takes minutes where threads spin.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

CORES = len(os.sched_getaffinity(0))
WAYS = {
    "torch's own": {"KMP_BLOCKTIME": "200"},  # means nothing to GNU's OpenMP, but that somebody has chosen
    "opsig's": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SPIN = "while True: pass"


def main() -> None:
    steps = sys.argv[1] if len(sys.argv) > 1 else "50"
    ways = WAYS | {f"{name}={value}": {name: value} for name, value in (one.split("=") for one in sys.argv[2:])}
    found: dict[str, dict[bool, float]] = {name: {} for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            for busy in (False, True):
                for name, settings in ways.items():
                    seconds = _train(folder, steps, settings, busy)
                    found[name][busy] = min(seconds, found[name].get(busy, float("inf")))
    print(f"{'':24}{'alone':>8}{'busy':>8}   seconds of {steps} steps on {CORES} cores")
    for name, seconds in found.items():
        print(f"{name:24}{seconds[False]:8.2f}{seconds[True]:8.2f}")


def _train(folder: str, steps: str, settings: dict[str, str], busy: bool) -> float:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(CORES if busy else 0)]
    try:
        command = [sys.executable, "-m", "opsig_cli.main", "train", "--task", "fashion-mnist", "--steps", steps]
        command += ["--learning-rate", "0.1", "--replace", "--quiet", "-o", os.path.join(folder, "run.h5")]
        begin = time.monotonic()
        subprocess.run(command, env=own | settings, stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - begin
    finally:
        for process in spinning:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

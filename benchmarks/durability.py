"""The long form of the tests of the trajectory file: kills, cuts, power losses, full disks, and random damage.

    python benchmarks/durability.py [--quick]

Prints a line for each experiment with the number of losses found, which must be 0. Takes some minutes.
"""

import argparse
import collections
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import crash
import test_integrity
import test_store

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import create_trajectory, open_trajectory


def kills(folder: Path, rounds: int) -> int:
    """A writer killed at random moments, on one file; how many rounds lost a committed step or left a bad row."""
    path, bad = folder / "killed.h5", 0
    create_trajectory(path, np.arange(test_store.SAMPLES)).close()
    for _ in range(rounds):
        writer = test_store.start_writer(path)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(random.uniform(0, 0.15))
        writer.kill()
        written = [int(line) for line in writer.stdout.read().split("\n")[:-1] if line]
        writer.communicate()
        with open_trajectory(path) as run:
            steps = run.steps("losses").tolist()
            lost = steps != list(range(len(steps))) or (written and written[-1] > steps[-1])
            bad += bool(lost or run.damaged_steps("losses") or run.damaged_steps("checkpoints"))
    size = path.stat().st_size
    with create_trajectory(folder / "once.h5", np.arange(test_store.SAMPLES)) as run:
        for step in steps:
            test_store.write_step(run, step)
            run.commit()
    print(f"  the file is {size / (folder / 'once.h5').stat().st_size:.3f} times one written without kills")
    return bad


def states(folder: Path, simulated) -> tuple[int, int]:
    """How many of the simulated disks there were, and how many lost something."""
    count = bad = 0
    for files, promised in simulated:
        crash.lay_out(files, folder / "cut")
        count += 1
        try:
            test_store.check(folder / "cut" / "run.h5", promised)
        except (AssertionError, OpsigError, OSError):
            bad += 1
    return count, bad


def full_disks(folder: Path, rounds: int) -> int:
    """Writes that meet a limit at random moments; how many lost a committed step, or could not go on afterwards."""
    bad = 0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(rounds):
        path = folder / f"full{number}.h5"
        run = create_trajectory(path, np.arange(test_store.SAMPLES))
        run.commit()
        committed, named = -1, False
        resource.setrlimit(resource.RLIMIT_FSIZE, (random.randrange(150_000, 3_000_000), before[1]))
        try:
            for step in range(200):
                test_store.write_step(run, step)
                run.commit()
                committed = step
        except OpsigError as error:
            named = "the disk is full" in str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        try:
            with open_trajectory(path) as reader:
                assert reader.steps("losses").tolist() == list(range(committed + 1))
            run.commit()
            run.close()
            test_store.check(path, list(range(committed + 1)))
            assert named
        except (AssertionError, OpsigError):
            bad += 1
        os.unlink(path)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    tenth = 10 if parser.parse_args().quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"kill -9: {kills(folder, 200 // tenth)} of {200 // tenth} rounds lost something")
        operations = test_store.record_a_writer(folder / "run.h5", 6)
        cuts = list(crash.kill_states(operations))[::tenth]
        print("system-call cuts: {1} of {0} lost something".format(*states(folder, cuts)))
        losses = (crash.power_loss(operations, random.Random(seed)) for seed in range(400 // tenth))
        print("power losses: {1} of {0} lost something".format(*states(folder, losses)))
        print(f"full disks: {full_disks(folder, 50 // tenth)} of {50 // tenth} lost something")
        with create_trajectory(folder / "real.h5", np.arange(500), {"task": "t"}) as run:
            run.write("samples/label", np.array([f"label {i}" for i in range(500)]))
            for step in range(200):
                test_store.SAMPLES = 500
                test_store.write_step(run, step)
        for cut, count in ((False, 1000 // tenth), (True, 200 // tenth)):
            found: collections.Counter[str] = collections.Counter()
            for first in range(0, count, 50):
                last = min(first + 50, count)
                try:
                    outcomes = test_integrity.corruptions(folder / "real.h5", folder / "bad.h5", first, last, cut)
                except (AssertionError, subprocess.TimeoutExpired):
                    outcomes = ["crash or hang"]
                found.update(outcomes)
            print(f"{'truncations' if cut else 'corruptions'}: {dict(found)}")


if __name__ == "__main__":
    main()

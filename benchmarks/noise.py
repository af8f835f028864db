"""How often `opsig cluster` reports a pair where nothing is planted, through the command line.

    python benchmarks/noise.py [--runs 100] [--only series,labels,cnn]

`series`: white noise as the losses of 60 samples over 80 steps, without checkpoints. `labels`: Fashion-MNIST with
labels drawn at random, 1,000 images, full-batch gradient descent; half of the runs stop before the edge of stability
and half go on beyond it. `cnn`: the same with a small convolutional network. A run
counts where it reports a pair at p < 0.01.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from planted import opsig

from opsig_cli import Recorder


def white_series(path: Path, seed: int) -> None:
    """Losses without any structure."""
    losses = 1 + 0.1 * np.random.default_rng(seed).standard_normal((80, 60))
    with Recorder(path, samples=60, replace=True) as recorder:
        for step, row in enumerate(losses):
            recorder.record(step, losses=row.astype(np.float32))


def random_labels(path: Path, seed: int, *training: str) -> None:
    """A network that learns labels without meaning; no patch is planted that can be seen."""
    task = f"planted:pairs=1,side=2,strength=0.001,label_noise=0.9999,samples=1000,seed={seed}"
    rate = ("0.1", "0.5")[seed % 2]
    training = training or ("--learning-rate", rate, "--steps", "400")
    opsig("train", "--task", task, *training, "--seed", str(seed), "--track", "-q", "--replace", "-o", str(path))


def convolutional(path: Path, seed: int) -> None:
    """The same for a network to whose features more images look alike."""
    random_labels(path, seed, "--model", "cnn:width=8", "--learning-rate", "0.1", "--steps", "300")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="series,labels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        for name in options.only.split(","):
            make = {"series": white_series, "labels": random_labels, "cnn": convolutional}[name]
            false = 0
            for seed in range(options.first, options.first + options.runs):
                make(path, seed)
                pairs = [r for r in opsig("cluster", str(path), "-q") if r["kind"] == "pair"]
                reported = [r for r in pairs if r["p_value"] < 0.01]
                false += bool(reported)
                for r in reported:
                    print(f"{name} {seed}: {r['sizes']} {r['opposition']:.2f} shared {r['shared']}", flush=True)
                if seed % 10 == 9:
                    print(f"{name}: {false} of {seed + 1 - options.first} so far", flush=True)
            print(f"{name}: {false} of {options.runs} runs report a pair at p < 0.01", flush=True)


if __name__ == "__main__":
    main()

"""What recording costs a training loop: the time inside of `Recorder`, commits to the disk included, a step of 50 ms.

Batches of 256, tensors with gradients. `observe` keeps the losses of the batch; `record` keeps a row of 256 samples and
two scalars; `both` is both of them; `callback` is what the callback for Trainer does beside the model's own work, the
losses from logits of 1,000 classes and `observe`. What that is of the steps' time is printed, the mean over all steps:
on the clock, with waiting for the disk and, on a busy machine, for others, and of the CPU.

    python benchmarks/record_overhead.py [--steps 400] [--step-ms 50]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from opsig_cli import Recorder

BATCH, CLASSES = 256, 1000


Keep = Callable[[Recorder, int, np.ndarray], None]


def train_step(seconds: float, weights: torch.Tensor) -> None:
    """Matrix products for so much of the CPU's time, which leave the caches as a training step does."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        weights @ weights


def loop(path: Path, samples: int, steps: int, seconds: float, keep: Keep) -> tuple[float, float]:
    """What `keep(recorder, step, indices)` and closing the file take of a loop's time, on the clock and of the CPU."""
    draw, weights = np.random.default_rng(0), torch.randn(512, 512)
    recorder = Recorder(path, samples=samples)
    batches = [draw.choice(samples, BATCH, replace=False) for _ in range(steps)]
    kept, trained = np.zeros(2), np.zeros(2)
    for step in range(steps + 1):
        began = np.array([time.perf_counter(), time.thread_time()])
        train_step(seconds, weights)
        between = np.array([time.perf_counter(), time.thread_time()])
        if step < steps:
            keep(recorder, step, batches[step])
        else:
            recorder.close()
        kept += np.array([time.perf_counter(), time.thread_time()]) - between
        trained += between - began
    wall, cpu = kept / trained
    return float(wall), float(cpu)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=50)
    options = parser.parse_args()
    losses = torch.rand(BATCH, requires_grad=True)
    logits, labels = torch.randn(BATCH, CLASSES), torch.randint(CLASSES, (BATCH,))

    def observe(recorder: Recorder, step: int, indices: np.ndarray) -> None:
        recorder.observe(step, indices, losses)

    def record(recorder: Recorder, step: int, _: np.ndarray) -> None:
        recorder.record(step, losses=losses, scalars={"train_loss": losses.mean(), "learning_rate": 0.1})

    def both(recorder: Recorder, step: int, indices: np.ndarray) -> None:
        recorder.observe(step, indices, losses)
        recorder.record(step, scalars={"train_loss": losses.mean(), "learning_rate": 0.1})

    def callback(recorder: Recorder, step: int, indices: np.ndarray) -> None:
        with torch.no_grad():
            each = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        recorder.observe(step, indices, each)

    ways = {
        "observe": (50_000, observe),
        "record": (BATCH, record),
        "both": (50_000, both),
        "callback": (50_000, callback),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (samples, keep) in ways.items():
            wall, cpu = loop(Path(folder) / f"{name}.h5", samples, options.steps, options.step_ms / 1000, keep)
            print(f"{name}: {wall:.2%} of the time on the clock, {cpu:.2%} of the CPU's")


if __name__ == "__main__":
    main()

"""Grouping many samples by rows, without the matrix of every two: the same groups, seconds of processor time, memory.

    python benchmarks/rows.py [--samples 50000] [--seeds 2] [--only same,large] [--by gradient] [--test held-out]

"same" groups planted runs (planted.py's, --small) with the matrix, with the matrix of the same sketches, and by rows,
where the numbers from which on rows are taken are set far below what opsig takes: the adjusted Rand index between the
groups, over the samples that are in one, and of each with what was planted. "large" trains a network on `--samples`
points, six pairs of sides planted among them, and groups all of them: how long a whole command takes on one core, its
memory at the peak, and what it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import planted
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from opsig_cli.analysis import agglomerating, gram

KINDS = ("easy", "unequal sizes", "jittered", "six pairs", "shared patch", "regression")
PAIRS, SIDE = 6, 0.01
SIZE, CLASSES, WIDTH = 196, 10, 64


class Crowd:
    """Points around ten centres, and six patterns that two sides of a hundredth of all points each carry, under two
    labels."""

    def __init__(self, samples: str = "50000", seed: str = "0"):
        generator = np.random.default_rng(int(seed))
        count = int(samples)
        self._label = generator.integers(0, CLASSES, count)
        centres = generator.standard_normal((CLASSES, SIZE))
        points = (0.5 * centres[self._label] + 0.5 * generator.standard_normal((count, SIZE))).astype(np.float32)
        self._truth = np.full(count, -1)
        side = int(SIDE * count)
        order = generator.permutation(count)[: 2 * PAIRS * side].reshape(2 * PAIRS, side)
        for number, members in enumerate(order):
            if number % 2 == 0:
                labels = generator.choice(CLASSES, 2, replace=False)
            cell = slice(number // 2 * 16, number // 2 * 16 + 16)
            points[members, cell] = 5 * np.random.default_rng([int(seed), number // 2]).uniform(0.5, 1, 16)
            self._label[members] = labels[number % 2]
            self._truth[members] = number
        self._points = points

    def model(self) -> nn.Module:
        """One hidden layer."""
        return nn.Sequential(nn.Linear(SIZE, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))

    def dataset(self) -> TensorDataset:
        """Points and labels."""
        return TensorDataset(torch.from_numpy(self._points), torch.from_numpy(self._label))

    def losses(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """Cross-entropy of each sample."""
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def features(self, model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        """What enters the last layer."""
        assert isinstance(model, nn.Sequential)
        return model[:2](batch[0])

    def label(self, sample: int) -> str:
        """The class by name."""
        return f"class {self._label[sample]}"

    def truth(self) -> np.ndarray:
        """Planted side of every point, (S,), or -1."""
        return self._truth


def take_rows(above: int, few: int) -> None:
    """Group by rows from so many samples on, in rounds down to so few clusters."""
    gram.MOST_FORMED = above
    agglomerating.FEW = few


def groups_of(records: list[dict[str, Any]]) -> np.ndarray:
    """Group of every sample that was grouped, -1 of others."""
    found = np.full(5000, -1)
    for record in records:
        if record["kind"] == "member" and record["mined"]:
            found[record["sample"]] = record["group"]
    return found


def same(folder: Path, kinds: list[str], seeds: int) -> None:
    """Print how far groups by rows are those with the matrix."""
    formed, few = gram.MOST_FORMED, agglomerating.FEW
    for kind in kinds:
        for seed in range(seeds):
            path, task = planted.trained(folder, kind, seed, True), planted.spec(kind, seed, True)
            own = ["--task", task] if task.startswith(str(planted.TASKS)) else []
            for by in ("loss", "both"):
                words = ["cluster", str(path), *own, "--by", by, "--truth", "--test", "held-out", "--replace", "-q"]
                whole = planted.opsig(*words)
                sketched = planted.opsig(*words, "--sketch", "256") if by == "both" else whole
                take_rows(10, 60)
                rows = planted.opsig(*words)
                take_rows(formed, few)
                ours, theirs, matrix = map(groups_of, (rows, sketched, whole))
                inside = (ours >= 0) | (matrix >= 0)
                truth = [found[-1]["adjusted_rand_index_mined"] for found in (whole, sketched, rows)]
                print(
                    f"{kind:14} seed {seed}, by {by:5}: rows and matrix {_index(ours, matrix, inside)}, "
                    f"rows and matrix of sketches {_index(ours, theirs, inside)}; "
                    f"with what was planted: matrix {truth[0]:.3f}, of sketches {truth[1]:.3f}, rows {truth[2]:.3f}",
                    flush=True,
                )


def _index(one: np.ndarray, other: np.ndarray, inside: np.ndarray) -> str:
    return f"{adjusted_rand_score(one[inside], other[inside]):.3f}"


def large(folder: Path, samples: int, test: str, ways: list[str]) -> None:
    """Print what grouping so many samples takes."""
    run, task = folder / "crowd.h5", f"{__file__}:Crowd:samples={samples}"
    _opsig(folder, "train", "--task", task, "--learning-rate", "0.2", "--steps", "200", "--checkpoint-every", "10",
           "--track", "-q", "-o", run)  # fmt: skip
    for by in ways:
        words = ["--by", by, "--top", samples, *(["--task", task, "--test", test] if by != "loss" else [])]
        records, seconds, peak = _opsig(folder, "cluster", run, *words, "--replace", "--truth", "-q")
        agreed = records[-1]
        pairs = [record for record in records if record["kind"] == "pair"]
        print(
            f"{samples:,} samples by {by}: {seconds:.0f} s of processor time, {peak / 1e9:.2f} GB at the peak; "
            f"{sum(record['kind'] == 'group' for record in records)} groups, {len(pairs)} pairs, of these "
            f"{agreed['established']} established; "
            f"adjusted Rand index of the planted {agreed['adjusted_rand_index']:.3f}",
            flush=True,
        )


def _opsig(folder: Path, *words: Any) -> tuple[list[dict[str, Any]], float, float]:
    """Records, CPU seconds and bytes at the peak of a command in a process of its own."""
    with (folder / "out").open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "opsig_cli", *map(str, words)], stdout=out)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    records = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    return records, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="same,large")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--test", default="replay")
    parser.add_argument("--by", default="loss,gradient,both", help="what large groups by")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "same" in options.only:
            same(Path(folder), options.kinds.split(","), options.seeds)
        if "large" in options.only:
            large(Path(folder), options.samples, options.test, options.by.split(","))


if __name__ == "__main__":
    main()

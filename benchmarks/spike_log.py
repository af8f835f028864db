"""A spike planted in a minibatch run that logged only the losses of its batches: does `mine --step` name its rows?

20,000 samples, 3 epochs, batches of 64, the loss of every row logged by `Recorder.observe`; a tenth of the labels is
wrong, so that some rows are always hard. Two small sides share a large feature under two labels. In the third epoch the
order of the data puts many of one side into two batches and many of the other into the next, whose loss jumps. Beside
opsig's ranking of that batch stand the simplest rivals: the largest loss, and the largest change since a row was seen
before. `cluster` then looks for the pair, from the rows of that one step and two checkpoints around it.

    python benchmarks/spike_log.py [--seeds 5] [--samples 20000]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

import opsig_cli
from opsig_cli import Recorder

CLASSES, WIDTH, SIDE, PUSH = 10, 64, 48, 16
"""Classes, input dimensions, samples of a side, and how many of a side come together at the spike."""


class Spiked:
    """Clusters of Gaussian inputs under ten labels, a tenth of them wrong, and two planted sides, A and B, that share a
    feature of their own under the labels 0 and 1."""

    def __init__(self, seed: int = 0, samples: int = 20_000):
        self.seed = seed
        draw = np.random.default_rng(seed)
        label = draw.integers(0, CLASSES, samples)
        x = 0.35 * draw.standard_normal((CLASSES, WIDTH))[label] + draw.standard_normal((samples, WIDTH))
        wrong = draw.random(samples) < 0.1
        label[wrong] = draw.integers(0, CLASSES, int(wrong.sum()))
        planted = draw.choice(samples, 2 * SIDE, replace=False)
        self.sides = planted[:SIDE], planted[SIDE:]
        feature = draw.standard_normal(WIDTH)
        for side, members in enumerate(self.sides):
            label[members] = side
            x[members] = 0.5 * x[members] + 14 * feature / np.linalg.norm(feature)
        self._data = TensorDataset(torch.from_numpy(x).float(), torch.from_numpy(label))
        self.classes = [str(number) for number in range(CLASSES)]

    def model(self):
        torch.manual_seed(self.seed)
        return torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.ReLU(), torch.nn.Linear(64, CLASSES))

    def dataset(self):
        return self._data

    def losses(self, model, batch):
        x, y = batch
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

    def label(self, i):
        return str(int(self._data[i][1]))

    def order(self, epochs: int, batch: int) -> tuple[list[np.ndarray], int]:
        """Indices of every step's batch, each sample once an epoch, and the step at which the spike is planted."""
        draw = np.random.default_rng([self.seed, 1])
        count = len(self._data)
        orders = [draw.permutation(count) for _ in range(epochs)]
        last, spike = orders[-1], (count // batch) // 2
        a, b = (draw.permutation(side) for side in self.sides)
        for members, at in ((a[:PUSH], spike - 2), (a[PUSH : 2 * PUSH], spike - 1), (b[:PUSH], spike)):
            for place, sample in enumerate(members, at * batch):  # change places with whoever stands there
                there = int(np.flatnonzero(last == sample)[0])
                last[[place, there]] = last[[there, place]]
        per_epoch = [order[first : first + batch] for order in orders for first in range(0, count, batch)]
        return per_epoch, (epochs - 1) * -(-count // batch) + spike


def train(task: Spiked, path: str, epochs: int, batch: int) -> int:
    """Train as a loop of one's own would, and log what it sees; returns the step of the spike."""
    order, spike = task.order(epochs, batch)
    data, model = task.dataset(), task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels = [task.label(i) for i in range(len(data))]
    with Recorder(path, samples=len(data), labels=labels, classes=task.classes) as recorder:
        for step, indices in enumerate(order):
            if step in (spike - 20, spike + 1):
                recorder.record(step, model=model, optimizer=optimizer)
            losses = task.losses(model, data[indices])
            recorder.observe(step, indices, losses)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
    return spike


def measure(seed: int, samples: int, folder: str, epochs: int = 3, batch: int = 64, pair: bool = True) -> dict:
    """Precision of three rankings of the spike's batch, and of the pair that is found from them."""
    task = Spiked(seed, samples)
    path = str(Path(folder) / f"spike{seed}.h5")
    spike = train(task, path, epochs, batch)
    planted = set(task.sides[1].tolist())
    rows = opsig_cli.mine(path, step=spike, top=batch)
    here = [row for row in rows if row["sample"] in planted]

    def precision(key) -> float:
        ranked = sorted(rows, key=key, reverse=True)[: len(here)]
        return sum(row["sample"] in planted for row in ranked) / len(here)

    found = {
        "seed": seed, "spike": spike, "planted": len(here), "note": rows.notes[0],
        "share": sum(row["share"] for row in here), "shares": sum(row["share"] for row in rows),
        "precision": sum(row["sample"] in planted for row in rows[: len(here)]) / len(here),
        "largest loss": precision(lambda row: row["loss_after"]),
        "largest change": precision(lambda row: row["loss_after"] - row["loss_last"]),
        "path": path,
    }  # fmt: skip
    if pair:
        task_name = f"{__file__}:Spiked:seed={seed},samples={samples}"
        groups = opsig_cli.cluster(path, records=rows, task=task_name, test="none")
        found["pair"] = best_pair(groups, [set(side.tolist()) for side in task.sides])
    return found


def best_pair(records: opsig_cli.Records, sides: list[set[int]]) -> dict | None:
    """Of the pairs that were found the one that has most of the planted samples: the part of its members that belong
    where they are, and the part of the planted samples that it has."""
    best = None
    for pair in records.of("pair"):
        members = [{r["sample"] for r in records.of("member") if r["group"] == group} for group in pair["groups"]]
        for a, b in (members, members[::-1]):
            right = len(a & sides[0]) + len(b & sides[1])
            scored = {"pair": pair["pair"], "precision": right / max(1, len(a) + len(b)),
                      "recall": right / sum(map(len, sides)), "opposition": pair["opposition"],
                      "verdict": pair["verdict"]}  # fmt: skip
            if best is None or right > best[0]:
                best = right, scored
    return None if best is None else best[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--no-pair", action="store_true")
    options = parser.parse_args()
    names = ("precision", "largest loss", "largest change")
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            found = measure(seed, options.samples, folder, pair=not options.no_pair)
            numbers = ", ".join(f"{name} {found[name]:.2f}" for name in names)
            print(f"seed {seed}, step {found['spike']}: {numbers}; share of the planted {found['share']:.2f}")
            print(f"  {found['note']}")
            if "pair" in found:
                print(f"  pair: {found['pair']}")


if __name__ == "__main__":
    main()

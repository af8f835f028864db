"""What `mine` is held against: losses in a raw file looked through in plain numpy, as one would write it by hand.

    python benchmarks/plain_scan.py RAW SAMPLES same|differences

Rows of float32, one after the other in the file, are mapped and looked at in turn. `same` makes what `mine` makes of a
run that alternates, but for the losses around a change: the largest moving mean, over 16 steps, of each sample's
amplitude at period two over that of all, its step, and the mean losses. `differences` is one pass that makes less: each
sample's largest second difference.
"""

import sys
from collections.abc import Callable

import numpy as np

WIDTH = 16


def same(rows: np.ndarray) -> np.ndarray:
    """Samples by their score, largest first."""
    steps, samples = rows.shape
    ring = np.zeros((WIDTH, samples), np.float32)
    total, best, place = np.zeros(samples, np.float32), np.zeros(samples, np.float32), np.zeros(samples, np.int64)
    means = []
    for step in range(steps):
        means.append(rows[step].mean(dtype=np.float64))
        if step < 2:
            continue
        swing = rows[step] - 2 * rows[step - 1] + rows[step - 2]
        swing *= np.float32((-1) ** step / 4)
        total += swing
        total -= ring[step % WIDTH]
        ring[step % WIDTH] = swing
        if step > WIDTH:
            size = np.abs(total)
            size *= 1 / np.sqrt(np.vdot(size, size) / samples)
            better = size > best
            best[better], place[better] = size[better], step - 1
    return np.argsort(-best)


def differences(rows: np.ndarray) -> np.ndarray:
    """Samples by their largest second difference."""
    best = np.zeros(rows.shape[1], np.float32)
    for step in range(2, len(rows)):
        np.maximum(best, np.abs(rows[step] - 2 * rows[step - 1] + rows[step - 2]), out=best)
    return np.argsort(-best)


SCANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"same": same, "differences": differences}

if __name__ == "__main__":
    raw, samples, name = sys.argv[1:]
    print(SCANS[name](np.memmap(raw, np.float32, "r").reshape(-1, int(samples)))[:40].tolist())

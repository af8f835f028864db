"""The trajectory file against plain h5py and a raw numpy memmap.

    python benchmarks/store.py [--samples 50000] [--steps 640] [--directory DIR]

Prints, as ratios within this run: a committed step of losses against h5py with flush and fsync; one row, 200 series,
and a full scan of the losses against the same reads of a raw memmap in CPU time: as the files were just written, which
the system holds as they grew, and as they are once it has read them from the disk, as a file of yesterday.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from opsig_cli.trajectory.file import create_trajectory, open_trajectory


def committed_steps(run, steps: range, rows: np.ndarray) -> float:
    """Seconds a step, by opsig."""
    begin = time.perf_counter()
    for step in steps:
        run.append("losses", step, loss=rows[step % len(rows)])
        run.commit()
    return (time.perf_counter() - begin) / len(steps)


def flushed_steps(file: h5py.File, steps: range, rows: np.ndarray) -> float:
    """Seconds a step, by h5py with flush and fsync."""
    dataset, handle = file["loss"], os.open(file.filename, os.O_RDWR)
    begin = time.perf_counter()
    for step in steps:
        dataset.resize(step + 1, axis=0)
        dataset[step] = rows[step % len(rows)]
        file.flush()
        os.fsync(handle)
    seconds = (time.perf_counter() - begin) / len(steps)
    os.close(handle)
    return seconds


def cpu(*calls: Callable[[], object], repeats: int = 15) -> np.ndarray:
    """Least CPU seconds of each call, taken in turns."""
    spent = []
    for _ in range(repeats):
        spent.append([])
        for call in calls:
            begin = time.process_time()
            call()
            spent[-1].append(time.process_time() - begin)
    return np.min(spent, axis=0)


def read_anew(*paths: str) -> None:
    """Have the system forget what it holds of these files."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=640)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    samples, steps = options.samples, options.steps
    rows = np.random.default_rng(0).random((64, samples), dtype=np.float32)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        ours, plain, raw = (os.path.join(folder, name) for name in ("run.h5", "plain.h5", "raw.f32"))
        with create_trajectory(ours, np.arange(samples)) as run, h5py.File(plain, "w", rdcc_nbytes=0) as file:
            chunks = (64, min(1024, samples))
            file.create_dataset("loss", (0, samples), "f4", maxshape=(None, samples), chunks=chunks, fill_time="never")
            ratios = []
            for first in range(0, steps, 32):  # in turns, so that both meet the same load
                part = range(first, min(first + 32, steps))
                ratios.append((committed_steps(run, part, rows), flushed_steps(file, part, rows)))
        own, other = np.median(ratios, axis=0)
        print(
            f"committed step: {own * 1e3:.2f} ms; h5py with flush and fsync: {other * 1e3:.2f} ms: {own / other:.2f}x"
        )
        with open(raw, "wb") as file:
            for step in range(steps):
                file.write(rows[step % 64].tobytes())

        def memmap() -> np.ndarray:
            """Mapped anew, as a process that reads once would: its page faults are part of the cost."""
            return np.memmap(raw, np.float32, "r").reshape(steps, samples)

        chosen = np.sort(np.random.default_rng(1).choice(samples, 200, replace=False))
        with open_trajectory(ours) as run:
            assert np.array_equal(run.series("losses/loss", chosen), memmap()[:, chosen])
            for state in ("just written", "read from the disk"):
                if state != "just written":
                    read_anew(ours, raw)
                for name, mine, bare in (
                    ("one row", lambda: run.rows("losses/loss", 77, 78), lambda: np.array(memmap()[77])),
                    ("200 series", lambda: run.series("losses/loss", chosen), lambda: memmap()[:, chosen]),
                    (
                        "full scan",
                        lambda: sum(float(block.max()) for _, block in run.blocks("losses/loss")),
                        lambda: sum(float(block.max()) for block in np.array_split(memmap(), max(1, steps // 64))),
                    ),
                ):
                    spent, least = cpu(mine, bare)
                    print(
                        f"{name}, {state}: {spent * 1e3:.2f} ms CPU; memmap: {least * 1e3:.2f} ms: {spent / least:.2f}x"
                    )


if __name__ == "__main__":
    main()

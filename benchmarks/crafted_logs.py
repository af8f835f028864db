"""Redo logs that opsig never wrote, with every checksum right, through commands that read and write.

    python benchmarks/crafted_logs.py [--logs 300] [--first SEED]

A log fits its file and its records are chained as a writer would chain them, but the sizes, places, lengths and bytes
that they hold are drawn at random: far beyond the end, over the superblock, over each other, of no length, a stamp of
another run, a number out of order, another version. Each is left beside a small run, and a reader, `verify`, and a
writer are started on a copy. A command may end well, or say one line with exit code 1 or 2, within ten seconds, without
a file that grows past 1 GB; no traceback. Prints counts, and every failure with its seed; exit code 1 where there is
one.
"""

from __future__ import annotations

import argparse
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from opsig_cli import Recorder
from opsig_cli.trajectory.identity import STAMP_BYTES, new_stamp, place_of_stamp
from opsig_cli.trajectory.redo_log import LOG_SUFFIX, Stamp, packed_header, packed_record

COMMANDS = (("info",), ("verify",), ("mine",), ("repack",))
SECONDS = 10
BYTES = 1 << 30
PLACES = (0, 8, 40, 47, 48, 95, 96, 4096, (1 << 31) - 1, 1 << 40, (1 << 56) - 9, (1 << 63) + 1, (1 << 64) - 1)


def make(path: Path) -> None:
    generator = np.random.default_rng(0)
    with Recorder(path, samples=20) as recorder:
        for step in range(12):
            recorder.record(step, losses=generator.random(20), scalars={"train_loss": 1.0})


def stamp_of(path: Path) -> Stamp:
    with h5py.File(path) as file:
        place = place_of_stamp(file)
    assert place
    return Stamp(place, path.read_bytes()[place : place + STAMP_BYTES])


def crafted(stamp: Stamp, size: int, draw: random.Random) -> bytes:
    """A log of this file with one to four records, whose checksums are right."""
    log = packed_header(stamp)
    before = stamp
    for sequence in range(draw.randint(1, 4)):
        extents: list[tuple[int, bytes]] = []
        for _ in range(draw.randint(0, 3)):
            offset = draw.choice((*PLACES, draw.randrange(size), size, stamp.place))
            extents.append((offset, draw.randbytes(draw.choice((0, 1, 8, 48, 96, STAMP_BYTES, 5000)))))
        if draw.random() < 0.7:  # as every commit ends: with a new stamp of the same run
            extents.append((stamp.place, new_stamp(stamp.data)))
        after = draw.choice((size, size, size + 4096, 0, 50, 1 << 33, 1 << 50, (1 << 64) - 1))
        number = sequence if draw.random() < 0.9 else draw.randrange(1 << 20)
        record = packed_record(number, after, [(o % (1 << 64), d) for o, d in extents], before)
        if draw.random() < 0.1:
            at = draw.randrange(len(record))
            record = record[:at] + bytes([record[at] ^ 255]) + record[at + 1 :]
        if draw.random() < 0.1:
            record = record[: draw.randrange(len(record))]
        log += record
        before = before.after(extents)
    if draw.random() < 0.1:
        log = log[:12] + struct.pack("<I", draw.randrange(1 << 32)) + log[16:]
    return log


def judge(source: Path, log: bytes, command: tuple[str, ...], folder: Path) -> str:
    path = folder / "run.h5"
    for old in folder.iterdir():
        old.unlink()
    shutil.copy(source, path)
    Path(f"{path}{LOG_SUFFIX}").write_bytes(log)
    words = [sys.executable, "-m", "opsig_cli.main", *command, str(path)]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "HANG"
    if any(file.stat().st_size > BYTES for file in folder.iterdir()):
        return "GREW"
    said = [line for line in ended.stderr.splitlines() if not line.startswith("note:")]
    if "Traceback" in ended.stderr or ended.returncode not in (0, 1, 2):
        return f"TRACEBACK {ended.stderr[-600:]}"
    if ended.returncode and len(said) != 1:
        return f"SEVERAL LINES {ended.stderr[-600:]}"
    return "ended well" if ended.returncode == 0 else "one line"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        source, folder = Path(name) / "source.h5", Path(name) / "here"
        folder.mkdir()
        make(source)
        stamp, size = stamp_of(source), source.stat().st_size
        for seed in range(options.first, options.first + options.logs):
            log = crafted(stamp, size, random.Random(seed))
            command = COMMANDS[seed % len(COMMANDS)]
            outcome = judge(source, log, command, folder)
            counts[outcome.split()[0] if outcome.isupper() or outcome[:2].isupper() else outcome] += 1
            if outcome[:2].isupper():
                print(f"seed {seed}, {command[0]}: {outcome}", flush=True)
    print(f"{options.logs} logs: {dict(counts)}")
    sys.exit(any(what.isupper() for what in counts))


if __name__ == "__main__":
    main()

"""Two processes against one: CPU seconds of the busier process, for `track`, `sharpness` and `cluster`.

    python benchmarks/processes.py FOLDER [--processes 2]

One thread each. On a busy machine wall time says nothing; the busier process's CPU time, less what a command takes that
measures nothing, is what a person waits for on a machine of their own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

COMMANDS = {
    "nothing": ["track", "done.h5"],
    "track": ["track", "run.h5"],
    "sharpness": ["sharpness", "run.h5", "--at", "iterate", "--steps", "12:20:4", "--replace"],
    "curvature": ["sharpness", "run.h5", "--steps", "20", "--metrics", "gradient_norm,curvature"],
    "cluster": ["cluster", "done.h5", "--by", "gradient", "--test", "none", "--replace"],
}


def busiest(folder: Path, count: int, command: list[str]) -> float:
    """CPU seconds of the process that had most to do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "opsig_cli", *command, "--quiet"], cwd=folder, stdout=subprocess.DEVNULL,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip
    seconds = []
    for process in started:
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, command
        seconds.append(used.ru_utime + used.ru_stime)
    return max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="cnn")
    arguments = parser.parse_args()
    folder = arguments.folder
    train = f"train --task fashion-mnist --model {arguments.model} --learning-rate 0.1 --steps 20 -o whole.h5"
    train += " --checkpoint-every 1 --replace"
    if not (folder / "done.h5").exists():
        subprocess.run(
            [sys.executable, "-m", "opsig_cli", *train.split(), "-q"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        shutil.copy(folder / "whole.h5", folder / "part.h5")
        subprocess.run(
            [sys.executable, "-m", "opsig_cli", "track", "part.h5", "-q"], cwd=folder, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (folder / "part.h5").rename(folder / "done.h5")
    idle = {}
    for name, command in COMMANDS.items():
        found = {}
        for count in (1, arguments.processes):
            shutil.copy(folder / "whole.h5", folder / "run.h5")
            found[count] = busiest(folder, count, command)
        if name == "nothing":
            idle = found
            continue
        one, several = (found[count] - idle[count] for count in (1, arguments.processes))
        print(
            f"{name:10} {one:8.2f} s alone {several:8.2f} s of {arguments.processes}: {one / several:.2f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()

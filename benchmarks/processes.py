"""Two processes against one: CPU seconds of the busier process, for `track`, `sharpness` and `cluster`.

    python benchmarks/processes.py FOLDER [--processes 2]

One thread each. On a busy machine wall time says nothing; the busier process's CPU time is what a person waits for on a
machine of their own. Said twice: of the whole command, and less what one takes that opens the run and the task and
measures nothing (`track --plan`), which is what grows with the work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = {
    "nothing": ["track", "run.h5", "--plan"],
    "track": ["track", "run.h5"],
    "sharpness": ["sharpness", "run.h5", "--at", "iterate", "--steps", "12:20:4", "--replace"],
    "curvature": ["sharpness", "run.h5", "--steps", "20", "--metrics", "gradient_norm,curvature"],
    "cluster": ["cluster", "done.h5", "--by", "gradient", "--test", "none", "--replace"],
}


def launched(folder: Path, count: int, command: list[str], **how: Any) -> list[subprocess.Popen]:
    """The command in so many processes of one thread that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "opsig_cli", *command], cwd=folder,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **how,
        )
        for rank in range(count)
    ]  # fmt: skip


def used(folder: Path, count: int, command: list[str]) -> tuple[list[float], float]:
    """CPU seconds of each process, and wall seconds."""
    begin = time.perf_counter()
    started = launched(folder, count, [*command, "--quiet"], stdout=subprocess.DEVNULL)
    seconds = []
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, command
        seconds.append(usage.ru_utime + usage.ru_stime)
    return seconds, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default=",".join(COMMANDS))
    arguments = parser.parse_args()
    folder = arguments.folder
    train = f"train --task fashion-mnist --model {arguments.model} --learning-rate 0.1 --steps {arguments.steps}"
    train += " -o whole.h5 --checkpoint-every 1 --replace"
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
    for name in ["nothing", *(each for each in arguments.only.split(",") if each != "nothing")]:
        command = COMMANDS[name]
        found = {}
        for count in (1, arguments.processes):
            shutil.copy(folder / "whole.h5", folder / "run.h5")
            found[count] = used(folder, count, command)
        if name == "nothing":
            idle = found
            continue
        (one, alone), (each, wall) = found[1], found[arguments.processes]
        less = [seconds - nothing for seconds, nothing in zip(each, idle[arguments.processes][0], strict=True)]
        walls = alone - idle[1][1], wall - idle[arguments.processes][1]
        one_less = one[0] - idle[1][0][0]
        print(
            f"{name:10} {one_less:8.2f} s alone, {' '.join(f'{seconds:.2f}' for seconds in less)} s each: "
            f"{one_less / max(less):.2f} times; with the start {one[0]:.2f}, {' '.join(f'{s:.2f}' for s in each)} s: "
            f"{one[0] / max(each):.2f} times; wall {walls[0]:.1f} and {walls[1]:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

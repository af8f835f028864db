"""Several processes on one machine, as torchrun starts them but without its own imports: a command and its outcome."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass


@dataclass
class Ended:
    """What a process left."""

    code: int
    out: str
    err: str


def start(
    count: int, *arguments: object, program: tuple[str, ...] = ("-m", "opsig_cli"), **environment: str
) -> list[subprocess.Popen]:
    """The command line in `count` processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(count)} | environment
    return [
        subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 800) -> list[Ended]:
    """How they ended, in order; none is left running. `timeout` is one for a process that hangs, on a busy machine."""
    ends = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ends.append(Ended(process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
    return ends

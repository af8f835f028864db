"""Which of several processes this one is, as torchrun or srun says in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from opsig_cli.errors import UsageError

ALONE = ("--part", "--help", "-h", "--version")
"""Options with which processes have nothing to do with each other, though they were started together."""
FIRST_PORT, PORTS = 20_000, 20_000
"""Where the processes of a SLURM step meet, by the numbers of job and step, unless MASTER_PORT says."""


@dataclass(frozen=True)
class Launch:
    """The process number `rank` of `size`."""

    rank: int
    size: int


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """What is given for an option, as `--option VALUE` or `--option=VALUE`: the last, or None where it is not given.

    >>> value_of("--backend", ["track", "--backend=a", "--backend", "b"]), value_of("--backend", ["--", "--backend=a"])
    ('b', None)
    """
    found = None
    for place, argument in enumerate(arguments):
        if argument == "--":
            break
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else next(iter(arguments[place + 1 :]), None)
    return found


def launched(arguments: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> Launch | None:
    """The place among processes that were started together, or None for one that works alone.

    Of a step of srun, says in the environment what torchrun would, for torch to read. Raises UsageError for numbers
    that are none.
    """
    if any(argument.split("=")[0] in ALONE for argument in arguments):
        return None
    if "RANK" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        environment.update(_of_step(environment))
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        launch = Launch(int(environment["RANK"]), int(environment["WORLD_SIZE"]))
    except ValueError:
        raise UsageError("RANK and WORLD_SIZE in the environment are no numbers. Unset them, or use torchrun") from None
    return launch if launch.size > 1 else None


def _of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would say to a task of a SLURM step."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    nodes = environment.get("SLURM_STEP_NODELIST", "localhost")
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(FIRST_PORT + (101 * job + step) % PORTS)),
    }


def first_node(nodes: str) -> str:
    """The first of the nodes that SLURM lists.

    >>> first_node("gpu[007-009,12]"), first_node("login1,gpu[1-2]"), first_node("rack[2-3]n5")
    ('gpu007', 'login1', 'rack2n5')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else nodes)

"""What a measuring command will take, before it begins: memory, disk, and passes over the data.

A command is a list of stages, one after the other: memory is that of the largest, passes are those of all.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsig_cli import backends
from opsig_cli.backends import Need, Session, State, worded
from opsig_cli.errors import OpsigError
from opsig_cli.studies.tracking import MEMORY

MIB = 1 << 20
PAGE = resource.getpagesize()
LOADED_LATER = 32 << 20
"""Bytes of libraries, such as scipy's, that a command loads when it uses them."""
Plan = tuple[dict[str, Any], list[str]]
"""A record of what a command takes, and what to say where it does not fit."""


@dataclass(frozen=True)
class Stage:
    """A part of a command: what is measured (see `Plans.needs`), of how many, how often, and how many bytes of the
    host's memory the command itself takes beside it."""

    what: str
    times: float = 1
    count: int = 1
    host: int = 0


@dataclass(frozen=True)
class Count:
    """The number of which memory is a question: its option, such as `--top`, what it is, and the stages of another."""

    option: str
    value: int
    stages: Callable[[int], Sequence[Stage]]


def plan(
    path: str, session: Session, backend: str | None, command: str, stages: Sequence[Stage], state: State,
    checkpoints: int, disk: int = 0, counted: Count | None = None,
) -> Plan:  # fmt: skip
    """One record: what `command` takes for these stages, at a state of the run, and `disk` bytes that it adds to files.

    Raises OpsigError for a backend that does not know.
    """
    backends.require(session, backends.Plans, backend, "a plan")
    need, passes = _together(session, stages, state)
    fits = need.least <= need.bound and need.host <= (need.host_bound or need.host)
    record: dict[str, Any] = {
        "trajectory": path, "command": command, "checkpoints": checkpoints, "passes": round(passes, 1),
        "memory_least": need.least, "memory_most": need.most, "memory_bound": need.bound,
        "host_memory": need.host if need.host_bound else need.least, "fits": fits, "disk": disk,
        "device": session.device_name,
    }  # fmt: skip
    notes = [] if fits else [_refusal(command, session, need, state, counted)]
    return record, notes


def plan_of_file(path: str, command: str, memory: int) -> Plan:
    """The same of a command that reads the file alone, measures nothing, and takes so much beside the program."""
    memory += _resident()
    record = {
        "trajectory": path, "command": command, "checkpoints": 0, "passes": 0.0, "memory_least": memory,
        "memory_most": memory, "memory_bound": MEMORY.get(), "host_memory": memory,
        "fits": memory <= (MEMORY.get() or memory), "disk": 0, "device": None,
    }  # fmt: skip
    return record, []


def require(
    session: Session, command: str, stages: Sequence[Stage], state: State, counted: Count | None = None
) -> None:
    """Raise OpsigError, with the number and the option that makes it fit, where these stages do not fit the memory.

    Nothing is asked of a backend that does not know.
    """
    if not stages or not isinstance(session, backends.Plans):
        return
    need, _ = _together(session, stages, state)
    if need.least > need.bound or (need.host_bound and need.host > need.host_bound):
        raise OpsigError(_refusal(command, session, need, state, counted))


def _resident() -> int:
    """Bytes that this process has, and what it is going to load; 0 where the system does not say."""
    with suppress(OSError):
        return (int(Path("/proc/self/statm").read_text().split()[1]) * PAGE) + LOADED_LATER
    return 0


def _together(session: Any, stages: Sequence[Stage], state: State) -> tuple[Need, float]:
    """The memory of the stage that takes most, and the passes of all."""
    needs = [session.needs(stage.what, stage.count, state) for stage in stages]
    passes = sum(need.passes * stage.times for need, stage in zip(needs, stages, strict=True))
    same = [0 if need.host_bound else stage.host for need, stage in zip(needs, stages, strict=True)]
    largest = Need(
        max(need.least + host for need, host in zip(needs, same, strict=True)),
        max(need.most + host for need, host in zip(needs, same, strict=True)),
        needs[0].bound, passes,
        max(need.host + stage.host for need, stage in zip(needs, stages, strict=True)), needs[0].host_bound,
    )  # fmt: skip
    return largest, passes


def _refusal(command: str, session: Session, need: Need, state: State, counted: Count | None) -> str:
    """What it lacks and what makes it fit."""
    wanted, bound, what = need.least, need.bound, "--memory"
    if wanted <= bound:
        return (
            f"{command} needs {worded(need.host)} of this machine's memory beside its device, and "
            f"{worded(need.host_bound)} are free"
        )
    ways = []
    if counted is not None and (fewer := _fitting(session, counted, state)):
        ways.append(f"{counted.option} {fewer}")
    enough = worded(wanted + (wanted >> 5) + MIB).replace(" ", "")
    ways.append(f"{what} {enough}" if MEMORY.get() else f"{what} {enough} where there is as much")
    have = f"{worded(bound)} are given" if MEMORY.get() else f"{worded(bound)} can be had"
    return f"{command} needs at least {worded(wanted)} and {have}. Give {', or '.join(ways)}"


def _fitting(session: Session, counted: Count, state: State) -> int:
    """The largest number below the one asked for that fits; 0 where none does."""
    least, most = 0, counted.value
    while most - least > 1:
        middle = (least + most) // 2
        need, _ = _together(session, counted.stages(middle), state)
        least, most = (middle, most) if need.least <= need.bound else (least, middle)
    return least

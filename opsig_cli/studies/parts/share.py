"""One of N parts of a run's measuring: which checkpoints it has, and the file of its own that takes the rows.

Parts know nothing of each other. Which checkpoints are a part's depends on the run's checkpoints and on N alone: parts
may be measured in any order, on any machine, and any number of them again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.trajectory.file import Trajectory, create_trajectory, open_trajectory

KEPT = ("task", "task_source", "task_sha256", "settings_json", "opsig_version")
"""Attributes that a part takes over from its run."""
ARRAY = "SLURM_ARRAY_TASK_"
LOSSES = ("losses",)
CURVATURE = ("sharpness", "preconditioned", "floor", "preconditioned_floor")
OF_SAMPLES = ("per_sample",)


@dataclass(frozen=True)
class Part:
    """Number `number` of `count` parts, from 1 on."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def share(self, steps: Sequence[int]) -> list[int]:
        """The part's own of these steps: consecutive ones, as many as any other part has, or one less.

        >>> [Part(number, 3).share(range(8)) for number in (1, 2, 3)]
        [[0, 1], [2, 3, 4], [5, 6, 7]]
        """
        first, last = (len(steps) * number // self.count for number in (self.number - 1, self.number))
        return [int(step) for step in steps[first:last]]


def part_of(text: str | None, output: str | None, environment: Mapping[str, str] = os.environ) -> Part | None:
    """The part that was asked for: "I/N", or, with an output alone, the number of the SLURM array's task.

    Raises UsageError for what is none, for a part without an output, and for an array whose numbers do not say which
    part a task is.
    """
    if text is None and output is None:
        return None
    if output is None:
        raise UsageError(f"--part {text} goes into a file of its own. Name it: -o part.h5")
    if text is not None:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
        if not 1 <= part.number <= part.count:
            raise UsageError(f"--part '{text}' is no part. Write I/N, with I from 1 to N: --part 3/16")
        return part
    try:
        task, count, first, last = (int(environment[ARRAY + name]) for name in ("ID", "COUNT", "MIN", "MAX"))
    except (KeyError, ValueError):
        raise UsageError(
            "-o is where a part goes. Say which: --part 3/16 (an array job of SLURM says it itself)"
        ) from None
    if first not in (0, 1) or last - first + 1 != count:
        raise UsageError(
            f"the array job has {count} tasks, numbered from {first} to {last}: that does not say which part of how "
            "many this is. Number them from 1 on, or give --part I/N"
        )
    return Part(task - first + 1, count)


@contextmanager
def opened_part(
    run: Trajectory, part: Part, output: str, groups: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[Trajectory]:
    """The run, to be measured, while rows of these `groups` go to, and are looked for in, the part's file.

    A file that holds some of this part is continued. Raises OpsigError for one that holds anything else.
    """
    said = {"of": run_id(run), "part": part.number, "parts": part.count, "settings": dict(settings)}
    if os.path.exists(output):
        own = open_trajectory(output, "r+")
        try:
            _check_same(own, said, run)
        except BaseException:
            own.abort()
            raise
    else:
        kept = {name: value for name, value in run.attributes.items() if name in KEPT}
        own = create_trajectory(output, run.samples, kept | {"state": "part", "part_json": said})
    with own:
        yield cast(Trajectory, _Divided(run, own, groups))


def run_id(run: Trajectory) -> str:
    """The run's identity. Raises OpsigError for a file that was written before it had one."""
    found = run.attributes.get("run_id")
    if found is None:
        raise OpsigError(
            f"{run.path} has no identity that its parts could name: it is of schema 1.0. Run: opsig repack"
        )
    return str(found)


def _check_same(own: Trajectory, said: Mapping[str, Any], run: Trajectory) -> None:
    held = own.attributes.get("part_json")
    if held is None:
        raise OpsigError(f"-o {own.path} is no part of a run. Name another file")
    if held.get("of") != said["of"]:
        raise OpsigError(f"-o {own.path} is a part of another run than {run.path}. Name another file")
    if (held.get("part"), held.get("parts")) != (said["part"], said["parts"]):
        raise OpsigError(
            f"-o {own.path} is part {held.get('part')}/{held.get('parts')}, not {said['part']}/{said['parts']}. "
            "Name another file"
        )
    if held.get("settings") != said["settings"]:
        raise OpsigError(
            f"-o {own.path} was measured with {worded(held.get('settings'))}, not {worded(said['settings'])}. "
            "Name another file"
        )


def worded(settings: Any) -> str:
    """Settings of a part in words."""
    known = settings if isinstance(settings, dict) else {}
    return " ".join(f"{name}={value}" for name, value in known.items() if value is not None) or "no settings"


class _Divided:
    """Passes everything on to the run, but rows of some groups to the part's own file."""

    def __init__(self, run: Trajectory, own: Trajectory, groups: Sequence[str]):
        self._run = run
        self._own = own
        self._groups = groups
        self.commit = own.commit
        self.append = own.append
        self.rewrite = own.rewrite
        self.remove = own.remove

    def _holder(self, name: str) -> Trajectory:
        return self._own if name.split("/")[0] in self._groups else self._run

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._run, name)
        if name in ("has", "require", "shape", "read", "steps", "row", "rows", "series", "blocks", "check"):
            return lambda group, *more, **named: getattr(self._holder(group), name)(group, *more, **named)
        return found
